"""Checkpoints of a model and the state of its optimizer.

Orbax stores them: asynchronously, atomically, and from and to any sharding. This module
adds what Orbax does not know: a manifest, by which a checkpoint that does not fit is
told from one that does before any array is read; a digest of every array; and moments
whose groups lie elsewhere than those of the state that they are restored to.
"""

import operator
import os
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from . import __version__, _manifest as manifests
from ._codec import QuantMoment
from ._digest import digest
from ._manifest import CheckpointError as CheckpointError
from ._place import no_mesh
from ._regroup import regroup
from ._target import is_key, Target
from ._trees import flatten, is_array


try:
    import orbax.checkpoint as ocp
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
        max_to_keep = _from_one("max_to_keep", max_to_keep, "None to keep all")
        keep_period = _from_one("keep_period", keep_period, "None for no such steps")
        directory = os.fspath(directory)
        if "://" not in directory:
            directory = os.path.abspath(directory)
            if os.path.exists(directory) and not os.path.isdir(directory):
                raise CheckpointError(
                    f"`Checkpoints({directory!r})` is a file. Pass a directory: it "
                    "holds one folder for each step."
                )
        self._directory = directory
        self._closed = False
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(max_to_keep)]
        if keep_period is not None:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_period))
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(
                    policies
                )
            ),
            item_names=(_ARRAYS, _MANIFEST),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

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

        `CheckpointError` if the directory has a checkpoint of this or a later step.
        `ValueError` after `close`.
        `TypeError` if an array has no value, or none that can be stored. Whatever went
        wrong in the background during the previous save.
        """
        call, step = "Checkpoints.save", operator.index(step)
        if self._closed:
            raise ValueError(
                f"`{call}(step={step})` came after `close`, or after the end of the "
                "`with` block, which closes. Save before that, or open the directory "
                f"again: `Checkpoints({self._directory!r})`."
            )
        leaves, _ = _flatten(call, model, state)
        arrays = {leaf.name: leaf.value for leaf in leaves if is_array(leaf.value)}
        for name, x in arrays.items():
            _check_storable(call, name, x)
        self.wait()
        latest = self._manager.latest_step()
        if step < 0 or (latest is not None and step <= latest):
            raise CheckpointError(
                f"`{call}(step={step})`: steps count up from 0, and {self._directory} "
                f"has checkpoints of {self._manager.all_steps()}. Delete later ones "
                "with `delete`, or save to another directory."
            )
        stored = {name: _to_store(x) for name, x in arrays.items()}
        with no_mesh():
            digests = _digests(stored)
        manifest = manifests.make(__version__, arrays, digests, _moments(model, state))
        items: dict[str, Any] = {_MANIFEST: ocp.args.JsonSave(manifest)}
        # Orbax refuses arrays without elements, and trees without arrays.
        stored = {name: x for name, x in stored.items() if x.size > 0}
        if stored:
            items[_ARRAYS] = ocp.args.PyTreeSave(stored)
        saved = self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        assert saved

    def restore(
        self, model: PyTree, state: PyTree, step: SupportsIndex | None = None
    ) -> tuple[PyTree, PyTree]:
        """Restores a checkpoint.

        **Arguments:**

        - `model`, `state`: trees like those that were saved. They say where to put what
            is read: in place of a `jax.Array`, or of a `jax.ShapeDtypeStruct` with a
            `sharding`, comes an array of that sharding; in place of a NumPy array, one
            of NumPy; in place of a `jax.ShapeDtypeStruct` without a sharding, an array
            where JAX puts new ones. The devices that saved need not be there. Values
            are not looked at, and may have been donated.
        - `step`: which checkpoint. The latest by default.

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
        names the leaf. Nothing is changed.
        """
        call = "Checkpoints.restore"
        leaves, rebuild = _flatten(call, model, state)
        likes = {leaf.name: leaf.value for leaf in leaves if is_array(leaf.value)}
        moments = _moments(model, state)
        targets = {name: Target.of(call, name, x) for name, x in likes.items()}

        step = self._choose(call, step)
        where = self._path(step)
        manifest = self._read_manifest(call, step)
        contents = manifests.contents(
            call, where, manifest, __version__, self._remedy(step)
        )
        regrouped = manifests.check(call, where, contents, likes, moments)

        requests = {name: _request(target) for name, target in targets.items()}
        for name in regrouped:
            codes, scales = _parts(name)
            requests[codes] = _request(targets[codes], automatic=True)
            # Of another shape than those of `state`, they may not divide like them.
            requests[scales] = _TO_NUMPY
        try:
            restored = self._read_arrays(step, targets, requests)
        except (MemoryError, jax.errors.JaxRuntimeError):
            # Of the machine, such as too little memory: the files may well be sound.
            raise
        except Exception as error:
            # What is damaged fails in too many ways to be told from all others.
            raise CheckpointError(
                f"`{call}`: the arrays of {where} cannot be read ({_first_line(error)})"
                ". Unless that names another cause, its files are damaged. "
                f"{self._remedy(step)}"
            ) from error

        with no_mesh():
            for name, found in _digests(restored).items():
                if found != contents["arrays"][name]["digest"]:
                    raise CheckpointError(
                        f"`{call}`: {where} is damaged: `{name}` is not as it was "
                        f"saved. {self._remedy(step)}"
                    )
            for name in regrouped:
                codes, scales = _parts(name)
                stored = contents["moments"][name]
                restored[codes], restored[scales] = regroup(
                    restored[codes],
                    restored[scales],
                    (stored["axis"], stored["group_size"]),
                    moments[name],
                    restored.get(f"{name}.parameter"),
                )
        restored = {name: targets[name].put(x) for name, x in restored.items()}
        return rebuild([restored.get(leaf.name, leaf.value) for leaf in leaves])

    def all_steps(self) -> list[int]:
        """The steps of the checkpoints in the directory, in order. Waits for the save
        under way."""
        self.wait()
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The step of the latest checkpoint; `None` if there is none. Waits for the
        save under way."""
        return max(self.all_steps(), default=None)

    def delete(self, step: SupportsIndex) -> None:
        """Deletes a checkpoint, such as a damaged one.

        **Arguments:**

        - `step`: the number of its step.

        **Raises:**

        `CheckpointError` if there is no such checkpoint.
        """
        self._manager.delete(self._choose("Checkpoints.delete", step))

    def wait(self) -> None:
        """Waits until the save under way is complete.

        **Raises:**

        Whatever went wrong in the background.
        """
        try:
            self._manager.wait_until_finished()
        except BaseException:
            # Orbax counts the checkpoint that failed.
            self._manager.reload()
            raise

    def close(self) -> None:
        """Waits, and lets go of the directory: nothing can be saved any more. Raises
        what `wait` raises."""
        self._closed = True
        self._manager.close()

    def _choose(self, call: str, step: SupportsIndex | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise CheckpointError(
                f"`{call}`: there is no checkpoint in {self._directory}. Pass the "
                "directory that was given to `Checkpoints` when it was saved."
            )
        if step is None:
            return steps[-1]
        if operator.index(step) not in steps:
            raise CheckpointError(
                f"`{call}(step={step})`: {self._directory} has checkpoints of the "
                f"steps {steps}. Pass one of them."
            )
        return operator.index(step)

    def _remedy(self, step: int) -> str:
        others = [other for other in self._manager.all_steps() if other != step]
        if not others:
            return "There is no other one in the directory."
        return f"Restore another one, `step=` one of {others}, and `delete({step})`."

    def _read_manifest(self, call: str, step: int) -> Any:
        try:
            items = ocp.args.Composite(**{_MANIFEST: ocp.args.JsonRestore()})
            return self._manager.restore(step, args=items)[_MANIFEST]
        except Exception as error:
            raise CheckpointError(
                f"`{call}`: {self._path(step)} has no manifest that can be read "
                f"({_first_line(error)}): it is damaged, or no checkpoint of "
                "flashquinox. Pass the directory that was given to `Checkpoints` when "
                f"it was saved. {self._remedy(step)}"
            ) from error

    def _read_arrays(
        self, step: int, targets: dict[str, Target], requests: dict[str, Any]
    ) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            name: np.zeros(target.shape, target.dtype)
            for name, target in targets.items()
            if 0 in target.shape
        }
        requests = {k: request for k, request in requests.items() if k not in arrays}
        if requests:
            # What is read has the shapes and dtypes of the requests, not of this.
            item = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in requests}
            read = ocp.args.PyTreeRestore(item, restore_args=requests)
            items = ocp.args.Composite(**{_ARRAYS: read})
            arrays |= self._manager.restore(step, args=items)[_ARRAYS]
        return arrays

    def _path(self, step: int) -> str:
        return f"{self._directory}/{step}"


