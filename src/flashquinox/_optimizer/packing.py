"""Small arrays of a state as parts of common ones. JAX takes a microsecond and more for
each array that a compiled program gets or gives, however small it is."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Shaped

from .._common import eager, memory
from .._model.variables import has_variables
from .._storage.layout import layout_of
from .._storage.quant_moment import QuantMoment


# The moments of a state, by their names, its corrections and its checksums.
Trees: TypeAlias = tuple[Any, Any, Any]
FIELDS = "moments", "corrections", "checksums"
_Shapes: TypeAlias = tuple[tuple[int, ...], ...]
_AnyArray: TypeAlias = Shaped[Array, "..."] | Shaped[np.ndarray, "..."]


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
        pairs = [*zip(parts, self.shapes, strict=True)]
        if not all([x.shape[x.ndim - len(shape) :] == shape for x, shape in pairs]):
            return False
        places = {_place(x, x.ndim - len(shape)) for x, shape in pairs} - {None}
        is_together = len(places) <= 1 and _ELSEWHERE not in places
        return is_together and len({x.dtype for x in parts}) == 1

    def is_common(self, x: Any) -> bool:
        """Whether something can be the array that has the parts: along its last axis.
        The axis of an ensemble comes first."""
        size = sum([math.prod(shape) for shape in self.shapes])
        return _is_array(x) and x.shape[-1:] == (size,)


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
        places = _places(trees, members)
        packs: list[_Pack] = []
        if not has_variables(trees):
            packs = [
                _Pack(numbers, tuple([values[i].shape[members:] for i in numbers]))
                for numbers in _alike(values, places, below, apart, members)
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
        # What a function of the arrays of a state has made of one is that of all parts.
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


def _places(trees: Trees, members: int) -> list[_Place]:
    found = []
    is_moment = lambda x: isinstance(x, QuantMoment)
    for path, value in jtu.tree_leaves_with_path(trees, is_leaf=is_moment):
        which = path[0].idx
        # Moments are in a dictionary.
        depth = 2 if which == 0 else 1
        groups = _are_consecutive(value, members) if is_moment(value) else None
        for part, _ in jtu.tree_leaves_with_path(value):
            name = f"{FIELDS[which]}{jtu.keystr((*path[1:], *part))}"
            found.append(_Place(path[depth:], (path[:depth], part, groups), name))
    return found


def _are_consecutive(moment: QuantMoment, members: int) -> bool | None:
    """Whether the groups of a member are. `None` for what a function has made of a
    moment, which has no groups any more."""
    shape = moment.codes.shape[members:] if _is_array(moment.codes) else ()
    if len(shape) < len(moment.axes):
        return None
    return layout_of(shape, moment.axes, moment.group_size).is_consecutive


def _alike(
    values: list[Any],
    places: list[_Place],
    below: int,
    apart: Collection[Any],
    members: int,
) -> list[tuple[int, ...]]:
    """The numbers of arrays that shall be one: of small leaves that are stored
    alike."""
    of_leaf: dict[Any, list[int]] = {}
    for i, place in enumerate(places):
        of_leaf.setdefault(place.leaf, []).append(i)
    alike: dict[Any, list[list[int]]] = {}
    for leaf, numbers in of_leaf.items():
        homes = frozenset([_home(values[i], below, members) for i in numbers])
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


def _home(x: Any, below: int, members: int) -> Any:
    """What arrays must have in common to be parts of one: where they are, as far as
    that is known."""
    if not _is_array(x) or not 0 < math.prod(x.shape[members:]) < below:
        return _ELSEWHERE
    return _ELSEWHERE if memory.is_on_host(x) else _place(x, members)


def _place(x: Any, members: int) -> Any:
    """The devices that an array is on, and the members of an ensemble that each of them
    has; `None` where that is not known."""
    if not isinstance(x, jax.Array):
        return None
    if isinstance(x, jax.core.Tracer):
        spec = jax.typeof(x).sharding.spec
        if any([axis is not None for axis in spec[members:]]):
            return _ELSEWHERE
        return spec[:members] if any(spec[:members]) else None
    if x.sharding.is_fully_replicated:
        return frozenset(x.sharding.device_set)
    if x.sharding.shard_shape(x.shape)[members:] != x.shape[members:]:
        return _ELSEWHERE
    ranges = lambda index: (
        axis.indices(size) for axis, size in zip(index, x.shape[:members], strict=False)
    )
    parts = x.sharding.devices_indices_map(x.shape)
    return frozenset([(device, *ranges(index)) for device, index in parts.items()])


# Of arrays that stay as they are.
_ELSEWHERE = object()


def _by_arrays(function: Any, values: dict[_Pack, Any]) -> dict[_Pack, Any]:
    """What a function makes of arrays, in the memory where they are; of their shapes
    and dtypes; or of arrays that were donated, which are as good as donated."""
    shapes, arrays = tuple([pack.shapes for pack in values]), [*values.values()]
    leaves, structure = jtu.tree_flatten(arrays)
    if all([isinstance(x, np.ndarray) for x in leaves]):
        new = function(shapes, arrays)
    elif any([isinstance(x, jax.ShapeDtypeStruct) or _is_gone(x) for x in leaves]):
        structs = jax.eval_shape(partial(_on_devices, function, shapes), arrays)
        new = [_like(x, y) for x, y in zip(structs, arrays, strict=True)]
    elif (fetched := eager.fetched(leaves)) is not None:
        new = [
            jtu.tree_map(partial(eager.put, like=jtu.tree_leaves(old)[0]), x)
            for x, old in zip(
                function(shapes, structure.unflatten(fetched)), arrays, strict=True
            )
        ]
    else:
        new = _on_devices(function, shapes, memory.to_device(arrays))
        # Of a state that was moved there as a whole.
        away = [memory.any_on_host(x) for x in arrays]
        new = [memory.to_host(x) if y else x for x, y in zip(new, away, strict=True)]
    return dict(zip(values, new, strict=True))


def _like(new: Any, old: Any) -> Any:
    """Shapes and dtypes where others are, if each device has all of a member of an
    ensemble; donated arrays of these shapes in place of some that were donated."""
    members = len((old if _is_array(old) else new).shape) - 1
    first = jtu.tree_leaves(old)[0]
    there = _of_members(getattr(first, "sharding", None), members)
    if there is not None:
        new = jtu.tree_map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), new
        )
    return jtu.tree_map(_donated, new) if _is_gone(first) else new


def _of_members(sharding: Sharding | None, members: int) -> Sharding | None:
    """How the members of an ensemble are divided; `None` if more than they are."""
    if sharding is None or sharding.is_fully_replicated:
        return sharding
    if not isinstance(sharding, NamedSharding) or any(sharding.spec[members:]):
        return None
    return sharding.update(spec=PartitionSpec(*sharding.spec[:members]))


def _donated(like: jax.ShapeDtypeStruct) -> Array:
    new = jnp.zeros(like.shape, like.dtype, device=like.sharding)
    new.delete()
    return new


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _on_devices(function: Any, shapes: tuple[_Shapes, ...], arrays: Any) -> Any:
    return function(shapes, arrays)


def _joined(
    shapes: tuple[_Shapes, ...], parts: list[list[_AnyArray]]
) -> list[_AnyArray]:
    of_numpy = all([isinstance(x, np.ndarray) for xs in parts for x in xs])
    concatenate: Any = np.concatenate if of_numpy else jnp.concatenate
    return [
        concatenate(
            [
                x.reshape((*x.shape[: x.ndim - len(shape)], math.prod(shape)))
                for x, shape in zip(xs, of_pack, strict=True)
            ],
            axis=-1,
        )
        for xs, of_pack in zip(parts, shapes, strict=True)
    ]


def _split(
    shapes: tuple[_Shapes, ...], common: list[_AnyArray]
) -> list[list[_AnyArray]]:
    found = []
    for x, of_pack in zip(common, shapes, strict=True):
        ends = itertools.accumulate(map(math.prod, of_pack), initial=0)
        found.append(
            [
                x[..., start:end].reshape((*x.shape[:-1], *shape))
                for (start, end), shape in zip(
                    itertools.pairwise(ends), of_pack, strict=True
                )
            ]
        )
    return found
