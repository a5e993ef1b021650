"""Pallas for TPUs: one kernel for each leaf.

A leaf is seen as matrices whose groups run along the rows: 32 rows of 128 lanes are one
tile of 8-bit integers, and four registers of float32. A grid of blocks covers the
matrices; the pipeline brings a block into VMEM while the one before it is computed.
Inside of a block, a loop takes a *chunk* at a time: 16 or 32 groups of 128 lanes,
such that their scales are full registers. A chunk has three phases:

1. What its elements need to know of their groups is computed from the scales, for all
   of them at once, and goes to VMEM. From there it comes back with one group's row in
   all sublanes: loads can do that for nothing, while the vector unit is what is scarce.
2. The step itself, group by group. New moments wait in VMEM as float32, beside the
   maxima of a group's registers.
3. The maxima over sublanes, by loads with a stride; the new scales, for all groups at
   once; and the codes, group by group.
"""

import dataclasses
import functools
import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from ..._storage.codec import AbstractMomentCodec, Dither, GroupConstants, Reduction
from ..._storage.layout import Layout
from ..._tile.tile import advance, no_update, StepScalars, StepStructure, TileState
from .. import words
from ..kernel_arithmetic import Arithmetic
from ..scalars import pack
from .arithmetic import arithmetic_of
from .layout import transposed


_LANES = 128
_SUBLANES = 8


@partial(jax.jit, static_argnums=(0, 1), static_argnames="interpret")
def update_leaf(
    structure: StepStructure,
    layout: Layout,
    scalars: StepScalars,
    grad: Float[Array, "*shape"],
    old: TileState,
    interpret: bool = False,
) -> TileState:
    """One step of one leaf that this backend `supports`."""
    if layout.axis == -1:
        # In memory it lies like that. What goes to the kernel lies with rows first.
        swap = partial(jtu.tree_map, lambda x: jnp.swapaxes(x, -1, -2))
        layout, grad, old = transposed(layout), swap(grad), swap(old)
        new = update_leaf(structure, layout, scalars, grad, old, interpret=interpret)
        return swap(new)
    *leading, rows, columns = layout.shape
    matrices = lambda x: x.reshape(math.prod(leading), *x.shape[-2:])
    grad, old = jtu.tree_map(matrices, (grad, old))
    chip = _Chip.current()
    block = _block(structure, layout, chip, grad, old)
    arithmetic = chip.arithmetic.exact if interpret else chip.arithmetic
    kernel = _Kernel(structure, layout.group_size, block, arithmetic)

    of_elements = pl.BlockSpec((1, *block), lambda i, j, k: (i, j, k))
    of_groups = pl.BlockSpec(
        (1, block[0] // layout.group_size, block[1]), lambda i, j, k: (i, j, k)
    )
    specs = eqx.tree_at(
        lambda tile: tile.scales,
        jtu.tree_map(lambda _: of_elements, old),
        jtu.tree_map(lambda _: of_groups, old.scales),
    )
    in_scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    threshold = scalars.weight_threshold if structure.dither_weights else None
    *packed, unpack = pack((scalars, scalars.dither, threshold))
    state, treedef = jtu.tree_flatten(old)
    state_specs = jtu.tree_leaves(specs)
    new = pl.pallas_call(
        lambda *refs: kernel.run(unpack, treedef, *refs),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state],
        grid=(math.prod(leading), *map(pl.cdiv, (rows, columns), block)),
        in_specs=[*(in_scalars for _ in packed), of_elements, *state_specs],
        out_specs=state_specs,
        scratch_shapes=kernel.scratch_shapes,
        input_output_aliases={len(packed) + 1 + i: i for i in range(len(state))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"),
            vmem_limit_bytes=chip.vmem_limit,
            # All accesses are inside of blocks, and the pipeline cuts off blocks at the
            # edges. The checks take some hundred instructions for each block.
            disable_bounds_checks=True,
        ),
        # For XLA, that does other work beside. Operations are about 50 for an element.
        cost_estimate=pl.CostEstimate(
            flops=50 * grad.size,
            transcendentals=4 * grad.size,
            bytes_accessed=_bytes(grad) + 2 * _bytes(old),
        ),
        interpret=interpret,
        name=f"flashquinox_{type(structure.rule).__name__.lower()}",
    )(*packed, grad, *state)
    new = jtu.tree_unflatten(treedef, new)
    back = lambda x: x.reshape(*leading, *x.shape[-2:])
    return jtu.tree_map(back, new)


