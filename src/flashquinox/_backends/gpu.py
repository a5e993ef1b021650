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
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32

from .._body import StepScalars, StepStructure, TileState, update_tile
from .._codec import Dither
from .._layout import Layout
from ._kernel_arithmetic import Arithmetic
from ._scalars import pack


_TILE = 2048


def view_of(layout: Layout, grad: Array, old: TileState) -> "View | None":
    """How the kernel sees a leaf. `None` if it cannot take it: then plain XLA does."""
    dtypes = {jnp.dtype(x.dtype) for x in jtu.tree_leaves((old, grad))}
    size, group = old.weight.size, layout.group_size
    # Triton computes addresses with 32 bits.
    if jnp.dtype(jnp.float64) in dtypes or size >= 2**31:
        return None
    if not jtu.tree_leaves(old.scales):
        return Elements(size)
    if group & (group - 1) != 0:
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
    dithers: tuple[Dither, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
    interpret: bool = False,
) -> tuple[TileState, ...]:
    """One step of leaves that are stored alike, and of which this backend has views."""
    tiles = np.cumsum([0, *(view.tiles for view in views)])
    floats, integers, unpack = pack(scalars)
    dither = jtu.tree_map(lambda *xs: jnp.stack(xs), *dithers)
    arguments = (floats, integers, dither.code, dither.scale.astype(jnp.int32))
    operands = tuple(
        view.see(x) for view, x in zip(views, zip(grads, old, strict=True), strict=True)
    )
    arrays, treedef = jtu.tree_flatten(operands)
    # Where the arrays of the state are among all.
    numbers = jtu.tree_unflatten(treedef, range(len(arrays)))
    state_numbers, state_treedef = jtu.tree_flatten(tuple(x for _, x in numbers))

    def kernel(floats, integers, codes, scales, *refs):
        inputs = jtu.tree_unflatten(treedef, refs[: len(arrays)])
        outputs = jtu.tree_unflatten(state_treedef, refs[len(arrays) :])
        program = pl.program_id(0)
        leaf = sum((program >= start).astype(jnp.int32) for start in tiles[1:-1])

        def of_leaf(function: Callable[[int, Any], Any]) -> Any:
            branches = [
                partial(lambda i: function(i, program - int(tiles[i])), i)
                for i in range(len(views))
            ]
            return _choose(leaf, branches)

        grad, tile = of_leaf(lambda i, tile: views[i].load(inputs[i], tile))
        here = eqx.tree_at(
            lambda x: x.dither,
            unpack(lambda i: floats[i], lambda i: integers[i]),
            Dither(codes[leaf], scales[leaf]),
        )
        update = lambda *args: update_tile(structure, args[0], views[0].axis, *args[1:])
        arithmetic = Arithmetic() if interpret else _arithmetic
        new = arithmetic.evaluate(update, here, grad, tile)
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


def _instruction(name: str) -> Callable[..., Array]:
    """One of PTX, on float32 arrays of one shape."""

    def apply(*args: Float32[Array, "..."]) -> Float32[Array, "..."]:
        operands = ", ".join(f"${i}" for i in range(len(args) + 1))
        (result,) = plt.elementwise_inline_asm(
            f"{name} {operands};",
            args=args,
            constraints=",".join(["=f", *("f" for _ in args)]),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
        )
        return result

    return apply


_arithmetic = Arithmetic(
    # Their relative errors are at most 2^-22, and 2^-23 (PTX ISA, "div" and "sqrt").
    divide=_instruction("div.approx.ftz.f32"),
    square_root=_instruction("sqrt.approx.ftz.f32"),
    # Triton has no operation for it.
    round=_instruction("cvt.rni.f32.f32"),
)


#
# Views: a leaf as tiles
#


@dataclasses.dataclass(frozen=True)
class View(abc.ABC):
    """A leaf as a number of tiles, and where these are. Hashable, for `jit`."""

    # Where the groups of a tile run.
    axis: ClassVar[int] = -1
    # That share a tile. With 16 elements for each thread, bytes are loaded 16 at a
    # time, and what all threads of a group compute is computed by few.
    warps: ClassVar[int] = 4
    # That share a kernel. Triton's time to compile grows with their square.
    most_leaves: ClassVar[int] = 4

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

    @abc.abstractmethod
    def place(self, tile: Any) -> "_Place":
        """Where the elements of a tile are."""

    @abc.abstractmethod
    def group_place(self, tile: Any) -> "_Place": ...

    def see(self, operands: tuple[Array, TileState]) -> tuple[Array, TileState]:
        return _map(
            lambda x: x.reshape(self.shape),
            lambda x: x.reshape(self.group_shape),
            operands,
        )

    def load(self, operands: Any, tile: Any) -> Any:
        return _map(self.place(tile).load, self.group_place(tile).load, operands)

    def store(self, refs: TileState, tile: Any, values: TileState) -> None:
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


def _span(tile: Any, length: int, total: int) -> tuple[Any, Any]:
    """A slice of a number of elements, and which of them there are: `None` for all."""
    start = tile * length
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
        return _TILE // self.group_size

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.groups, self._groups_of_tile)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.groups, self.group_size

    @property
    def group_shape(self) -> tuple[int, ...]:
        return (self.groups,)

    def place(self, tile: Any) -> _Place:
        groups, mask = _span(tile, self._groups_of_tile, self.groups)
        if mask is not None:
            mask = jnp.broadcast_to(
                mask[:, None], (self._groups_of_tile, self.group_size)
            )
        return _Place((groups, slice(None)), mask)

    def group_place(self, tile: Any) -> _Place:
        groups, mask = _span(tile, self._groups_of_tile, self.groups)
        return _Place((groups,), mask)


@dataclasses.dataclass(frozen=True)
class Rows(View):
    """Groups of consecutive rows, in all columns of several matrices."""

    matrices: int
    group_size: int
    columns: int

    axis: ClassVar[int] = -2
    # Threads that share a group reduce it column by column: the fewer, the better.
    warps: ClassVar[int] = 1

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
    def _columns_of_tile(self) -> int:
        return _TILE // self.group_size

    @property
    def _tiles_across(self) -> int:
        return pl.cdiv(self.columns, self._columns_of_tile)

    def _where(self, tile: Any) -> tuple[Any, Any, Any]:
        across = self._tiles_across
        columns, mask = _span(tile % across, self._columns_of_tile, self.columns)
        return tile // across, columns, mask

    def place(self, tile: Any) -> _Place:
        matrix, columns, mask = self._where(tile)
        if mask is not None:
            shape = self.group_size, self._columns_of_tile
            mask = jnp.broadcast_to(mask[None, :], shape)
        return _Place((matrix, slice(None), columns), mask)

    def group_place(self, tile: Any) -> _Place:
        matrix, columns, mask = self._where(tile)
        return _Place((matrix, columns), mask)


@dataclasses.dataclass(frozen=True)
class Elements(View):
    """A leaf without groups."""

    size: int

    # Small ones, mostly, with fewer arrays.
    most_leaves: ClassVar[int] = 8

    @property
    def kind(self) -> tuple[Any, ...]:
        return (Elements,)

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.size, _TILE)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def group_shape(self) -> tuple[int, ...]:
        return ()

    def place(self, tile: Any) -> _Place:
        part, mask = _span(tile, _TILE, self.size)
        return _Place((part,), mask)

    def group_place(self, tile: Any) -> _Place:
        return self.place(tile)
