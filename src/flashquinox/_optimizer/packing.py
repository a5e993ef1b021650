"""Small arrays of a state as parts of common ones. JAX takes a microsecond and more for
each array that a compiled program gets or gives, however small it is."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Shaped

from .._common import memory
from .._model.variables import has_variables
from .._storage.quant_moment import QuantMoment


# The moments of a state, by their names, its corrections and its checksums.
Trees: TypeAlias = tuple[Any, Any, Any]
FIELDS = "moments", "corrections", "checksums"
_Shapes: TypeAlias = tuple[tuple[int, ...], ...]


class _Pack(NamedTuple):
    """The arrays that are parts of a common one: their numbers and their shapes."""

    numbers: tuple[int, ...]
    shapes: _Shapes

    def of(self, values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in self.numbers]

    def can_have(self, values: Sequence[Any]) -> bool:
        """Whether these can be the parts: arrays of one dtype in one place, which have
        an axis more in an ensemble, or one and the same value for all."""
        parts = self.of(values)
        if not any(map(_is_array, parts)):
            return all([x == parts[0] for x in parts])
        if not all(map(_is_array, parts)):
            return False
        devices = {_devices(x) for x in parts} - {None}
        is_together = len(devices) <= 1 and _ELSEWHERE not in devices
        are_alike = len({x.dtype for x in parts}) == 1
        shaped = [
            x.shape[x.ndim - len(shape) :] == shape
            for x, shape in zip(parts, self.shapes, strict=True)
        ]
        return is_together and are_alike and all(shaped)

    def is_common(self, x: Any) -> bool:
        """Whether something can be the array that has the parts: along its last axis.
        The axis of an ensemble comes first."""
        size = sum([math.prod(shape) for shape in self.shapes])
        return _is_array(x) and x.shape[-1:] == (size,) and not _is_gone(x)


@dataclasses.dataclass(frozen=True, repr=False)
class Packing:
    """Which arrays of a state are parts of common ones: those of leaves with fewer than
    `below` elements, with the same arrays of leaves that are stored alike, in the order
    of the leaves. How they are trained is no matter: a file of a state, which does not
    say that, is of one form. Leaves that are divided over devices, or whose state is in
    host memory, stay as they are; and so do all in `Variable`s of Flax, which are
    around each array.

    - `structure`: that of the trees of the state.
    - `packs`: the arrays of the trees that have parts.
    - `names`: of the arrays that are left, and of the common ones.
    - `apart`: see `of`.
    """

    below: int
    structure: Any
    packs: tuple[_Pack, ...]
    names: tuple[str, ...]
    apart: frozenset[Any]

    @staticmethod
    def of(
        trees: Trees, below: int, apart: Collection[Any], members: int = 0
    ) -> "Packing | None":
        """How the arrays of these trees are packed, if any are. `apart`: the paths of
        leaves that stay as they are. `members`: how many axes of an ensemble there are,
        which come first."""
        values, structure = jtu.tree_flatten(trees)
        places = _places(trees)
        packs: list[_Pack] = []
        if not has_variables(trees):
            packs = [
                _Pack(numbers, tuple([values[i].shape[members:] for i in numbers]))
                for numbers in _alike(values, places, below, apart)
            ]
        if not packs:
            return None
        packing = Packing(below, structure, tuple(packs), (), frozenset(apart))
        alone = [places[i].name for i in packing._alone]
        common = [f"packed[{i}]" for i in range(len(packs))]
        return dataclasses.replace(packing, names=(*alone, *common))

    def packed(
        self, trees: Trees, members: int
    ) -> "tuple[Packing | None, tuple[Any, ...]]":
        """The arrays of these trees, and how they are packed: like this if they can
        be. Trees that nothing can be packed of are returned as they are. `members` is
        as in `of`."""
        values, structure = jtu.tree_flatten(trees)
        is_same = structure == self.structure
        if is_same and all([pack.can_have(values) for pack in self.packs]):
            return self, self._packed(values)
        other = Packing.of(trees, self.below, self.apart, members)
        return other, trees if other is None else other._packed(values)

    def _packed(self, values: list[Any]) -> tuple[Any, ...]:
        parts = {pack: pack.of(values) for pack in self.packs}
        joined = _by_arrays(
            _joined, {pack: xs for pack, xs in parts.items() if _is_array(xs[0])}
        )
        common = [joined.get(pack, xs[0]) for pack, xs in parts.items()]
        return *[values[i] for i in self._alone], *common

    def unpacked(self, arrays: Sequence[Any]) -> Trees:
        """The trees of which these are the arrays."""
        alone = self._alone
        values = dict(zip(alone, arrays, strict=False))
        common = dict(zip(self.packs, arrays[len(alone) :], strict=True))
        # What a function of the arrays of a state has made of one is that of all parts,
        # and so is one that was donated.
        there = {pack: x for pack, x in common.items() if pack.is_common(x)}
        parts = _by_arrays(_split, there)
        for pack, x in common.items():
            of_pack = parts.get(pack, [x] * len(pack.numbers))
            values.update(zip(pack.numbers, of_pack, strict=True))
        return self.structure.unflatten([values[i] for i in range(len(values))])

    def parts(self, trees: Trees) -> list[Any]:
        """The arrays of these trees that are parts of others."""
        values = jtu.tree_leaves(trees)
        return [x for pack in self.packs for x in pack.of(values)]

    def __repr__(self) -> str:
        return f"Packing(below={self.below}, names={self.names})"

    def __deepcopy__(self, memo: Any) -> "Packing":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Structures of Equinox's modules are not the same after they were pickled, but
        # modules are.
        tree = self.structure.unflatten(range(self.structure.num_leaves))
        return _unpickled, (tree, self.below, self.packs, self.names, self.apart)

    @property
    def _alone(self) -> list[int]:
        packed = {i for pack in self.packs for i in pack.numbers}
        return [i for i in range(self.structure.num_leaves) if i not in packed]


def _unpickled(tree: Trees, below: int, *others: Any) -> Packing:
    return Packing(below, jtu.tree_structure(tree), *others)


class _Place(NamedTuple):
    """Where an array is in the trees of a state: the path of the leaf that it belongs
    to, what it is of it, and its name in the state."""

    leaf: tuple[Any, ...]
    role: Any
    name: str


def _places(trees: Trees) -> list[_Place]:
    found = []
    is_moment = lambda x: isinstance(x, QuantMoment)
    for path, value in jtu.tree_leaves_with_path(trees, is_leaf=is_moment):
        which = path[0].idx
        # Moments are in a dictionary.
        depth = 2 if which == 0 else 1
        groups = _has_consecutive_groups(value) if is_moment(value) else None
        for part, _ in jtu.tree_leaves_with_path(value):
            name = f"{FIELDS[which]}{jtu.keystr((*path[1:], *part))}"
            found.append(_Place(path[depth:], (path[:depth], part, groups), name))
    return found


def _has_consecutive_groups(moment: QuantMoment) -> bool | None:
    """`None` for what a function has made of one, which has no groups any more."""
    codes = moment.codes
    has_groups = _is_array(codes) and len(codes.shape) >= len(moment.axes)
    return moment.layout.is_consecutive if has_groups else None


def _alike(
    values: list[Any],
    places: list[_Place],
    below: int,
    apart: Collection[Any],
) -> list[tuple[int, ...]]:
    """The numbers of arrays that shall be one: of small leaves that are stored
    alike."""
    of_leaf: dict[Any, list[int]] = {}
    for i, place in enumerate(places):
        of_leaf.setdefault(place.leaf, []).append(i)
    alike: dict[Any, list[list[int]]] = {}
    for leaf, numbers in of_leaf.items():
        homes = frozenset([_home(values[i], below) for i in numbers])
        if leaf not in apart and _ELSEWHERE not in homes:
            stored = tuple([(places[i].role, values[i].dtype) for i in numbers])
            alike.setdefault((stored, homes), []).append(numbers)
    several = [leaves for leaves in alike.values() if len(leaves) > 1]
    return [numbers for leaves in several for numbers in zip(*leaves, strict=True)]


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _is_gone(x: Any) -> bool:
    """Whether an array was donated."""
    is_there = not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer)
    return not is_there and x.is_deleted()


def _home(x: Any, below: int) -> Any:
    """What arrays must have in common to be parts of one: the devices that they are on,
    where that is known."""
    if not _is_array(x) or not 0 < x.size < below:
        return _ELSEWHERE
    return _ELSEWHERE if memory.is_on_host(x) else _devices(x)


def _devices(x: Any) -> Any:
    """The devices that each have all of an array, `None` where they are not known."""
    if not isinstance(x, jax.Array):
        return None
    if isinstance(x, jax.core.Tracer):
        is_whole = all([axis is None for axis in jax.typeof(x).sharding.spec])
        return None if is_whole else _ELSEWHERE
    is_whole = x.sharding.is_fully_replicated
    return frozenset(x.sharding.device_set) if is_whole else _ELSEWHERE


# Of arrays that stay as they are.
_ELSEWHERE = object()


def _by_arrays(function: Any, values: dict[_Pack, Any]) -> dict[_Pack, Any]:
    """What a function makes of arrays, in the memory where they are; or of their shapes
    and dtypes."""
    function = partial(function, tuple([pack.shapes for pack in values]))
    if any([isinstance(x, jax.ShapeDtypeStruct) for x in jtu.tree_leaves(values)]):
        new = jax.eval_shape(function, [*values.values()])
        return {
            pack: _like(x, values[pack]) for pack, x in zip(values, new, strict=True)
        }
    new = function(memory.to_device([*values.values()]))
    # Of a state that was moved there as a whole.
    away = [memory.any_on_host(x) for x in values.values()]
    new = [memory.to_host(x) if y else x for x, y in zip(new, away, strict=True)]
    return dict(zip(values, new, strict=True))


def _like(new: Any, old: Any) -> Any:
    """Shapes and dtypes with the sharding of others, if these are not divided."""
    there = getattr(jtu.tree_leaves(old)[0], "sharding", None)
    if there is None or not there.is_fully_replicated:
        return new
    return jtu.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), new
    )


@partial(jax.jit, static_argnums=0, inline=True)
def _joined(
    shapes: tuple[_Shapes, ...], parts: list[list[Shaped[Array, "..."]]]
) -> list[Shaped[Array, "..."]]:
    return [
        jnp.concatenate(
            [
                lax.reshape(x, (*x.shape[: x.ndim - len(shape)], math.prod(shape)))
                for x, shape in zip(xs, of_pack, strict=True)
            ],
            axis=-1,
        )
        for xs, of_pack in zip(parts, shapes, strict=True)
    ]


@partial(jax.jit, static_argnums=0, inline=True)
def _split(
    shapes: tuple[_Shapes, ...], common: list[Shaped[Array, "..."]]
) -> list[list[Shaped[Array, "..."]]]:
    found = []
    for x, of_pack in zip(common, shapes, strict=True):
        parts, end = [], 0
        for shape in of_pack:
            start, end = end, end + math.prod(shape)
            part = lax.slice_in_dim(x, start, end, axis=-1)
            parts.append(lax.reshape(part, (*x.shape[:-1], *shape)))
        found.append(parts)
    return found
