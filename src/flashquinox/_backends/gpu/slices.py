"""Parts of arrays in the memory of a GPU."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Places:
    """Places of an array in memory.

    A place may be there several times, to fill up what is partial. That changes neither
    the largest nor the smallest element, and all copies of an element become the same
    new one, so that it does not matter which is written last.
    """

    index: Any
    # Which places exist: `None` for all.
    exist: Any

    def load(self, refs: Sequence[Any]) -> list[Array]:
        """What is at these places of each of these arrays; 0 where there is nothing."""
        at = [ref.at[self.index] for ref in refs]
        if self.exist is None:
            return [plt.load(x) for x in at]
        return [plt.load(x, mask=self.exist, other=0) for x in at]

    def store(self, refs: Sequence[Any], values: Sequence[Array]) -> None:
        for ref, value in zip(refs, values, strict=True):
            plt.store(ref.at[self.index], value, mask=self.exist)


def below(x: Any, end: int) -> Any:
    """`x`, which is less than `end`, so that Triton knows that it is small: it can add
    to a pointer in the instruction that loads, where that sum cannot overflow."""
    return x & (2 ** (end - 1).bit_length() - 1)


def tile_start(index: Any, length: int, total: int) -> Any:
    """Where the tile with an index starts, of those of equal length that cover `total`
    places."""
    return below(index, pl.cdiv(total, length)) * length
