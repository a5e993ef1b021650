"""A leaf as a list of groups."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from .._storage.layout import Layout


# Of leaves that are stored without groups.
_SIZE = 32
# Operands of a concatenation. 2,000 vectors compile in 30 s with one concatenation for
# each of their arrays, in 16 s with 256 operands, and in 15 s with 64.
_TOGETHER = 64


@dataclasses.dataclass(frozen=True)
class Groups:
    """A leaf as a list of `number` groups of one `size`. They lie `in_order` if the
    list is the leaf's memory; only then may the last one be partial. Without scales
    (`is_grouped` is false), groups are of any elements.
    """

    layout: Layout
    size: int
    number: int
    in_order: bool
    is_grouped: bool

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(layout: Layout, is_grouped: bool) -> "Groups":
        elements = math.prod(layout.shape)
        if not is_grouped:
            return Groups(layout, _SIZE, -(-elements // _SIZE), True, False)
        size, number = layout.group_size, math.prod(layout.scale_shape)
        whole_runs = layout.matrices == 1 or layout.run % size == 0
        in_order = layout.columns == 1 and whole_runs
        return Groups(layout, size, number, in_order, True)

    @property
    def whole(self) -> int:
        """How many groups are not partial. None, if they do not lie in order."""
        return math.prod(self.layout.shape) // self.size if self.in_order else 0

    def elements(self, start: int, number: int) -> int:
        """How many elements there are in so many groups of a leaf whose groups lie in
        order, from one on."""
        first, size = self.size * start, math.prod(self.layout.shape)
        return min(self.size * number, size - first)

    def parts(
        self, x: Shaped[Array, "..."], start: int, number: int
    ) -> list[Shaped[Array, " _"]]:
        """So many groups of the leaf, from one on, as arrays that follow one another. A
        partial group is filled up: with its last element, which changes neither its
        largest nor its smallest one; or with anything, where groups have no scales."""
        if not self.in_order:
            tile = jnp.moveaxis(self.layout.tile(x), self.layout.tile_axis, -1)
            x = tile.reshape(self.number, -1)
            x = jnp.pad(x, [(0, 0), (0, self.size - x.shape[1])], mode="edge")
            x, length = x.reshape(-1), self.size * number
        else:
            x, length = flat(x), self.elements(start, number)
        if length < x.size:
            x = lax.slice_in_dim(x, self.size * start, self.size * start + length)
        missing = self.size * number - length
        if missing == 0:
            return [x]
        if not self.is_grouped:
            return [x, fill_of(missing, x.dtype)]
        return [x, lax.broadcast_in_dim(x[-1:], (missing,), (0,))]

    def put(
        self, x: Shaped[Array, "..."], start: int, new: Shaped[Array, " elements"]
    ) -> Shaped[Array, "..."]:
        """The leaf with these elements in it, from a group on."""
        if self.in_order:
            own = put(flat(x), self.size * start, new)
            return own if x.ndim == 1 else lax.reshape(own, x.shape)
        new = from_words(new, x.dtype)
        shape = list(jax.eval_shape(self.layout.tile, x).shape)
        length = shape.pop(self.layout.tile_axis)
        tile = new.reshape(self.number, self.size)[:, :length]
        tile = jnp.moveaxis(tile.reshape(*shape, length), -1, self.layout.tile_axis)
        return self.layout.untile(tile)


def flat(x: Shaped[Array, "..."]) -> Shaped[Array, " n"]:
    """As one axis, without an operation if it is one."""
    return x if x.ndim == 1 else lax.reshape(x, (x.size,))


def fill_of(length: int, dtype: Any) -> Shaped[Array, " length"]:
    """Any numbers, to be joined to others. Of equal ones, XLA would make them anew in
    each kernel; arrays that are there are joined without one."""
    return jnp.asarray(_fill_of(length, np.dtype(dtype)))


# In a program, it is there once.
@functools.lru_cache(maxsize=64)
def _fill_of(length: int, dtype: np.dtype) -> np.ndarray:
    fill = np.zeros(length, dtype)
    fill[-1] = 1
    return fill


def joined(parts: Sequence[Shaped[Array, " _"]]) -> Shaped[Array, " n"]:
    """The parts one after another. XLA's time for many operands grows with their
    square, so many are joined a few at a time."""
    while len(parts) > _TOGETHER:
        some = [parts[i : i + _TOGETHER] for i in range(0, len(parts), _TOGETHER)]
        # Else XLA makes one operation of all.
        parts = lax.optimization_barrier([lax.concatenate(x, 0) for x in some])
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, 0)


def hidden(numbers: Iterable[int]) -> list[Array]:
    """These numbers, which XLA does not know. Moves from and to different places are
    then one kernel, which it compiles once."""
    return lax.optimization_barrier([jnp.int32(number) for number in numbers])


def words_of(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """An array as chunks have it: floats of 16 bits as integers. LLVM moves integers in
    vectors, and such floats one by one."""
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return lax.bitcast_convert_type(x, jnp.uint16) if is_narrow else x


def from_words(x: Shaped[Array, "*shape"], dtype: Any) -> Shaped[Array, "*shape"]:
    """The array of this dtype of which `x` are the words."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def part_of(
    x: Shaped[Array, " n"], start: Array, length: int
) -> Shaped[Array, " length"]:
    return lax.dynamic_slice(x, (start,), (length,), allow_negative_indices=False)


def put(
    x: Shaped[Array, " n"], start: int | Array, part: Shaped[Array, " part"]
) -> Shaped[Array, " n"]:
    """The array with a part of it replaced, from one element on, by these words."""
    # Of its own, and not what computes the part as well: it is compiled in no time.
    if part.size == x.size:
        return lax.optimization_barrier(from_words(part, x.dtype))
    part = from_words(lax.optimization_barrier(part), x.dtype)
    return lax.dynamic_update_slice(x, part, (start,), allow_negative_indices=False)
