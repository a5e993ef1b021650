"""The step of a chunk: 16 or 32 groups of 128 lanes, such that their scales are full
registers. It has three phases:

1. What elements need to know of their groups is computed from the scales, for all
   groups at once, and goes to VMEM. From there each group loads its row into all
   sublanes: loads do that for nothing, while the vector unit is what limits the kernel.
2. The step itself, group by group. New moments wait in VMEM as float32, beside the
   maxima of a group's registers.
3. The maxima over sublanes, by loads with a stride; the new scales, for all groups at
   once; and the codes, group by group.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from ..._storage.codec import AbstractMomentCodec, Dither, GroupConstants
from ..._tile.tile import advance, StepScalars, StepStructure, TileState
from ..interpreter import words
from ..interpreter.arithmetic import Arithmetic
from .block import Block, SUBLANES
from .scratch import Counts, Scratch


@dataclasses.dataclass(frozen=True)
class ChunkStep:
    """The step of each chunk of a block."""

    structure: StepStructure
    arithmetic: Arithmetic
    block: Block
    scalars: StepScalars
    dithers: dict[str, Dither]
    # What weights without a correction are rounded by. `None` if they are rounded to
    # nearest.
    threshold: Any
    # References to the block's part of each array.
    grad: Any
    old: TileState
    new: TileState
    # References to the arrays that `scratch_shapes` asks for.
    scratch: tuple[Any, Any, Any]
    # The number 0, which the compiler does not know to be 0.
    zero: Any

    def update(self, index: Any, carry: None) -> None:
        """The step of one chunk: the body of a loop over all of them."""
        del carry
        at = _ChunkSlice.of(self.block, index)
        scratch = Scratch(*self.scratch, self.zero, self.block)
        codecs, new_codecs = self.structure.codecs_before_and_after(self.scalars)
        factors = self.structure.factors(self.scalars)
        arithmetic, old, new = self.arithmetic, self.old, self.new

        decoding = {}
        for name, codec in codecs.items():
            scales = old.scales[name]
            scales = None if scales is None else scales[at.scales]
            constants = arithmetic.evaluate(
                _decode_constants, codec, scales, factors[name][0]
            )
            decoding[name] = scratch.put_constants(constants)

        update_group = None
        for group in range(self.block.groups):
            rows = _GroupSlice.of(at, group)
            operands = (
                self.scalars,
                self.threshold,
                {name: scratch.constants(x, group) for name, x in decoding.items()},
                self._load(rows, self.grad),
                self._load(rows, old.weight),
                None if old.correction is None else self._load(rows, old.correction),
                {name: self._load(rows, codes) for name, codes in old.codes.items()},
            )
            if update_group is None:
                static = {"structure": self.structure}
                update_group = arithmetic.trace(_update_group, *operands, static=static)
            weight, correction, prepared, maxima = update_group(*operands)
            self._store(rows, new.weight, weight)
            if new.correction is not None:
                self._store(rows, new.correction, correction)
            scratch.put_prepared(prepared, group)
            scratch.put_maxima(maxima, group)

        encoding, first = {}, 0
        for name, codec in new_codecs.items():
            statistics = []
            for reduction in Counts.of(self.structure.codec_of[name]).reductions:
                statistics.append(scratch.reduced(first, reduction))
                first += 1
            scales, constants = arithmetic.evaluate(
                _fit, codec, tuple(statistics), factors[name][1], self.dithers[name]
            )
            target = new.scales[name]
            if target is not None:
                target[at.scales] = scales
            encoding[name] = scratch.put_constants(constants)

        quantize = {}
        for group in range(self.block.groups):
            rows, first = _GroupSlice.of(at, group), 0
            for name, codec in codecs.items():
                count = Counts.of(self.structure.codec_of[name]).prepared
                operands = (
                    codec,
                    scratch.prepared(first, count, group),
                    scratch.constants(encoding[name], group),
                )
                if name not in quantize:
                    quantize[name] = arithmetic.trace(_quantize, *operands)
                self._store(rows, new.codes[name], quantize[name](*operands))
                first += count

    def _load(self, rows: "_GroupSlice", ref: Any) -> Any:
        if self.arithmetic.only_words:
            return words.load(ref, rows.start, rows.size, rows.lanes)
        return ref[0, pl.ds(rows.start, rows.size), rows.lanes]

    def _store(self, rows: "_GroupSlice", ref: Any, value: Any) -> None:
        if self.arithmetic.only_words:
            words.store(ref, rows.start, rows.size, rows.lanes, value)
        else:
            ref[0, pl.ds(rows.start, rows.size), rows.lanes] = value


@dataclasses.dataclass(frozen=True)
class _ChunkSlice:
    """A chunk in its block."""

    block: Block
    first_group: Any
    lanes: Any

    @staticmethod
    def of(block: Block, index: Any) -> "_ChunkSlice":
        high, wide = block.chunks
        j, k = (0, index) if high == 1 else (index // wide, index % wide)
        lanes = pl.ds(pl.multiple_of(k * block.lanes, block.lanes), block.lanes)
        return _ChunkSlice(block, j * block.groups, lanes)

    @property
    def scales(self) -> tuple[Any, Any, Any]:
        start = pl.multiple_of(self.first_group, self.block.groups)
        return 0, pl.ds(start, self.block.groups), self.lanes


@dataclasses.dataclass(frozen=True)
class _GroupSlice:
    """The elements of one group of each lane of a chunk."""

    first_group: Any
    group: int
    size: int
    lanes: Any

    @staticmethod
    def of(chunk: _ChunkSlice, group: int) -> "_GroupSlice":
        size = chunk.block.group_size
        return _GroupSlice(chunk.first_group, group, size, chunk.lanes)

    @property
    def start(self) -> Any:
        return pl.multiple_of((self.first_group + self.group) * self.size, self.size)


# The functions that are evaluated are traced once for all chunks of the same shape.


def _decode_constants(
    codec: AbstractMomentCodec, scales: Any, factor: Any
) -> GroupConstants:
    return codec.decode_constants(scales, factor, jnp.float32)


def _update_group(
    scalars: StepScalars,
    threshold: Any,
    constants: dict[str, GroupConstants],
    grad: Array,
    weight: Array,
    correction: Array | None,
    codes: dict[str, Array],
    structure: StepStructure,
) -> tuple[Array, Array | None, list[Array], list[Array]]:
    """A group of each lane: its new weights, its moments prepared for their codecs, and
    the maxima over its registers."""
    codecs = structure.codec_of
    moments = {
        name: codec.dequantize(codes[name], constants[name], jnp.float32)
        for name, codec in codecs.items()
    }
    weight, correction, moments = advance(
        structure,
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
        reduction(x.reshape(-1, SUBLANES, x.shape[-1]), axis=0)
        for codec, xs in zip(codecs.values(), prepared, strict=True)
        for reduction, x in codec.statistics(xs)
    ]
    return weight, correction, [x for xs in prepared for x in xs], maxima


def _fit(
    codec: AbstractMomentCodec,
    statistics: tuple[Array, ...],
    factor: Any,
    dither: Dither,
) -> tuple[Array | None, GroupConstants]:
    return codec.fit(statistics, factor, dither)


def _quantize(
    codec: AbstractMomentCodec,
    prepared: tuple[Array, ...],
    constants: GroupConstants,
) -> Array:
    return codec.quantize(prepared, constants)
