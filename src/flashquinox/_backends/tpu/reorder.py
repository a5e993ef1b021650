"""Copies in VMEM between blocks whose axes are in different orders."""

import dataclasses
import itertools
import math
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from ..._storage.tpu_memory import Axes, LANES, SUBLANES
from ..interpreter import words
from ..interpreter.words import Words
from .block import unravel


# Copies of so many single rows are written out one after the other, as only whole words
# can be read anywhere.
_FEW = 8


def widened(dtype: DTypeLike) -> Any:
    """The dtype of 32 bits that holds its numbers. Of those, a single row can be read
    and written anywhere."""
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32


@dataclasses.dataclass(frozen=True)
class Reorder:
    """Between an array with its axes in their `own` order, of any dtype, and one of 32
    bits with the same axes in the order `other`. Axes have numbers; `lengths` are those
    by number, of what is copied.

    A *slab* is copied at a time: the columns of both arrays, transposed, or where these
    are the same axis, they and the rows of one of the arrays.
    """

    own: Axes
    other: Axes
    lengths: tuple[int, ...]
    itemsize: int

    @property
    def needs_words(self) -> bool:
        """Whether it would copy single rows that share words with many others. Then the
        array has to be widened first, in its own order."""
        rows = self.own[-2]
        is_single = rows not in self._slab[0] and self.lengths[rows] > _FEW
        return is_single and self.itemsize < 4

    @property
    def is_possible(self) -> bool:
        """Only of arrays of 128 lanes or fewer, single rows can be read and written
        whose number the compiler does not know."""
        return all(
            [
                self.lengths[order[-1]] <= LANES
                for order in (self.own, self.other)
                if order[-2] not in (*self._slab[0], *self._written_out)
                and self.lengths[order[-2]] > 1
            ]
        )

    @property
    def _written_out(self) -> list[int]:
        """The axes of rows that are copied one after the other in the program: of words
        that they share with others, or fewer than a register has."""
        axes = [self.own[-2], self.other[-2]]
        few = [axis for axis in axes if self.lengths[axis] < SUBLANES]
        narrow = axes[:1] if self.itemsize < 4 else []
        return [axis for axis in {*few, *narrow} if axis not in self._slab[0]]

    def copy(self, own: Any, other: Any, back: bool = False) -> None:
        """From a reference to the first array to one to the second, or back."""
        slab, other_slab = self._slab
        pieces = {axis: _piece(self.lengths[axis]) for axis in slab}
        axes = range(len(self.lengths))
        counts = [self.lengths[axis] // pieces.get(axis, 1) for axis in axes]
        written_out = [1 for _ in axes]
        for axis in self._written_out:
            counts[axis], written_out[axis] = 1, self.lengths[axis]

        def copy_slab(number: Any, carry: None) -> None:
            del carry
            turn = unravel(number, tuple(counts))
            for offset in itertools.product(*map(range, written_out)):
                at = [
                    _part(turn[i], pieces[i]) if i in slab else turn[i] + offset[i]
                    for i in axes
                ]
                here = tuple([at[i] for i in self.own])
                there = tuple([at[i] for i in self.other])
                source, target = (other[there], own) if back else (own[here], other)
                x = source.astype(widened(source.dtype))
                x = x if slab == other_slab else x.T
                target[here if back else there] = x.astype(target.dtype)

        lax.fori_loop(0, math.prod(counts), copy_slab, None)

    @property
    def _slab(self) -> tuple[Axes, Axes]:
        """Its axes, in the order of each of the arrays."""
        (*_, own_rows, own_columns), (*_, rows, columns) = self.own, self.other
        if own_columns != columns:
            return (columns, own_columns), (own_columns, columns)
        if self.itemsize < 4 and self.lengths[own_rows] > _FEW:
            rows = own_rows
        return (rows, columns), (rows, columns)


def _piece(length: int) -> int:
    """How much of an axis of a slab is copied at a time."""
    return length if length <= LANES else math.gcd(length, LANES)


def _part(index: Any, size: int) -> Any:
    if isinstance(index, int):
        return pl.ds(index * size, size)
    return pl.ds(pl.multiple_of(index * size, size), size)


@dataclasses.dataclass(frozen=True)
class NarrowRef:
    """A reference to an array of 32 bits, as one to an array of another dtype."""

    ref: Any
    dtype: Any

    def __getitem__(self, index: Any) -> Any:
        return self.ref[index].astype(self.dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.ref[index] = value.astype(self.ref.dtype)

    @property
    def at(self) -> Any:
        return self.ref.at

    def load_words(self, index: tuple[Any, ...]) -> Any:
        """As `words.load`."""
        x = words.load(self.ref, index)
        unused = 32 - 8 * jnp.dtype(self.dtype).itemsize
        if unused == 0:
            return x
        is_floating = jnp.issubdtype(self.dtype, jnp.floating)
        bits = lax.bitcast_convert_type(x, jnp.int32)
        return Words.of_bits(bits, unused if is_floating else 0, self.dtype)

    def store_words(self, index: tuple[Any, ...], value: Any) -> None:
        """As `words.store`."""
        wide = value.widen() if isinstance(value, Words) else value
        words.store(self.ref, index, wide.astype(self.ref.dtype))
