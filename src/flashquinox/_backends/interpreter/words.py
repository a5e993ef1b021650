"""Narrow arrays as words of 32 bits, for TPUs without instructions for narrow integers.

In memory, numbers of 8 or 16 bits that are neighbours along the rows share a word. What
has the same place in each word is a quarter (or half) of the rows. So all arrays of a
group are taken in the order of quarters: rows 0, 4, 8, ...; then 1, 5, 9, ... Loads and
stores with a stride do that, and nothing in between needs to know.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32

from ..._common.arithmetic import WITHOUT_FRACTION


_QUARTERS = 4


@dataclasses.dataclass(frozen=True)
class Words:
    """Rows of a narrow dtype. One word has all quarters of 8-bit numbers; of 16-bit
    numbers, a first word has quarters 0 and 1, a second one 2 and 3."""

    words: tuple[Int32[Array, "quarter lanes"], ...]
    dtype: Any

    @property
    def shape(self) -> tuple[int, int]:
        quarter, lanes = self.words[0].shape
        return _QUARTERS * quarter, lanes

    def widen(self) -> Int32[Array, "rows lanes"] | Float32[Array, "rows lanes"]:
        """The numbers, as int32 or float32."""
        bits = _bits(self.dtype)
        floating = jnp.issubdtype(self.dtype, jnp.floating)
        signed = jnp.issubdtype(self.dtype, jnp.signedinteger)
        quarters = []
        for word in self.words:
            for place in range(0, 32, bits):
                if floating:
                    x = _moved(word, place, 32 - bits, bits)
                elif signed:
                    x = _moved(word, place, 32 - bits, bits, clean=False)
                    x = lax.shift_right_arithmetic(x, np.int32(32 - bits))
                else:
                    x = _moved(word, place, 0, bits)
                quarters.append(x)
        wide = jnp.concatenate(quarters)
        # bfloat16 is the high half of a float32.
        return lax.bitcast_convert_type(wide, jnp.float32) if floating else wide

    def narrow(self) -> Array:
        """The numbers as an ordinary array of the dtype."""
        return self.widen().astype(self.dtype)

    def bitcast(self, dtype: DTypeLike) -> "Words":
        """The same bits as numbers of another dtype, of the same width."""
        return Words(self.words, jnp.dtype(dtype))

    def __xor__(self, number: int) -> "Words":
        bits = _bits(self.dtype)
        numbers = _int32(sum(number << place for place in range(0, 32, bits)))
        return Words(tuple(word ^ numbers for word in self.words), self.dtype)

    @staticmethod
    def of(x: Array) -> "Words":
        """From an ordinary array of a narrow dtype."""
        if jnp.issubdtype(x.dtype, jnp.floating):
            bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
            return Words.of_bits(bits, 32 - _bits(x.dtype), x.dtype)
        return Words.of_bits(x.astype(jnp.int32), 0, x.dtype)

    @staticmethod
    def of_bits(x: Int32[Array, "rows lanes"], first: int, dtype: DTypeLike) -> "Words":
        """From as many bits of each element as the dtype has, from `first` upward."""
        bits = _bits(dtype)
        quarters = iter(_split(x))
        words = []
        for _ in range(bits * _QUARTERS // 32):
            word = None
            for place in range(0, 32, bits):
                part = _moved(next(quarters), first, place, bits)
                word = part if word is None else word | part
            words.append(word)
        return Words(tuple(words), jnp.dtype(dtype))

    @staticmethod
    def of_rounded(
        x: Float32[Array, "rows lanes"], factor: float, dtype: DTypeLike
    ) -> "Words":
        """`round(x * factor)` as bytes, of a power of two and of numbers that fit.

        An addition rounds, and leaves the integer in the lowest bits. If that has no
        sign, more additions put bytes together.
        """
        signed = jnp.issubdtype(dtype, jnp.signedinteger)
        large = WITHOUT_FRACTION / np.float32(factor)
        offset = np.float32((2**7 if signed else 0) / factor)
        excess = sum(int(large.view(np.int32)) << place for place in range(0, 32, 8))
        shifted = [
            lax.bitcast_convert_type(quarter + (large + offset), jnp.int32)
            for quarter in _split(x)
        ]
        word = shifted[0] - _int32(excess)
        for i in (1, 2, 3):
            word = word + (shifted[i] << (8 * i))
        words = Words((word,), jnp.dtype(dtype))
        return words ^ 2**7 if signed else words


def _unflatten(dtype: Any, words: Iterable[Any]) -> Words:
    # JAX puts other things than arrays here, which are not checked.
    new = object.__new__(Words)
    object.__setattr__(new, "words", tuple(words))
    object.__setattr__(new, "dtype", dtype)
    return new


jtu.register_pytree_node(Words, lambda x: (x.words, x.dtype), _unflatten)


def load(ref: Any, index: tuple[Any, ...]) -> Any:
    """Rows of a block: `Words` of a narrow dtype, an array of a wide one. The last two
    parts of the index are slices of rows and of lanes."""
    parts = [view[rows] for view, rows in _parts(ref, index)]
    return jnp.concatenate(parts) if len(parts) == 4 else Words(tuple(parts), ref.dtype)


def store(ref: Any, index: tuple[Any, ...], value: Any) -> None:
    """Writes what `load` would read; takes ordinary arrays of narrow dtypes too."""
    if isinstance(value, Words):
        parts = value.words
    elif _bits(value.dtype) == 32:
        parts = _split(value)
    else:
        parts = Words.of(value).words
    for (view, rows), part in zip(_parts(ref, index), parts, strict=True):
        view[rows] = part


def _parts(ref: Any, index: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """For each word that the first rows are in: where it and every such one is."""
    # Only here, in a kernel, is it sure to be there.
    from jax.experimental import pallas as pl

    bits = _bits(ref.dtype)
    count = bits * _QUARTERS // 32
    words = ref if bits == 32 else ref.bitcast(jnp.int32)
    *outer, group, lanes = index
    quarter = group.size // _QUARTERS
    first = pl.multiple_of(group.start * bits // 32, quarter)
    view = words.at[(*outer, pl.ds(first, count * quarter), lanes)]
    return [(view, pl.ds(i, quarter, stride=count)) for i in range(count)]


def _split(x: Array) -> list[Array]:
    quarter = x.shape[0] // _QUARTERS
    return [x[i : i + quarter] for i in range(0, x.shape[0], quarter)]


def _moved(
    x: Int32[Array, "..."], first: int, to: int, bits: int, clean: bool = True
) -> Int32[Array, "..."]:
    """Bits that begin at `first`, at another place; without what is around them."""
    if to > first:
        x = x << (to - first)
    elif to < first:
        x = lax.shift_right_logical(x, np.int32(first - to))
    nothing_below = first == 0 or to == 0
    nothing_above = first + bits == 32 or to + bits == 32
    if not clean or (nothing_below and nothing_above):
        return x
    return x & _int32((2**bits - 1) << to)


def _bits(dtype: DTypeLike) -> int:
    return 8 * jnp.dtype(dtype).itemsize


def _int32(number: int) -> np.int32:
    """Its lowest bits."""
    return np.uint32(number % 2**32).view(np.int32)
