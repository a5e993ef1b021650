"""The leaves of a model and a state, and their names in a checkpoint."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._common.digest import digest
from .._common.errors import CheckpointError
from .._common.target import is_key
from .._model.trees import flatten
from .._model.variables import take_apart
from .._optimizer.states import unpacked
from .._storage.quant_moment import QuantMoment


class NamedLeaf(NamedTuple):
    """A leaf, by a name such as `model.layers[0].weight`."""

    name: str
    value: Any


def flatten_named(
    call: str, model: PyTree, state: PyTree
) -> tuple[list[NamedLeaf], Any]:
    """All leaves of the two trees, and a function from as many values to two such
    trees. How a state packs its arrays is no matter."""
    model, put_together = take_apart(model)
    state, packed = unpacked(state)
    leaves, treedef = jtu.tree_flatten_with_path((model, state))
    moments = {path for path, _ in _quant_moments(model, state)}
    # A `Variable` of Flax around an array of a moment is no part of the name.
    named = [
        NamedLeaf(_name(path[:-1] if path[:-2] in moments else path), value)
        for path, value in leaves
    ]
    names = [leaf.name for leaf in named]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(
            f"`{call}`: two leaves are called `{twice}`. Give their containers keys "
            "that print differently."
        )

    def rebuild(values: list[Any]) -> tuple[PyTree, PyTree]:
        new_model, new_state = treedef.unflatten(values)
        return put_together(new_model), packed(new_state)

    return named, rebuild


def quant_moments(model: PyTree, state: PyTree) -> dict[str, QuantMoment]:
    """All compressed moments in the two trees, by their names."""
    return {_name(path): moment for path, moment in _quant_moments(model, state)}


def _quant_moments(
    model: PyTree, state: PyTree
) -> Iterator[tuple[tuple[Any, ...], QuantMoment]]:
    leaves, _ = flatten((model, unpacked(state)[0]))
    for leaf in leaves:
        if isinstance(leaf.value, QuantMoment):
            yield leaf.path, leaf.value


def _name(path: tuple[Any, ...]) -> str:
    tree, *path_in_tree = path
    return ("model", "state")[tree.idx] + jtu.keystr(tuple(path_in_tree))


def parts(moment: str) -> tuple[str, str]:
    """The names of the codes and the scales of a moment."""
    return f"{moment}.codes", f"{moment}.scales"


def base_of(moment: str, name: str) -> str:
    """The name of the moment of this name, of the leaf of another moment."""
    head, dot, path = moment.rpartition(".moments[")
    return f"{head}{dot}{name!r}]{path.partition(']')[2]}"


def checksums_of(names: Iterable[str]) -> dict[str, str]:
    """For each of these arrays that is the checksum of a weight in an optimizer state,
    the name of that weight."""
    known = set(names)
    found = {}
    for name in names:
        head, dot, path = name.partition(".checksums")
        if (
            dot
            and f"{head}.corrections{path}" in known
            and not head.startswith("model")
        ):
            found[name] = f"model{path}"
    return found


def check_storable(call: str, name: str, x: Any) -> None:
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


def to_store(x: Any) -> Any:
    """A leaf as an array that Orbax stores."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if is_key(x):
        x = jax.random.key_data(x)
    if jax.process_count() > 1 and x.is_fully_addressable:
        # Each process has this array for itself.
        return np.asarray(x)
    return x


def digests(arrays: dict[str, Any]) -> dict[str, int]:
    found = {name: digest(name, x) for name, x in arrays.items()}
    return {name: int(x) for name, x in jax.device_get(found).items()}