# The two items of a checkpoint.
_ARRAYS = "arrays"
_MANIFEST = "flashquinox"

_TO_NUMPY = ocp.RestoreArgs(restore_type=np.ndarray)


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


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0].rstrip(".")
    if len(line) > 200:
        line = f"{line[:200]}..."
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


#
# Trees
#


class _Leaf(NamedTuple):
    # As in `model.layers[0].weight`.
    name: str
    value: Any


def _flatten(call: str, model: PyTree, state: PyTree) -> tuple[list[_Leaf], Any]:
    """All leaves of the two trees, and a function from as many values to two such
    trees."""
    leaves, treedef = jtu.tree_flatten_with_path((model, state))
    named = [_Leaf(_name(path), value) for path, value in leaves]
    names = [leaf.name for leaf in named]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(
            f"`{call}`: two leaves are called `{twice}`. Give their containers keys "
            "that print differently."
        )
    return named, treedef.unflatten


def _moments(model: PyTree, state: PyTree) -> dict[str, QuantMoment]:
    leaves, _ = flatten((model, state))
    return {
        _name(leaf.path): leaf.value
        for leaf in leaves
        if isinstance(leaf.value, QuantMoment)
    }


def _name(path: tuple[Any, ...]) -> str:
    tree, *path_in_tree = path
    return ("model", "state")[tree.idx] + jtu.keystr(tuple(path_in_tree))