@dataclasses.dataclass(frozen=True)
class _Chip:
    """What the kernel depends on. Where the generation is not known, as when a program
    is compiled on another machine and no abstract mesh tells, what works on all."""

    arithmetic: Arithmetic
    vmem_limit: int
    # Of the blocks of all operands, each in two buffers.
    block_bytes: int

    @staticmethod
    def current() -> "_Chip":
        try:
            info = pltpu.get_tpu_info()
        except ValueError:
            return _Chip(arithmetic_of(None), 16 * 2**20, 10 * 2**20)
        capacity = info.vmem_capacity_bytes
        # The rest is XLA's, and for the compiler's own use.
        limit = capacity if capacity <= 16 * 2**20 else capacity * 3 // 4
        return _Chip(arithmetic_of(info.generation), limit, limit * 5 // 8)


def _block(
    structure: StepStructure, layout: Layout, chip: _Chip, grad: Array, old: TileState
) -> tuple[int, int]:
    """The rows and columns of a block: whole chunks, as many as there is room for."""
    *leading, rows, columns = layout.shape
    state = (old.weight, old.correction, old.codes)
    element = grad.dtype.itemsize + 2 * sum(
        x.dtype.itemsize for x in jtu.tree_leaves(state)
    )
    # Two buffers, and an eighth more for scales and scratch.
    room = chip.block_bytes // (2 * element * 9 // 8)
    chunk = min(rows, _groups(structure) * layout.group_size)
    lanes = _LANES if columns > _LANES else columns
    chunks = pl.cdiv(rows, chunk), pl.cdiv(columns, lanes)
    room = room // (chunk * lanes)
    wide, high = 1, 1
    # Loads with a stride, as of words, are from arrays of no more lanes.
    if not chip.arithmetic.only_words:
        wide = _evenly(math.prod(leading) * chunks[0], chunks[1], room)
    if wide == chunks[1] or chip.arithmetic.only_words:
        times = math.prod(leading) * chunks[1] // wide
        high = _evenly(times, chunks[0], room // wide, wide)
    return high * chunk, wide * lanes


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(tree))


def _groups(structure: StepStructure) -> int:
    """Of a chunk. Many, for the ends of its phases to matter little; not so many that
    the compiler loses sight (found by looking at schedules)."""
    return 32 if len(structure.codecs) <= 1 else 16


def _evenly(times: int, count: int, most: int, size: int = 1) -> int:
    """How many chunks of a size to take at a time, of `times` times `count`: so that
    the last turn is nearly full, that there are few turns, and that the first and the
    last, which nothing is done beside, are short.
    """
    # In chunks: what a step of the grid costs, and what each chunk of the first and the
    # last does, of which one reads and one writes.
    turn, edge = 0.5, 0.9
    cost = lambda n: times * pl.cdiv(count, n) * (n * size + turn) + n * size * edge
    return min(range(1, max(1, min(count, most)) + 1), key=cost)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    structure: StepStructure
    group_size: int
    block: tuple[int, int]
    arithmetic: Arithmetic

    @property
    def groups(self) -> int:
        """The groups of a chunk."""
        return min(_groups(self.structure), self.block[0] // self.group_size)

    @property
    def lanes(self) -> int:
        return min(_LANES, self.block[1])

    @property
    def scratch_shapes(self) -> list[Any]:
        groups, size, lanes = self.groups, self.group_size, self.lanes
        counts = [_Counts.of(codec) for codec in self.structure.codecs]
        constants = sum(count.constants for count in counts)
        statistics = sum(count.statistics for count in counts)
        prepared = sum(count.prepared for count in counts)
        # At least one of each: there are no empty arrays.
        return [
            pltpu.VMEM((max(1, constants), groups, lanes), jnp.int32),
            pltpu.VMEM((max(1, statistics), groups * _SUBLANES, lanes), jnp.float32),
            pltpu.VMEM((max(1, prepared), groups * size, lanes), jnp.float32),
        ]

    def run(self, unpack, treedef, floats, integers, grad, *refs) -> None:
        *state, constants, maxima, prepared = refs
        old, new = (
            jtu.tree_unflatten(treedef, x)
            for x in (state[: len(state) // 2], state[len(state) // 2 :])
        )
        scalars, dither, threshold = unpack(lambda i: floats[i], lambda i: integers[i])
        zero = integers[0]

        def step() -> None:
            high = self.block[0] // (self.groups * self.group_size)
            wide = self.block[1] // self.lanes

            def chunk(index, carry):
                j, k = (0, index) if high == 1 else (index // wide, index % wide)
                lanes = pl.ds(pl.multiple_of(k * self.lanes, self.lanes), self.lanes)
                at = _Place(j * self.groups, lanes, self.groups, self.group_size)
                kept = _Scratch(constants, maxima, prepared, zero)
                self._chunk(scalars, dither, threshold, grad, old, new, at, kept)
                return carry

            lax.fori_loop(0, high * wide, chunk, None)

        def stay() -> None:
            for source, target in zip(
                jtu.tree_leaves(old), jtu.tree_leaves(new), strict=True
            ):
                target[...] = source[...]
            if self.structure.as_update:
                new.weight[...] = no_update(old.weight[...])

        if scalars.take is None:
            step()
        else:
            pl.when(scalars.take)(step)
            pl.when(jnp.logical_not(scalars.take))(stay)

    def _chunk(
        self,
        scalars: StepScalars,
        dither: Dither,
        threshold: Any,
        grad: Any,
        old: TileState,
        new: TileState,
        at: "_Place",
        scratch: "_Scratch",
    ) -> None:
        evaluate = self.arithmetic.evaluate
        codecs, new_codecs = self.structure.codecs_before_and_after(scalars)
        factors = self.structure.factors(scalars)

        dequantizers = {}
        for name, codec in codecs.items():
            scales = old.scales[name]
            dequantizer = lambda codec, scales, factor: codec.decode_constants(
                scales, factor, jnp.float32
            )
            dequantizers[name] = scratch.put_constants(
                evaluate(
                    dequantizer,
                    codec,
                    None if scales is None else scales[at.groups],
                    factors[name][0],
                )
            )

        for group in range(self.groups):
            of_group = {
                name: scratch.constants(kept, group, self.group_size)
                for name, kept in dequantizers.items()
            }
            load = partial(self._load, at, group)
            store = partial(self._store, at, group)
            weight, correction, prepared, maxima = evaluate(
                self._elements,
                scalars,
                threshold,
                load(grad),
                load(old.weight),
                None if old.correction is None else load(old.correction),
                {name: load(codes) for name, codes in old.codes.items()},
                of_group,
            )
            store(new.weight, weight)
            if new.correction is not None:
                store(new.correction, correction)
            scratch.put_prepared(prepared, group, self.group_size)
            scratch.put_maxima(maxima, group, self.groups)

        quantizers = {}
        first = 0
        for name, codec in new_codecs.items():
            reductions = _reductions(codec)
            statistics = tuple(
                scratch.reduced(first + i, reduction, self.groups)
                for i, reduction in enumerate(reductions)
            )
            first += len(reductions)
            fit = lambda codec, *args: codec.fit(*args)
            scales, quantizer = evaluate(
                fit, codec, statistics, factors[name][1], dither
            )
            target = new.scales[name]
            if target is not None:
                target[at.groups] = scales
            quantizers[name] = scratch.put_constants(quantizer)

        for group in range(self.groups):
            first = 0
            for name, codec in codecs.items():
                count = _Counts.of(self.structure.codec_of[name]).prepared
                codes = evaluate(
                    codec.quantize,
                    scratch.prepared(first, count, group, self.group_size),
                    scratch.constants(quantizers[name], group, self.group_size),
                )
                self._store(at, group, new.codes[name], codes)
                first += count

    def _load(self, at: "_Place", group: int, ref: Any) -> Any:
        if self.arithmetic.only_words:
            return words.load(ref, at.start(group), self.group_size, at.lanes)
        return ref[at.elements(group)]

    def _store(self, at: "_Place", group: int, ref: Any, value: Any) -> None:
        if self.arithmetic.only_words:
            words.store(ref, at.start(group), self.group_size, at.lanes, value)
        else:
            ref[at.elements(group)] = value

    def _elements(
        self, scalars, threshold, grad, weight, correction, codes, dequantizers
    ):
        """A group: its new weights, its moments prepared for their codecs, and the
        maxima over its registers."""
        codecs = self.structure.codec_of
        moments = {
            name: codec.dequantize(codes[name], dequantizers[name], jnp.float32)
            for name, codec in codecs.items()
        }
        weight, correction, moments = advance(
            self.structure,
            scalars,
            threshold,
            grad,
            weight,
            correction,
            moments,
            # TPUs have no subnormals to keep, and the sign of zero is not worth it.
            keep_unmoved=False,
        )
        prepared = [codec.prepare(moments[name]) for name, codec in codecs.items()]
        maxima = [
            reduction(x.reshape(-1, _SUBLANES, x.shape[-1]), axis=0)
            for codec, xs in zip(codecs.values(), prepared, strict=True)
            for reduction, x in codec.statistics(xs)
        ]
        return weight, correction, [x for xs in prepared for x in xs], maxima


def _reductions(codec: AbstractMomentCodec) -> list[Reduction]:
    prepared = codec.prepare(jnp.zeros((1, 1)))
    return [reduction for reduction, _ in codec.statistics(prepared)]


@dataclasses.dataclass(frozen=True)
class _Counts:
    """How many arrays a codec has of each sort."""

    prepared: int
    statistics: int
    # At most: scalars among them are not kept.
    constants: int

    @staticmethod
    @functools.cache
    def of(codec: AbstractMomentCodec) -> "_Counts":
        moment = jnp.zeros((1, 1))
        one = jnp.ones(())
        dither = Dither(one, jnp.zeros((), jnp.uint32))
        prepared = codec.prepare(moment)
        statistics = tuple(
            reduction(x, axis=0) for reduction, x in codec.statistics(prepared)
        )
        scales, quantizer = codec.fit(statistics, one, dither)
        dequantizer = codec.decode_constants(scales, one, jnp.float32)
        constants = len(quantizer) + len(dequantizer)
        return _Counts(len(prepared), len(statistics), constants)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a chunk is in its block."""

    first_group: Any
    lanes: Any
    count: int
    group_size: int

    @property
    def groups(self) -> tuple[Any, Any, Any]:
        start = pl.multiple_of(self.first_group, self.count)
        return 0, pl.ds(start, self.count), self.lanes

    def start(self, group: int) -> Any:
        start = (self.first_group + group) * self.group_size
        return pl.multiple_of(start, self.group_size)

    def elements(self, group: int) -> tuple[Any, Any, Any]:
        return 0, pl.ds(self.start(group), self.group_size), self.lanes


class _Scratch:
    """What a chunk keeps in VMEM between its phases."""

    def __init__(self, constants: Any, maxima: Any, prepared: Any, zero: Any):
        self._constants = constants
        self._maxima = maxima
        self._prepared = prepared
        # That this is 0 the compiler does not know: it must not keep in registers what
        # is written to VMEM because there are too few.
        self._zero = zero
        self._used = 0

    def put_constants(self, constants: GroupConstants) -> tuple[Any, ...]:
        """Keeps what belongs to groups, one row for each."""
        return tuple(self._put_constant(x) for x in constants)

    def _put_constant(self, x: Shaped[Array, "..."]) -> Any:
        if x.ndim == 0:
            return x
        row, self._used = self._used, self._used + 1
        self._constants[row, :, :] = lax.bitcast_convert_type(x, jnp.int32)
        return row, x.dtype

    def constants(self, kept: tuple[Any, ...], group: int, size: int) -> GroupConstants:
        """What is kept of a group, in all of its rows."""
        return tuple(self._constant(x, group, size) for x in kept)

    def _constant(self, kept: Any, group: int, size: int) -> Array:
        if not isinstance(kept, tuple):
            return kept
        row, dtype = kept
        x = self._constants[row, pl.ds(group, 1), :]
        return lax.bitcast_convert_type(jnp.broadcast_to(x, (size, x.shape[1])), dtype)

    def put_prepared(self, arrays: list[Array], group: int, size: int) -> None:
        for i, x in enumerate(arrays):
            self._prepared[i, pl.ds(group * size, size), :] = x

    def prepared(
        self, first: int, count: int, group: int, size: int
    ) -> tuple[Array, ...]:
        rows = pl.ds(group * size, size)
        return tuple(
            self._prepared[self._zero + first + i, rows, :] for i in range(count)
        )

    def put_maxima(self, maxima: list[Array], group: int, groups: int) -> None:
        # The same sublane of all groups together: stores can do this for nothing.
        rows = pl.ds(group, _SUBLANES, stride=groups)
        for i, x in enumerate(maxima):
            self._maxima[pl.ds(i, 1), rows, :] = x[None]

    def reduced(self, index: int, reduction: Reduction, groups: int) -> Array:
        """The maxima (or minima) of all groups."""
        x = self._maxima[index]
        return reduction(x.reshape(_SUBLANES, groups, x.shape[-1]), axis=0)
