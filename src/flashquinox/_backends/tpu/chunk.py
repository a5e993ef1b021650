"""The step of a chunk, in three phases:

1. What elements need to know of their groups is computed from the scales, for all
   groups at once, and goes to VMEM. Where a piece is a group, it loads its row into all
   sublanes: loads do that for nothing, while the vector unit is what limits the kernel.
2. The step itself, piece by piece. New moments wait in VMEM as float32, beside the
   maxima of a piece's registers.
3. The maxima of groups (over sublanes, by loads with a stride); the new scales, for all
   groups at once; and the codes, piece by piece.
"""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ..._storage.codec import AbstractMomentCodec, Dither, GroupConstants
from ..._tile.step import StepScalars, StepStructure, TileState
from ..._tile.tile import advance
from ..interpreter import words
from ..interpreter.arithmetic import Arithmetic
from .block import AbstractBlock, AbstractChunk
from .reorder import NarrowRef
from .scratch import Counts, Scratch


@dataclasses.dataclass(frozen=True)
class ChunkStep:
    """The step of each chunk of a block."""

    structure: StepStructure
    arithmetic: Arithmetic
    block: AbstractBlock
    # Where in the grid it is.
    block_index: tuple[Any, ...]
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

    @staticmethod
    def of(
        structure: StepStructure, scalars: StepScalars, **fields: Any
    ) -> "ChunkStep":
        """With what follows from the scalars: computed here, and not in each turn of a
        loop."""
        return ChunkStep(
            structure=structure,
            scalars=scalars,
            dithers=scalars.dithers(structure),
            threshold=scalars.weight_threshold if structure.dither_weights else None,
            **fields,
        )

    def update(self, index: Any, carry: None) -> None:
        """The step of one chunk: the body of a loop over all of them."""
        del carry
        at = self.block.at(index, self.block_index)
        scratch = Scratch(*self.scratch, self.zero, self.block)
        codecs, new_codecs = self.structure.codecs_before_and_after(self.scalars)
        factors = self.structure.factors(self.scalars)
        arithmetic, old, new = self.arithmetic, self.old, self.new

        decoding = {}
        for name, codec in codecs.items():
            scales = old.scales[name]
            if scales is not None:
                scales = scales[at.scales].reshape(self.block.chunk_scales)
            constants = arithmetic.evaluate(
                _decode_constants, codec, scales, factors[name][0]
            )
            decoding[name] = scratch.put_constants(constants)

        reductions = [
            reduction
            for codec in self.structure.codecs
            for reduction in Counts.of(codec).reductions
        ]
        # Of pieces that are whole, and of those that may not be.
        update_piece: dict[bool, Any] = {}
        for piece in range(self.block.pieces):
            present = at.present(piece)
            operands = (
                self.scalars,
                self.threshold,
                {name: scratch.constants(x, piece) for name, x in decoding.items()},
                present,
                self._load(at, piece, self.grad),
                None if old.weight is None else self._load(at, piece, old.weight),
                None
                if old.correction is None
                else self._load(at, piece, old.correction),
                {
                    name: self._load(at, piece, codes)
                    for name, codes in old.codes.items()
                },
            )
            whole = present is None
            if whole not in update_piece:
                static = {"structure": self.structure}
                update_piece[whole] = arithmetic.trace(
                    _update_piece, *operands, static=static
                )
            weight, correction, prepared, statistics = update_piece[whole](*operands)
            if new.weight is not None:
                self._store(at, piece, new.weight, weight)
            if new.correction is not None:
                self._store(at, piece, new.correction, correction)
            scratch.put_prepared(prepared, piece)
            scratch.put_statistics(statistics, reductions, piece)

        encoding, extremes = {}, iter(scratch.extremes(reductions))
        for name, codec in new_codecs.items():
            count = len(Counts.of(self.structure.codec_of[name]).reductions)
            statistics = tuple(itertools.islice(extremes, count))
            scales, constants = arithmetic.evaluate(
                _fit, codec, statistics, factors[name][1], self.dithers[name]
            )
            target = new.scales[name]
            if target is not None:
                _store(target, at.scales, scales)
            encoding[name] = scratch.put_constants(constants)

        quantize = {}
        for piece in range(self.block.pieces):
            first = 0
            for name, codec in codecs.items():
                count = Counts.of(self.structure.codec_of[name]).prepared
                operands = (
                    codec,
                    scratch.prepared(first, count, piece),
                    scratch.constants(encoding[name], piece),
                )
                if name not in quantize:
                    quantize[name] = arithmetic.trace(_quantize, *operands)
                codes = quantize[name](*operands)
                self._store(at, piece, new.codes[name], codes)
                first += count

    def _load(self, at: AbstractChunk, piece: int, ref: Any) -> Any:
        index = at.elements(piece)
        if self.arithmetic.only_words:
            is_copy = isinstance(ref, NarrowRef)
            return ref.load_words(index) if is_copy else words.load(ref, index)
        return ref[index].reshape(self.block.piece)

    def _store(self, at: AbstractChunk, piece: int, ref: Any, value: Any) -> None:
        index = at.elements(piece)
        if self.arithmetic.only_words:
            is_copy = isinstance(ref, NarrowRef)
            store = ref.store_words if is_copy else partial(words.store, ref)
            store(index, value)
        else:
            _store(ref, index, value)


def _store(ref: Any, index: Any, value: Array) -> None:
    ref[index] = value.reshape(ref.at[index].shape)


# The functions that are evaluated are traced once for all chunks of the same shape.


def _decode_constants(
    codec: AbstractMomentCodec, scales: Any, factor: Any
) -> GroupConstants:
    return codec.decode_constants(scales, factor, jnp.float32)


def _update_piece(
    scalars: StepScalars,
    threshold: Any,
    constants: dict[str, GroupConstants],
    present: Array | None,
    grad: Array,
    weight: Array | None,
    correction: Array | None,
    codes: dict[str, Array],
    structure: StepStructure,
) -> tuple[Array | None, Array | None, list[Array], list[Array]]:
    """A piece: its new weights, its moments prepared for their codecs, and their
    statistics, in which elements that are not present count for nothing."""
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
    statistics = []
    for codec, xs in zip(codecs.values(), prepared, strict=True):
        for reduction, x in codec.statistics(xs):
            if present is not None:
                nothing = -jnp.inf if reduction is jnp.max else jnp.inf
                x = jnp.where(present, x, jnp.float32(nothing))
            statistics.append(x)
    return weight, correction, [x for xs in prepared for x in xs], statistics


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
