"""What of a leaf is in VMEM at a time, and how it is cut."""

import abc
import functools
from typing import Any

from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Shaped

from ..._storage.codec import Reduction


class AbstractBlock(abc.ABC):
    """A block, and how it is cut.

    A loop takes a *chunk* at a time, which has as many groups as their scales fill some
    registers. Its elements are taken a *piece* at a time, of about four registers of
    float32: these are unrolled.

    Chunks are what `at` returns. Where the shape of an array is not given below, it is
    that of a block of elements or of scales.
    """

    @property
    @abc.abstractmethod
    def chunks(self) -> int:
        """The number of chunks."""

    @property
    @abc.abstractmethod
    def pieces(self) -> int:
        """The number of pieces of a chunk."""

    @property
    @abc.abstractmethod
    def piece(self) -> tuple[int, ...]:
        """The shape of a piece."""

    @property
    @abc.abstractmethod
    def chunk_scales(self) -> tuple[int, int]:
        """The shape of the scales of a chunk, in which a piece has one row or all."""

    @abc.abstractmethod
    def at(self, index: Any, block_index: tuple[Any, ...]) -> "AbstractChunk":
        """A chunk, by its number, of the block with that index in the grid."""

    @abc.abstractmethod
    def constants_of(self, piece: int) -> Any:
        """The rows of `chunk_scales` that are broadcast to a piece."""

    @abc.abstractmethod
    def reduced_piece(
        self, reduction: Reduction, x: Shaped[Array, "..."]
    ) -> Shaped[Array, "..."]:
        """What is left of a statistic of a piece in phase 2 of a chunk."""

    @property
    @abc.abstractmethod
    def extremes(self) -> tuple[int, ...]:
        """The shape of what is left of all pieces of a chunk."""

    @abc.abstractmethod
    def extremes_of(self, piece: int) -> Any:
        """Where in `extremes` a piece is."""

    @abc.abstractmethod
    def reduced(
        self, reduction: Reduction, extremes: Shaped[Array, "..."]
    ) -> Shaped[Array, "groups lanes"]:
        """The maxima (or minima) of groups."""

    @abc.abstractmethod
    def spread(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """What each element needs to know of its group, from `constants_of` a piece
        when that is broadcast to its shape."""


class AbstractGridBlock(AbstractBlock):
    """A block of a grid that covers a leaf: what the pipeline copies at a time."""

    @property
    @abc.abstractmethod
    def grid(self) -> tuple[int, ...]:
        """How many blocks there are along each axis of a leaf's view."""

    @property
    @abc.abstractmethod
    def elements(self) -> tuple[int, ...]:
        """The shape of a block of an array with an entry for each element."""

    @property
    @abc.abstractmethod
    def scales(self) -> tuple[int, ...]:
        """The shape of a block of scales."""

    @abc.abstractmethod
    def scales_at(self, *index: Any) -> tuple[Any, ...]:
        """The index of a block of scales, from that of a block of elements."""


class AbstractChunk(abc.ABC):
    """Where a chunk is in its block."""

    @property
    @abc.abstractmethod
    def scales(self) -> tuple[Any, ...]:
        """The index of its scales."""

    @abc.abstractmethod
    def elements(self, piece: int) -> tuple[Any, ...]:
        """The index of a piece."""

    @abc.abstractmethod
    def present(self, piece: int) -> Bool[Array, "..."] | None:
        """Which elements of a piece there are, if it may belong to a group at the end
        of a run that is partial. Otherwise `None`."""


def unravel(number: Any, grid: tuple[int, ...]) -> tuple[Any, ...]:
    """The index in a grid of what has this number."""
    index = []
    for length in reversed(grid):
        index.append(0 if length == 1 else number % length)
        number = number if length == 1 else number // length
    return tuple(reversed(index))


@functools.cache
def evenly(times: int, count: int, most: int, size: int = 1) -> int:
    """How many chunks of a size to take at a time, of `times` times `count`: so that
    the last turn is nearly full, that there are few turns, and that the first and the
    last turn, which overlap with no copy, are short.
    """
    # In units of the time of a chunk: what a step of the grid costs, and what each
    # chunk of the first and the last turn costs more, of which one only reads and one
    # only writes.
    turn, edge = 0.5, 0.9
    cost = lambda n: times * pl.cdiv(count, n) * (n * size + turn) + n * size * edge
    return min(range(1, max(1, min(count, most)) + 1), key=cost)


def evenly_both(times: int, chunks: tuple[int, int], most: int) -> tuple[int, int]:
    """How many chunks to take at a time, of `times` times so many that lie one below
    the other and side by side: in a row first, then whole rows."""
    below, beside = chunks
    wide = evenly(times * below, beside, most)
    if wide < beside:
        return 1, wide
    return evenly(times, below, most // wide, wide), wide
