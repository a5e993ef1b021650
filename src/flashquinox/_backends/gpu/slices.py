"""Parts of arrays in the memory of a GPU."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class MaskedSlice:
    """A part of an array in memory, of which some elements may lie beyond its end."""

    index: tuple[Any, ...]
    # Which elements there are: `None` for all.
    mask: Any

    def load(self, refs: Sequence[Any]) -> list[Array]:
        """This part of each of these arrays."""
        at = [ref.at[self.index] for ref in refs]
        if self.mask is None:
            return [plt.load(x) for x in at]
        return [plt.load(x, mask=self.mask, other=0) for x in at]

    def store(self, refs: Sequence[Any], values: Sequence[Array]) -> None:
        for ref, value in zip(refs, values, strict=True):
            plt.store(ref.at[self.index], value, mask=self.mask)


def below(x: Any, end: int) -> Any:
    """`x`, which is less than `end`, so that Triton knows that it is small: it can add
    to a pointer in the instruction that loads, where that sum cannot overflow."""
    return x & (2 ** (end - 1).bit_length() - 1)


def span(index: Any, length: int, total: int, offset: Any = 0) -> tuple[pl.Slice, Any]:
    """The slice with an index, of those of equal length that cover `total` elements;
    and which elements of it there are: `None` for all."""
    start = below(index, pl.cdiv(total, length)) * length + offset
    if total % length == 0:
        return pl.ds(start, length), None
    return pl.ds(start, length), start + jnp.arange(length) < total
