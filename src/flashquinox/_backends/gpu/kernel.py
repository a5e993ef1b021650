"""Pallas for GPUs, by way of Triton: one kernel for several leaves.

Every program takes one tile of one leaf. Leaves that are stored alike share a kernel,
whatever their shapes: a program finds its leaf and loads from there, and from then on
all are the same.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Scalar

from ... import _compat as compat
from ..._storage.layout import Layout
from ..._tile.tile import (
    LeafScalars,
    StepScalars,
    StepStructure,
    TileState,
    update_tile,
)
from ..kernel_arithmetic import Arithmetic
from ..scalars import pack
from .arithmetic import ARITHMETIC


_LARGEST_GROUP = 256


def view_of(layout: Layout, grad: Array, old: TileState) -> "View | None":
    """How the kernel sees a leaf. `None` if it cannot take it: then plain XLA does."""
    dtypes = {jnp.dtype(x.dtype) for x in jtu.tree_leaves((old, grad))}
    size, group = old.weight.size, layout.group_size
    # Triton computes addresses with 32 bits.
    if jnp.dtype(jnp.float64) in dtypes or size >= 2**31:
        return None
    if not jtu.tree_leaves(old.scales):
        return Elements(size)
    if group & (group - 1) != 0 or group > _LARGEST_GROUP:
        return None
    axis, shape = layout.axis, layout.shape
    if axis is None or axis == -1:
        whole = size if axis is None else shape[-1]
        return None if whole % group != 0 else Lanes(size // group, group)
    if shape[axis] % group != 0:
        return None
    columns = math.prod(shape[axis + 1 :])
    return Rows(size // columns // group, group, columns)


@partial(jax.jit, static_argnums=(0, 1), static_argnames="interpret")
def update_leaves(
    structure: StepStructure,
    views: "tuple[View, ...]",
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
    interpret: bool = False,
) -> tuple[TileState, ...]:
    """One step of leaves that are stored alike, and of which this backend has views.
    `leaves` are their own scalars, of which `scalars` has one's."""
    tiles = np.cumsum([0, *(view.tiles for view in views)])
    # One array, which is the same for all kernels of a step, and a constant: every
    # other one that XLA must make is another launch.
    of_one = lambda x: x.leaf
    floats, integers, unpack = pack(eqx.tree_at(of_one, scalars, None))
    words = lax.bitcast_convert_type(floats, jnp.int32)
    own, own_structure = jtu.tree_flatten(scalars.leaf)
    arguments = (
        jnp.concatenate([words, integers]),
        jnp.stack([_word(x) for x in jtu.tree_leaves(leaves)]),
    )
    operands = tuple(
        view.see(x) for view, x in zip(views, zip(grads, old, strict=True), strict=True)
    )
    arrays, treedef = jtu.tree_flatten(operands)
    # Where the arrays of the state are among all.
    numbers = jtu.tree_unflatten(treedef, range(len(arrays)))
    state_numbers, state_treedef = jtu.tree_flatten(tuple(x for _, x in numbers))

    update = _traced_update(structure, views[0], interpret, scalars, grads[0], old[0])

    def kernel(words, leaves, *refs):
        inputs = jtu.tree_unflatten(treedef, refs[: len(arrays)])
        outputs = jtu.tree_unflatten(state_treedef, refs[len(arrays) :])
        program = pl.program_id(0)
        leaf = sum((program >= start).astype(jnp.int32) for start in tiles[1:-1])
        # The first of the integers is zero, which Triton does not know.
        zero = words[len(floats)]

        def of_leaf(function: Callable[[int, Any], Any]) -> Any:
            branches = [
                partial(lambda i: function(i, Tile(program - int(tiles[i]), zero)), i)
                for i in range(len(views))
            ]
            return _choose(leaf, branches)

        grad, tile = of_leaf(lambda i, tile: views[i].load(inputs[i], tile))
        here = unpack(
            lambda i: lax.bitcast_convert_type(words[i], jnp.float32),
            lambda i: words[len(floats) + i],
        )
        own_words = [leaves[leaf * len(own) + i] for i in range(len(own))]
        own_here = jtu.tree_unflatten(
            own_structure, map(_of_word, own_words, [x.dtype for x in own])
        )
        here = eqx.tree_at(of_one, here, own_here, is_leaf=lambda x: x is None)
        here = jtu.tree_map(lambda x, like: x.astype(like.dtype), here, scalars)
        new = update(here, grad, tile)
        of_leaf(lambda i, tile: views[i].store(outputs[i], tile, new))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    new = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype)
            for i in state_numbers
        ],
        grid=(int(tiles[-1]),),
        in_specs=[anywhere] * (len(arguments) + len(arrays)),
        out_specs=[anywhere] * len(state_numbers),
        input_output_aliases={
            len(arguments) + i: j for j, i in enumerate(state_numbers)
        },
        compiler_params=plt.CompilerParams(num_warps=views[0].warps),
        interpret=interpret,
        name=f"flashquinox_{type(structure.rule).__name__.lower()}",
    )(*arguments, *arrays)
    new = jtu.tree_unflatten(state_treedef, new)
    return jtu.tree_map(lambda x, like: x.reshape(like.shape), new, old)


