"""Saving in the background, one save at a time."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from .._common.errors import CheckpointError
from .._common.placement import no_mesh
from .._common.version import __version__
from .._storage.quant_moment import QuantMoment
from . import files, manifests
from .directory import Directory
from .lock import lock
from .messages import first_line
from .named_leaves import digests, to_store


class Saver:
    """The save that is under way in a directory, if there is one.

    Every call of `start` is followed by one of `wait`, before the next `start`.
    """

    def __init__(self, directory: Directory, newest: int | None, period: int | None):
        self._directory = directory
        # Which checkpoints to keep, as of `Directory.keep`.
        self._newest = newest
        self._period = period
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def start(
        self,
        call: str,
        step: int,
        arrays: dict[str, Any],
        moments: dict[str, QuantMoment],
    ) -> None:
        """Copies the arrays to the host, and writes them in a thread of its own."""
        release: Callable[[], None] = lambda: None
        if jax.process_index() == 0:
            release = lock(f"{call}(step={step})", self._directory.path)
        try:
            self._check_later(call, step)
            stored = {name: to_store(x) for name, x in arrays.items()}
            with no_mesh():
                found = digests(stored)
            manifest = manifests.make(__version__, arrays, found, moments)
            finish = self._begin(call, step, stored, manifest)
        except BaseException:
            release()
            raise
        self._thread = threading.Thread(
            target=self._finish, args=(step, finish, release), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save under way, and raises its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _check_later(self, call: str, step: int) -> None:
        """A new step must be later than all that have a checkpoint."""
        latest = self._directory.latest()
        if step < 0 or (latest is not None and step <= latest):
            raise CheckpointError(
                f"`{call}(step={step})`: steps count up from 0, and "
                f"{self._directory.path} has checkpoints of {self._directory.steps()}. "
                "Delete later ones with `delete`, or save to another directory."
            )

    def _begin(
        self, call: str, step: int, arrays: dict[str, Any], manifest: dict[str, Any]
    ) -> Callable[[], None]:
        try:
            if jax.process_index() == 0:
                self._directory.make_room(call, step)
            return files.begin_to_write(
                self._directory.step_path(step),
                arrays,
                manifest,
                partial(self._directory.list_files, step),
            )
        except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise self._failed(step, error) from error

    def _finish(
        self, step: int, finish: Callable[[], None], release: Callable[[], None]
    ) -> None:
        """In the thread: waits for a save, and deletes old checkpoints."""
        try:
            try:
                finish()
            except BaseException as error:
                self._failure = self._failed(step, error)
                self._failure.__cause__ = error
                return
            try:
                if jax.process_index() == 0:
                    self._directory.keep(self._newest, self._period)
            except BaseException as error:
                self._failure = CheckpointError(
                    f"`Checkpoints.save(step={step})` is complete, but older "
                    f"checkpoints in {self._directory.path} could not be deleted "
                    f"({first_line(error)})."
                )
                self._failure.__cause__ = error
        finally:
            release()

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        """Removes what a failed save has written, and returns the error to raise."""
        if jax.process_index() == 0:
            self._directory.discard(step)
        return CheckpointError(
            f"`Checkpoints.save(step={step})` failed: {first_line(error)}. The "
            f"checkpoints in {self._directory.path} before it are as they were: "
            f"{self._directory.steps()}."
        )
