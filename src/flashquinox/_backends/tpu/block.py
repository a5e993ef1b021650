"""How large the blocks of a kernel are, and the chunks of a block."""

import dataclasses
import functools
import math

import jax.tree_util as jtu
from jax.experimental import pallas as pl
from jaxtyping import Array

from ..._storage.layout import Layout
from ..._tile.tile import StepStructure, TileState
from .chip import Chip


LANES = 128
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a matrix, in elements, and its chunks."""

    rows: int
    columns: int
    # Of a chunk: its groups, which lie one below the other, and its lanes.
    groups: int
    group_size: int
    lanes: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def chunks(self) -> tuple[int, int]:
        """How many chunks lie one below the other, and side by side."""
        high = self.rows // (self.groups * self.group_size)
        return high, self.columns // self.lanes


def choose_block(
    structure: StepStructure, layout: Layout, chip: Chip, grad: Array, old: TileState
) -> Block:
    """As many whole chunks as there is room for in VMEM, evenly divided."""
    *leading, rows, columns = layout.shape
    state = (old.weight, old.correction, old.codes)
    element = grad.dtype.itemsize + 2 * sum(
        [x.dtype.itemsize for x in jtu.tree_leaves(state)]
    )
    # Two buffers, and an eighth more for scales and scratch.
    room = chip.block_bytes // (2 * element * 9 // 8)
    group_size = layout.group_size
    groups = groups_of_chunk(structure)
    chunk = min(rows, groups * group_size)
    lanes = LANES if columns > LANES else columns
    chunks = pl.cdiv(rows, chunk), pl.cdiv(columns, lanes)
    room = room // (chunk * lanes)
    wide, high = 1, 1
    # Loads with a stride, as of words, are from arrays of no more lanes.
    if not chip.arithmetic.only_words:
        wide = _evenly(math.prod(leading) * chunks[0], chunks[1], room)
    if wide == chunks[1] or chip.arithmetic.only_words:
        times = math.prod(leading) * chunks[1] // wide
        high = _evenly(times, chunks[0], room // wide, wide)
    return Block(
        rows=high * chunk,
        columns=wide * lanes,
        groups=min(groups, high * chunk // group_size),
        group_size=group_size,
        lanes=min(LANES, wide * lanes),
    )


def groups_of_chunk(structure: StepStructure) -> int:
    """The groups of a chunk, at most. Many, so that the beginning and end of its phases
    matter little; not so many that the compiler schedules badly (found by looking at
    schedules)."""
    return 32 if len(structure.codecs) <= 1 else 16


@functools.cache
def _evenly(times: int, count: int, most: int, size: int = 1) -> int:
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