def _word(x: Scalar) -> Scalar:
    """A scalar in 32 bits."""
    if x.dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.int32)
    return x.astype(jnp.int32)


def _of_word(word: Any, dtype: Any) -> Any:
    if dtype == jnp.float32:
        return lax.bitcast_convert_type(word, jnp.float32)
    return word


def _traced_update(
    structure: StepStructure,
    view: "View",
    interpret: bool,
    scalars: StepScalars,
    grad: Float[Array, "..."],
    old: TileState,
) -> Callable[[StepScalars, Array, TileState], TileState]:
    """`update_tile` of one tile of such leaves. In a kernel, JAX would trace it anew
    for each kernel; here only for each sort of tile."""
    shape_of = lambda x, shape: jax.ShapeDtypeStruct(shape, x.dtype)
    tile = _map(
        lambda x: shape_of(x, view.tile_shape),
        lambda x: shape_of(x, view.group_tile_shape),
        (grad, old),
    )
    scalars = jtu.tree_map(lambda x: shape_of(x, x.shape), scalars)
    traced = _update_tile.trace(structure, view.axis, interpret, scalars, *tile)
    function = compat.as_function(traced.jaxpr)
    out_structure = jtu.tree_structure(traced.out_info)
    return lambda *args: jtu.tree_unflatten(
        out_structure, function(*jtu.tree_leaves(args))
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _update_tile(
    structure: StepStructure,
    axis: int,
    interpret: bool,
    scalars: StepScalars,
    grad: Float[Array, "*tile"],
    old: TileState,
) -> TileState:
    arithmetic = Arithmetic() if interpret else ARITHMETIC
    update = lambda scalars, *tile: update_tile(
        structure, scalars, axis, *tile, keep_unmoved=False
    )
    return arithmetic.evaluate(update, scalars, grad, old)


def _choose(index: Any, branches: Sequence[Callable[[], Any]], first: int = 0) -> Any:
    """The result of one of the branches, which is found by halves."""
    if len(branches) == 1:
        return branches[0]()
    middle = len(branches) // 2
    return lax.cond(
        index < first + middle,
        lambda: _choose(index, branches[:middle], first),
        lambda: _choose(index, branches[middle:], first + middle),
    )


#
# Views: a leaf as tiles
#


class Tile(NamedTuple):
    """One of a leaf."""

    index: Any
    # Triton does not know that it is.
    zero: Any


@dataclasses.dataclass(frozen=True)
class View(abc.ABC):
    """A leaf as a number of tiles, and where these are. Hashable, for `jit`."""

    # Where the groups of a tile run.
    axis: ClassVar[int] = -1
    # That share a tile of so many elements. With 16 of them for each thread, bytes are
    # loaded 16 at a time, and what all threads of a group compute is computed by few.
    # Programs of one warp do not wait for others.
    warps: ClassVar[int] = 1
    tile: ClassVar[int] = 512
    # That share a kernel. Triton's time to compile grows with their square.
    most_leaves: ClassVar[int] = 8

    @property
    @abc.abstractmethod
    def kind(self) -> tuple[Any, ...]:
        """What views must have in common for their tiles to be alike."""

    @property
    @abc.abstractmethod
    def tiles(self) -> int: ...

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of arrays with an entry for each element."""

    @property
    @abc.abstractmethod
    def group_shape(self) -> tuple[int, ...]: ...

    @property
    @abc.abstractmethod
    def tile_shape(self) -> tuple[int, ...]: ...

    @property
    @abc.abstractmethod
    def group_tile_shape(self) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def place(self, tile: Tile) -> "_Place":
        """Where the elements of a tile are."""

    @abc.abstractmethod
    def group_place(self, tile: Tile) -> "_Place": ...

    def see(self, operands: tuple[Array, TileState]) -> tuple[Array, TileState]:
        return _map(
            lambda x: x.reshape(self.shape),
            lambda x: x.reshape(self.group_shape),
            operands,
        )

    def load(self, operands: Any, tile: Tile) -> Any:
        return _map(self.place(tile).load, self.group_place(tile).load, operands)

    def store(self, refs: TileState, tile: Tile, values: TileState) -> None:
        _map(self.place(tile).store, self.group_place(tile).store, refs, values)


def _map(of_elements: Callable, of_groups: Callable, tree: Any, *others: Any) -> Any:
    """Over the arrays of a tile, with a function for those of each sort. The tree is a
    `TileState`, or a tuple of a gradient and one."""
    is_state = lambda x: isinstance(x, TileState)

    def one(x: Any, *others: Any) -> Any:
        if not is_state(x):
            return of_elements(x, *others)
        scales = [y.scales for y in (x, *others)]
        rest = [eqx.tree_at(lambda y: y.scales, y, {}) for y in (x, *others)]
        return eqx.tree_at(
            lambda y: y.scales,
            jtu.tree_map(of_elements, *rest),
            jtu.tree_map(of_groups, *scales),
        )

    return jtu.tree_map(one, tree, *others, is_leaf=is_state)


@dataclasses.dataclass(frozen=True)
class _Place:
    """A part of an array in memory, of which some may lie beyond its end."""

    at: tuple[Any, ...]
    mask: Any

    def load(self, ref: Any) -> Array:
        if self.mask is None:
            return plt.load(ref.at[self.at])
        return plt.load(ref.at[self.at], mask=self.mask, other=0)

    def store(self, ref: Any, value: Array) -> None:
        plt.store(ref.at[self.at], value, mask=self.mask)


def _below(x: Any, end: int) -> Any:
    """`x`, of which Triton then knows that it is small: it can add to a pointer in the
    instruction that loads, where that sum cannot overflow."""
    return x & (2 ** (end - 1).bit_length() - 1)


def _span(index: Any, length: int, total: int, offset: Any = 0) -> tuple[pl.Slice, Any]:
    """A slice of a number of elements, and which of them there are: `None` for all."""
    start = _below(index, pl.cdiv(total, length)) * length + offset
    if total % length == 0:
        return pl.ds(start, length), None
    return pl.ds(start, length), start + jnp.arange(length) < total


@dataclasses.dataclass(frozen=True)
class Lanes(View):
    """Groups of consecutive elements, one after the other."""

    groups: int
    group_size: int

    @property
    def kind(self) -> tuple[Any, ...]:
        return Lanes, self.group_size

    @property
    def _groups_of_tile(self) -> int:
        return max(1, self.tile // self.group_size)

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.groups, self._groups_of_tile)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.groups, self.group_size

    @property
    def group_shape(self) -> tuple[int, ...]:
        return (self.groups,)

    @property
    def tile_shape(self) -> tuple[int, ...]:
        return self._groups_of_tile, self.group_size

    @property
    def group_tile_shape(self) -> tuple[int, ...]:
        return (self._groups_of_tile,)

    def place(self, tile: Tile) -> _Place:
        groups, mask = _span(tile.index, self._groups_of_tile, self.groups)
        if mask is not None:
            mask = jnp.broadcast_to(mask[:, None], self.tile_shape)
        return _Place((groups, slice(None)), mask)

    def group_place(self, tile: Tile) -> _Place:
        groups, mask = _span(tile.index, self._groups_of_tile, self.groups)
        return _Place((groups,), mask)


@dataclasses.dataclass(frozen=True)
class Rows(View):
    """Groups of consecutive rows, in all columns of several matrices."""

    matrices: int
    group_size: int
    columns: int

    axis: ClassVar[int] = -2
    # Wide, for whole sectors of memory in each row.
    warps: ClassVar[int] = 4
    tile: ClassVar[int] = 4096
    # Columns of one thread, which loads so many in one instruction. With 4, it needs
    # more registers than it gains.
    neighbours: ClassVar[int] = 2

    @property
    def kind(self) -> tuple[Any, ...]:
        return Rows, self.group_size

    @property
    def tiles(self) -> int:
        return self.matrices * self._tiles_across

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrices, self.group_size, self.columns

    @property
    def group_shape(self) -> tuple[int, ...]:
        return self.matrices, self.columns

    @property
    def tile_shape(self) -> tuple[int, ...]:
        return self.group_size, self._columns_of_tile

    @property
    def group_tile_shape(self) -> tuple[int, ...]:
        return (self._columns_of_tile,)

    @property
    def _columns_of_tile(self) -> int:
        return max(self.neighbours, self.tile // self.group_size)

    @property
    def _tiles_across(self) -> int:
        return pl.cdiv(self.columns, self._columns_of_tile)

    def _where(self, tile: Tile) -> tuple[Any, Any, Any]:
        across = self._tiles_across
        # Triton gives a thread as many neighbours as it knows to be aligned.
        offset = self.neighbours * _below(tile.zero, 2)
        columns, mask = _span(
            tile.index % across, self._columns_of_tile, self.columns, offset
        )
        return _below(tile.index // across, self.matrices), columns, mask

    def place(self, tile: Tile) -> _Place:
        matrix, columns, mask = self._where(tile)
        if mask is not None:
            mask = jnp.broadcast_to(mask[None, :], self.tile_shape)
        return _Place((matrix, slice(None), columns), mask)

    def group_place(self, tile: Tile) -> _Place:
        matrix, columns, mask = self._where(tile)
        return _Place((matrix, columns), mask)


@dataclasses.dataclass(frozen=True)
class Elements(View):
    """A leaf without groups."""

    size: int

    # Small ones, mostly, with fewer arrays.
    most_leaves: ClassVar[int] = 16

    @property
    def kind(self) -> tuple[Any, ...]:
        return (Elements,)

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.size, self.tile)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def group_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def tile_shape(self) -> tuple[int, ...]:
        return (self.tile,)

    @property
    def group_tile_shape(self) -> tuple[int, ...]:
        return ()

    def place(self, tile: Tile) -> _Place:
        part, mask = _span(tile.index, self.tile, self.size)
        return _Place((part,), mask)

    def group_place(self, tile: Tile) -> _Place:
        return self.place(tile)