def _parts(moment: str) -> tuple[str, str]:
    return f"{moment}.codes", f"{moment}.scales"


#
# Saving
#


def _check_storable(call: str, name: str, x: Any) -> None:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"`{call}`: `{name}` is traced. Save outside of `jit`, between two steps."
        )
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(
            f"`{call}`: `{name}` is a `jax.ShapeDtypeStruct`, which has no value. Pass "
            "the model and the state themselves."
        )
    if isinstance(x, jax.Array):
        if x.is_deleted():
            raise TypeError(
                f"`{call}`: the array at `{name}` was donated. Save what the step "
                "returned, not what was passed to it."
            )
        return
    number = x.dtype == np.bool_ or jnp.issubdtype(x.dtype, np.number)
    if not number or not x.dtype.isnative:
        raise TypeError(
            f"`{call}`: the NumPy array at `{name}` is {x.dtype}, which is not stored. "
            "Pass numbers, in the byte order of the machine."
        )


def _to_store(x: Any) -> Any:
    """A leaf as what Orbax stores."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if is_key(x):
        x = jax.random.key_data(x)
    if jax.process_count() > 1 and x.is_fully_addressable:
        # An array that each process has for itself.
        return np.asarray(x)
    return x


def _digests(arrays: dict[str, Any]) -> dict[str, int]:
    digests = {name: digest(name, x) for name, x in arrays.items()}
    return {name: int(x) for name, x in jax.device_get(digests).items()}


#
# Restoring
#


def _request(target: Target, automatic: bool = False) -> ocp.RestoreArgs:
    sharding = target.sharding_of_read(automatic)
    if sharding is None:
        return _TO_NUMPY
    return ocp.ArrayRestoreArgs(
        sharding=sharding, global_shape=target.shape, dtype=target.dtype
    )
