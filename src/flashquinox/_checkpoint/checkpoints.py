"""Checkpoints of a model and the state of its optimizer.

Orbax stores them: asynchronously, and from and to any sharding. This module adds what
Orbax does not know: a manifest, by which a checkpoint that is complete and fits is told
from one that does not before any array is read; a digest of every array; and moments
whose groups lie elsewhere than those of the state that they are restored to.
"""

import functools
import operator
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, overload, SupportsIndex

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from .._common.errors import CheckpointError
from .._common.path_checks import check_path, check_step
from .._common.place import no_mesh
from .._common.version import __version__
from .._model.trees import is_array, Model, State
from .._optimizer.call_checks import check_not_optimizer, check_not_state
from . import manifest as manifests


try:
    import orbax.checkpoint  # noqa: F401  (before what may have been imported)

    from . import files, leaves as named_leaves
    from .directory import Directory
    from .lock import lock
    from .restoring import Plan, Wanted
except ImportError as error:
    raise ImportError(
        '`flashquinox.checkpoint` needs Orbax: `pip install "flashquinox[checkpoint]"`.'
    ) from error


class Checkpoints:
    """The checkpoints in a directory: each of a model and the state of its optimizer,
    by the number of the step.

    All arrays are stored: `jax.Array`s, sharded in any way, random keys included, and
    NumPy arrays. Everything else in the trees, such as functions and Python numbers, is
    not.

    Use it as a context manager, or call `close`: a save may still be under way. With
    several processes, all of them make the same calls, and share the directory.

    A process that is killed while it saves leaves a folder behind that is called
    `N.orbax-checkpoint-tmp`. It never counts as a checkpoint. It is removed when step
    `N` is saved again, and otherwise stays, as another process might still write to it:
    delete it when no process saves.

    ??? Example

        ```python
        with Checkpoints("checkpoints", max_to_keep=3) as checkpoints:
            if checkpoints.latest_step() is not None:
                model, state = checkpoints.restore(model, state)
            for step in range(int(state.count) + 1, 1001):
                model, state = train_step(model, state)
                if step % 100 == 0:
                    checkpoints.save(step, model, state)
        ```
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = None,
        keep_period: int | None = None,
    ):
        """**Arguments:**

        - `directory`: where the checkpoints are; made if it does not exist. A path, or
            an address that Orbax knows, such as `gs://...`.
        - `max_to_keep`: how many checkpoints to keep, at least 1. Once a new one is
            complete, the oldest are deleted. `None` keeps all.
        - `keep_period`: if given, checkpoints of steps that it divides are kept
            whatever `max_to_keep` is.

        **Raises:**

        [`flashquinox.checkpoint.CheckpointError`][] if `directory` is a file.
        `ValueError` if `max_to_keep` or `keep_period` is no whole number from 1.
        """
        check_path("Checkpoints", "directory", directory)
        self._max_to_keep = _from_one("max_to_keep", max_to_keep, "None to keep all")
        self._keep_period = _from_one(
            "keep_period", keep_period, "None for no such steps"
        )
        self._directory = Directory(directory)
        self._closed = False
        # The save under way, and what went wrong in it.
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        # One method at a time, from whichever thread.
        self._mutex = threading.RLock()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, exception: Any, traceback: Any) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if exception is None:
                raise
            # The first comes first.
            exception.add_note(str(error))

    def save(self, step: SupportsIndex, model: PyTree, state: PyTree) -> None:
        """Begins to save a checkpoint, and returns as soon as the arrays are copied to
        the host: what is passed may then be donated or changed. Files are written in
        the background.

        The checkpoint appears when it is complete: if the process ends before, however
        it does, the previous ones are as they were.

        **Arguments:**

        - `step`: the number of the step, more than that of every checkpoint there is.
        - `model`: any pytree.
        - `state`: its optimizer state, or any pytree, such as a tuple of that state and
            a random key, or the state of `optax.chain`.

        **Raises:**

        `CheckpointError` if the directory has a checkpoint of this or a later step; if
        this save fails, or the previous one did in the background: then nothing is
        saved. `ValueError` after `close`. `TypeError` if an array has no value, or none
        that can be stored.
        """
        call = "Checkpoints.save"
        step = check_step(call, step)
        if self._closed:
            raise ValueError(
                f"`{call}(step={step})` came after `close`, or after the end of the "
                "`with` block, which closes. Save before that, or open the directory "
                f"again: `Checkpoints({self._directory.path!r})`."
            )
        check_not_state(call, model)
        check_not_optimizer(call, state)
        leaves, _ = named_leaves.flatten(call, model, state)
        arrays = {leaf.name: leaf.value for leaf in leaves if is_array(leaf.value)}
        for name, x in arrays.items():
            named_leaves.check_storable(call, name, x)
        with self._mutex:
            self.wait()
            release: Callable[[], None] = lambda: None
            if jax.process_index() == 0:
                release = lock(f"{call}(step={step})", self._directory.path)
            try:
                self._check_later(call, step)
                stored = {name: named_leaves.to_store(x) for name, x in arrays.items()}
                with no_mesh():
                    digests = named_leaves.digests(stored)
                moments = named_leaves.quant_moments(model, state)
                manifest = manifests.make(__version__, arrays, digests, moments)
                finish = self._begin(call, step, stored, manifest)
            except BaseException:
                release()
                raise
            self._thread = threading.Thread(
                target=self._finish, args=(step, finish, release), name="checkpoint"
            )
            self._thread.start()

    @overload
    def restore(
        self, model: Model, state: None = None, step: SupportsIndex | None = None
    ) -> tuple[Model, None]: ...

    @overload
    def restore(
        self, model: Model, state: State, step: SupportsIndex | None = None
    ) -> tuple[Model, State]: ...

    def restore(
        self, model: PyTree, state: PyTree = None, step: SupportsIndex | None = None
    ) -> tuple[PyTree, PyTree]:
        """Restores a checkpoint.

        ??? Example

            ```python
            model, state = checkpoints.restore(model, state)

            # To evaluate: without the state of the optimizer.
            model, _ = checkpoints.restore(model)

            # Likewise, in float32: the master weights.
            shapes = eqx.filter_eval_shape(fq.cast, model, jnp.float32)
            float32_model, _ = checkpoints.restore(shapes)
            ```

        **Arguments:**

        - `model`, `state`: trees like those that were saved. They say where to put what
            is read: in place of a `jax.Array`, or of a `jax.ShapeDtypeStruct` with a
            `sharding`, comes an array of that sharding; in place of a NumPy array, one
            of NumPy; in place of a `jax.ShapeDtypeStruct` without a sharding, an array
            where JAX puts new ones. The devices that saved need not be there. Values
            are not looked at, and may have been donated.

            If `state` is `None`, the model alone is restored, whatever optimizer it was
            trained with. Leaves of it that are float32 here, but were saved in bfloat16
            or float16, become the master weights: corrections that were saved at the
            same path are added. Layers may be wrapped by [`flashquinox.cast`][] or not.
        - `step`: which checkpoint. The latest complete one by default.

        **Returns:**

        A 2-tuple of the model and the state. Their arrays come from the checkpoint, bit
        for bit; everything else from the arguments. Only if the groups of a moment lie
        elsewhere in `state` than in the checkpoint, as they do for another platform or
        another `group_size`, is that moment decoded and encoded again, rounded to
        nearest.

        **Raises:**

        `CheckpointError` if there is no such checkpoint; if it is damaged, or none of
        this library and this version of its format; or if it does not fit: a leaf is
        missing or has another shape or dtype, or a moment another codec. The message
        names the leaf. Likewise if a save failed in the background: call again.
        Nothing is changed.
        """
        call = "Checkpoints.restore"
        check_not_state(call, model)
        check_not_optimizer(call, state)
        wanted = Wanted(call, model, state)
        with self._mutex:
            step = self._choose(call, step)
            where = self._directory.step_path(step)
            plan = wanted.plan(where, self._contents(call, step))
            try:
                read = self._read_arrays(step, plan)
            except (MemoryError, jax.errors.JaxRuntimeError):
                # Of the machine, such as too little memory: the files may be sound.
                raise
            except Exception as error:
                raise self._unreadable(call, step, error) from error
            altered = plan.altered(read)
            if altered is not None:
                raise CheckpointError(
                    f"`{call}`: {where} is damaged: `{altered}` is not as it was saved."
                    f" {self._remedy(step)}"
                )
        return wanted.fill(plan, read)

    def all_steps(self) -> list[int]:
        """The steps of the checkpoints in the directory that are complete, in order.
        Waits for the save under way, and raises what `wait` raises."""
        with self._mutex:
            self.wait()
            return self._directory.steps()

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint; `None` if there is none. Waits
        for the save under way, and raises what `wait` raises."""
        with self._mutex:
            self.wait()
            return self._directory.latest()

    def delete(self, step: SupportsIndex) -> None:
        """Deletes a checkpoint, such as a damaged one, or what is left of one.

        **Arguments:**

        - `step`: the number of its step.

        **Raises:**

        `CheckpointError` if there is no such checkpoint, or what `wait` raises.
        """
        call = "Checkpoints.delete"
        step = check_step(call, step)
        with self._mutex:
            self.wait()
            self._directory.check_deletable(call, step)
            if jax.process_index() == 0:
                release = lock(f"{call}(step={step})", self._directory.path)
                try:
                    self._directory.remove(step)
                except OSError as error:
                    raise CheckpointError(
                        f"`{call}(step={step})`: {self._directory.step_path(step)} "
                        f"cannot be deleted ({_first_line(error)})."
                    ) from error
                finally:
                    release()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(call)

    def wait(self) -> None:
        """Waits until the save under way is complete.

        **Raises:**

        `CheckpointError` if it failed. Every method raises that, of the save before it,
        once: its cause is in the message and in `__cause__`. What that save has written
        is removed, the checkpoints before it are as they were, and the next call goes
        on.
        """
        with self._mutex:
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure

    def close(self) -> None:
        """Waits, and lets go of the directory: nothing can be saved any more. Raises
        what `wait` raises."""
        self._closed = True
        self.wait()

    def _check_later(self, call: str, step: int) -> None:
        """Whether a step is later than those that are there."""
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
                functools.partial(self._directory.list_files, step),
            )
        except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise self._failed(step, error) from error

    def _finish(
        self, step: int, finish: Callable[[], None], release: Callable[[], None]
    ) -> None:
        """In the background: waits for a save, and deletes old checkpoints."""
        try:
            try:
                finish()
            except BaseException as error:
                self._failure = self._failed(step, error)
                self._failure.__cause__ = error
                return
            try:
                if jax.process_index() == 0:
                    self._directory.keep(self._max_to_keep, self._keep_period)
            except BaseException as error:
                self._failure = CheckpointError(
                    f"`Checkpoints.save(step={step})` is complete, but older "
                    f"checkpoints in {self._directory.path} could not be deleted "
                    f"({_first_line(error)})."
                )
                self._failure.__cause__ = error
        finally:
            release()

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        """What is said of a save that failed, once what it wrote is removed."""
        if jax.process_index() == 0:
            self._directory.discard(step)
        return CheckpointError(
            f"`Checkpoints.save(step={step})` failed: {_first_line(error)}. The "
            f"checkpoints in {self._directory.path} before it are as they were: "
            f"{self._directory.steps()}."
        )

    def _choose(self, call: str, step: SupportsIndex | None) -> int:
        self.wait()
        latest = self._directory.latest()
        if step is None and latest is not None:
            self._warn_of_later(call, latest)
            return latest
        folders = self._directory.folders()
        if step is not None and (number := check_step(call, step)) in folders:
            missing = self._directory.missing(number)
            if missing is None:
                return number
            wrong = f"that of step {step} is not complete: it has no `{missing}`"
            if latest is None:
                raise CheckpointError(
                    f"`{call}(step={step})`: there is no checkpoint in "
                    f"{self._directory.path}, as {wrong}."
                )
            raise CheckpointError(
                f"`{call}(step={step})`: {self._directory.path} has checkpoints of the "
                f"steps {self._directory.steps()}; {wrong}. Pass one of them."
            )
        if latest is None:
            incomplete = (
                f" Not complete, or of another program: {folders}." if folders else ""
            )
            raise CheckpointError(
                f"`{call}`: there is no checkpoint of flashquinox in "
                f"{self._directory.path}. Pass the directory that was given to "
                f"`Checkpoints` when it was saved.{incomplete}"
            )
        raise CheckpointError(
            f"`{call}(step={step})`: {self._directory.path} has checkpoints of the "
            f"steps {self._directory.steps()}. Pass one of them."
        )

    def _warn_of_later(self, call: str, latest: int) -> None:
        later = self._directory.folders()[-1]
        if later > latest:
            warnings.warn(
                f"`{call}`: {self._directory.step_path(later)} is left out, and step "
                f"{latest} restored: it is not complete, as it has no "
                f"`{self._directory.missing(later)}`.",
                stacklevel=4,
            )

    def _remedy(self, step: int) -> str:
        others = [other for other in self._directory.steps() if other != step]
        if not others:
            return "There is no other one in the directory."
        return f"Restore another one, `step=` one of {others}, and `delete({step})`."

    def _contents(self, call: str, step: int) -> Any:
        where, remedy = self._directory.step_path(step), self._remedy(step)
        try:
            manifest = self._directory.manifest(step)
        except Exception as error:
            raise CheckpointError(
                f"`{call}`: {where} has no manifest that can be read "
                f"({_first_line(error)}): it is damaged, or no checkpoint of "
                "flashquinox. Pass the directory that was given to `Checkpoints` when "
                f"it was saved. {remedy}"
            ) from error
        contents = manifests.contents(call, where, manifest, __version__, remedy)
        altered = self._directory.altered(step)
        if altered is not None:
            raise CheckpointError(f"`{call}`: {where} is damaged: {altered}. {remedy}")
        return contents

    def _unreadable(self, call: str, step: int, error: Exception) -> CheckpointError:
        where = self._directory.step_path(step)
        missing = self._directory.missing(step)
        if missing is not None:
            return CheckpointError(
                f"`{call}`: {where} was deleted while it was read: it has no "
                f"`{missing}`. {self._remedy(step)}"
            )
        # What is damaged fails in too many ways to be told from all others.
        return CheckpointError(
            f"`{call}`: the arrays of {where} cannot be read ({_first_line(error)}). "
            f"Unless that names another cause, its files are damaged. "
            f"{self._remedy(step)}"
        )

    def _read_arrays(self, step: int, plan: Plan) -> dict[str, Any]:
        return files.read(self._directory.step_path(step), plan.stored, plan.shardings)


def _from_one(name: str, value: Any, otherwise: str) -> int | None:
    """An argument of `Checkpoints` as a whole number from 1, or `None`."""
    if value is None:
        return None
    try:
        number = 0 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(
            f"`Checkpoints({name}=...)` must be a whole number from 1, or {otherwise}; "
            f"got {value!r}."
        )
    return number


def _first_line(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0]
    # Tensorstore adds all that it knows; what the system said comes last.
    line = line.partition(" [tensorstore_spec=")[0].rstrip(".")
    if len(line) > 240:
        line = f"{line[:80]} ... {line[-150:]}"
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
