"""Checkpoints of a model and the state of its optimizer.

Orbax stores the arrays, asynchronously and in any sharding. This library adds:

- a manifest, which shows whether a checkpoint is complete and fits before any array is
  read;
- a digest of every array;
- moments that are stored again where the state to restore to has other groups.
"""

import operator
import os
import threading
from typing import Any, overload, SupportsIndex

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from .._common.errors import CheckpointError
from .._common.path_checks import check_path, check_step
from .._model.trees import is_array, Model, State
from .._optimizer.call_checks import check_not_optimizer, check_not_state


try:
    import orbax.checkpoint  # noqa: F401  (before what may have been imported)

    from . import named_leaves
    from .directory import Directory
    from .lock import lock
    from .messages import first_line
    from .reader import Reader
    from .restoring import Wanted
    from .saver import Saver
except ImportError as error:
    raise ImportError(
        '`flashquinox.checkpoint` needs Orbax: `pip install "flashquinox[checkpoint]"`.'
    ) from error


class Checkpoints:
    """A directory of checkpoints. Each holds a model and the state of its optimizer,
    and has the number of a step.

    All arrays are stored: `jax.Array`s in any sharding, random keys, and NumPy arrays.
    Other leaves, such as functions and Python numbers, are not stored.

    Use it as a context manager, or call `close`, to wait for the last save. With
    several processes, all of them make the same calls, and share the directory.

    A process that is killed while it saves leaves a folder `N.orbax-checkpoint-tmp`
    behind, which never counts as a checkpoint. It is removed when step `N` is saved
    again. Otherwise it stays, because another process might still write to it: delete
    it when no process saves.

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

        - `directory`: a path, or an address that Orbax knows, such as `gs://...`. It is
            made if it does not exist.
        - `max_to_keep`: how many checkpoints to keep, at least 1. When a new one is
            complete, the oldest are deleted. `None` keeps all.
        - `keep_period`: if given, checkpoints of steps that are multiples of it are
            never deleted.

        **Raises:**

        [`flashquinox.checkpoint.CheckpointError`][] if `directory` is a file.
        `ValueError` if `max_to_keep` or `keep_period` is no whole number from 1.
        """
        check_path("Checkpoints", "directory", directory)
        newest = _from_one("max_to_keep", max_to_keep, "None to keep all")
        period = _from_one("keep_period", keep_period, "None for no such steps")
        self._directory = Directory(directory)
        self._saver = Saver(self._directory, newest, period)
        self._reader = Reader(self._directory)
        self._closed = False
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
            # Do not hide the exception of the `with` block.
            exception.add_note(str(error))

    def save(self, step: SupportsIndex, model: PyTree, state: PyTree) -> None:
        """Begins to save a checkpoint. It returns when the arrays are copied to the
        host: the model and the state may then be donated or changed. Files are written
        in the background.

        The checkpoint appears when it is complete. If the process ends or is killed
        before that, the earlier checkpoints are unchanged.

        **Arguments:**

        - `step`: the number of the step, more than that of every checkpoint there is.
        - `model`: any pytree.
        - `state`: its optimizer state, or any pytree, such as a tuple of that state and
            a random key, or the state of `optax.chain`.

        **Raises:**

        `CheckpointError` if the directory has a checkpoint of this or a later step, if
        this save fails, or if the previous one failed in the background. Nothing is
        saved then. `ValueError` after `close`. `TypeError` for an array without a
        value, or of a dtype that cannot be stored.
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
        leaves, _ = named_leaves.flatten_named(call, model, state)
        arrays = {leaf.name: leaf.value for leaf in leaves if is_array(leaf.value)}
        for name, x in arrays.items():
            named_leaves.check_storable(call, name, x)
        moments = named_leaves.quant_moments(model, state)
        with self._mutex:
            self.wait()
            self._saver.start(call, step, arrays, moments)

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

        - `model`, `state`: trees like those that were saved. Their leaves say where
            each array goes. A `jax.Array`, or a `jax.ShapeDtypeStruct` with a
            `sharding`, is replaced by an array of the same sharding; a
            `jax.ShapeDtypeStruct` without one, by an array on JAX's default device; a
            NumPy array, by a NumPy array. The devices need not be those that saved.
            Values are not used, and may have been donated.

            If `state` is `None`, only the model is restored, whatever optimizer trained
            it. Leaves that are float32 here, and were saved in bfloat16 or float16, get
            the master weights: weights plus the corrections that were saved at the same
            paths. Layers may be wrapped by [`flashquinox.cast`][] or not.
        - `step`: which checkpoint. The latest complete one by default.

        **Returns:**

        A 2-tuple of the model and the state. Arrays come from the checkpoint, bit for
        bit; all other leaves come from the arguments. One exception: where a moment has
        other groups in `state` than in the checkpoint, as for another platform or
        another `group_size`, or was stored otherwise by version 0.2 or before, it is
        decoded and encoded again, rounded to nearest.

        **Raises:**

        `CheckpointError` if there is no such checkpoint; if it is damaged, or was
        written by another library or in another version of the format; or if it does
        not fit: a leaf is missing or has another shape or dtype, or a moment has
        another codec. The message names the leaf. Also if an earlier save failed in the
        background: then call again. Nothing is changed.
        """
        call = "Checkpoints.restore"
        check_not_state(call, model)
        check_not_optimizer(call, state)
        wanted = Wanted(call, model, state)
        with self._mutex:
            self.wait()
            step = self._reader.choose(call, step)
            where = self._directory.step_path(step)
            plan = wanted.plan(where, self._reader.contents(call, step))
            read = self._reader.read(call, step, plan)
        return wanted.fill(plan, read)

    def all_steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order. Waits for the save under
        way, and raises what `wait` raises."""
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
        """Deletes a checkpoint, which may be damaged or incomplete.

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
                        f"cannot be deleted ({first_line(error)})."
                    ) from error
                finally:
                    release()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(call)

    def wait(self) -> None:
        """Waits until the save under way is complete.

        **Raises:**

        `CheckpointError` if it failed. Whichever method is called next raises this
        error, once. Its cause is in the message and in `__cause__`. The files of that
        save are removed, earlier checkpoints are unchanged, and later calls work.
        """
        with self._mutex:
            self._saver.wait()

    def close(self) -> None:
        """Waits for the save under way. Nothing can be saved after this. Raises what
        `wait` raises."""
        self._closed = True
        self.wait()


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
