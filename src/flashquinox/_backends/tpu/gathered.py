"""A step of short vectors as one kernel. In VMEM, each begins with a new piece of some
long arrays, in which a loop takes the step, piece by piece."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Shaped

from ..._storage.codec import Reduction
from ..._storage.tpu_memory import LANES
from ..._tile.step import LeafScalars, StepScalars, StepStructure, TileState
from .block import AbstractBlock, AbstractChunk
from .many import Inside, MOST_LEAVES, update_many
from .vectors import place_in_piece, reduced_along_lanes, spread_along_lanes
from .view import View


# Pieces of a kernel, at most: they have room in VMEM.
_MOST_PIECES = 64
# The scales of a piece begin a tile of their own.
_TILE = 1024


def pieces_of(view: View) -> int:
    """How many pieces of a kernel this vector takes."""
    *_, length = view.elements.lengths
    return pl.cdiv(length, view.group_size * LANES)


def gathered(pieces: list[int]) -> list[list[int]]:
    """Which vectors share a kernel, by how many pieces each has."""
    found: list[list[int]] = []
    room = 0
    for i, count in enumerate(pieces):
        if count > room or len(found[-1]) == MOST_LEAVES:
            found.append([])
            room = _MOST_PIECES
        found[-1].append(i)
        room -= count
    return found


def update_gathered(
    structure: StepStructure,
    views: tuple[View, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Shaped[Array, "..."], ...],
    old: tuple[TileState, ...],
    interpret: bool = False,
) -> tuple[TileState, ...]:
    """One step of several vectors. See `AbstractBackend.load`."""
    pairs = zip(views, grads, old, strict=True)
    grads, old = zip(
        *[(view.elements.of(grad), view.of(state)) for view, grad, state in pairs],
        strict=True,
    )
    places = _Places.of(views)
    arrays, treedef = [grads[0], *jtu.tree_leaves(old[0])], jtu.tree_structure(old[0])
    # How long a piece of each array is, and how far apart two are.
    size, width = places.group_size * LANES, len(arrays)
    are_of_groups = [False, *old[0].are_of_groups]
    sizes = [(LANES, _TILE) if x else (size, size) for x in are_of_groups]
    block = _GatheredBlock(places)

    def body(inside: Inside) -> Callable[[], None]:
        grad, *state = inside.scratch
        state = treedef.unflatten(state)

        def copy(array: int, back: bool) -> None:
            """Copies an array of each vector to scratch, or from there."""
            (length, distance), scratch = sizes[array], inside.scratch[array]
            for vector, copies in enumerate(inside.copies):
                *one, end = copies[array].shape
                for i, piece in enumerate(places.of_vector(vector)):
                    here = min(length, end - i * length)
                    # Of a matrix with one row, the row.
                    row = [0 for _ in one]
                    own = copies[array].at[(*row, pl.ds(i * length, here))]
                    gathered = scratch.at[pl.ds(piece * distance, here)]
                    source, target = (gathered, own) if back else (own, gathered)
                    target[...] = source[...]

        def update(index: Any, carry: None) -> None:
            lengths = (inside.lengths,)
            inside.chunks(index, lengths, grad, state).update(index, carry)

        def step() -> None:
            for array in range(width):
                copy(array, back=False)
            lax.fori_loop(0, len(places.all), update, None)
            for array in range(1, width):
                copy(array, back=True)

        return step

    stack = lambda *xs: jnp.stack([xs[place.vector] for place in places.all])
    new = update_many(
        structure,
        block,
        scalars,
        jtu.tree_map(stack, *leaves),
        grads,
        old,
        [
            pltpu.VMEM((len(places.all) * distance,), x.dtype)
            for (_, distance), x in zip(sizes, arrays, strict=True)
        ],
        body,
        interpret,
        lengths=[place.length for place in places.all],
    )
    return tuple([view.restore(x) for view, x in zip(views, new, strict=True)])


class _Place(NamedTuple):
    """What a piece holds: elements of which vector, and how many."""

    vector: int
    length: int


@dataclasses.dataclass(frozen=True)
class _Places:
    group_size: int
    # Of all pieces of scratch.
    all: tuple[_Place, ...]

    @staticmethod
    def of(views: tuple[View, ...]) -> "_Places":
        size = views[0].group_size * LANES
        places = []
        for vector, view in enumerate(views):
            *_, length = view.elements.lengths
            places += [
                _Place(vector, min(size, length - start))
                for start in range(0, length, size)
            ]
        return _Places(views[0].group_size, tuple(places))

    @property
    def whole_groups(self) -> bool:
        return all([place.length % self.group_size == 0 for place in self.all])

    def of_vector(self, vector: int) -> list[int]:
        """The pieces of a vector."""
        return [i for i, place in enumerate(self.all) if place.vector == vector]


@dataclasses.dataclass(frozen=True)
class _GatheredBlock(AbstractBlock):
    """Scratch. A chunk is one piece, as vectors have dithers of their own."""

    places: _Places

    @property
    def chunks(self) -> int:
        return len(self.places.all)

    @property
    def pieces(self) -> int:
        return 1

    @property
    def piece(self) -> tuple[int, int]:
        return self.places.group_size, LANES

    @property
    def chunk_scales(self) -> tuple[int, int]:
        return 1, LANES

    def at(self, index: Any, block_index: tuple[Any, ...]) -> "_GatheredChunk":
        (lengths,) = block_index
        return _GatheredChunk(self, index, lengths)

    def constants_of(self, piece: int) -> Any:
        del piece
        return slice(None)

    def reduced_piece(
        self, reduction: Reduction, x: Shaped[Array, "rows lanes"]
    ) -> Shaped[Array, "1 lanes"]:
        return reduced_along_lanes(reduction, x, self.places.group_size)

    @property
    def extremes(self) -> tuple[int, int]:
        return 1, LANES

    def extremes_of(self, piece: int) -> Any:
        del piece
        return slice(None)

    def reduced(
        self, reduction: Reduction, extremes: Shaped[Array, "1 lanes"]
    ) -> Shaped[Array, "1 lanes"]:
        del reduction
        return extremes

    def spread(self, x: Shaped[Array, "rows lanes"]) -> Shaped[Array, "rows lanes"]:
        return spread_along_lanes(x, self.places.group_size)


@dataclasses.dataclass(frozen=True)
class _GatheredChunk(AbstractChunk):
    block: _GatheredBlock
    index: Any
    lengths: Any

    @property
    def scales(self) -> tuple[Any, ...]:
        return (pl.ds(pl.multiple_of(self.index * _TILE, _TILE), LANES),)

    def elements(self, piece: int) -> tuple[Any, ...]:
        del piece
        size = self.block.places.group_size * LANES
        return (pl.ds(pl.multiple_of(self.index * size, size), size),)

    def present(self, piece: int) -> Bool[Array, "rows lanes"] | None:
        del piece
        places = self.block.places
        if places.whole_groups:
            return None
        return place_in_piece(places.group_size) < self.lengths[0, self.index]
