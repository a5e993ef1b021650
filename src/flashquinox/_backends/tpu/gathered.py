"""A step of many vectors as one kernel.

The vectors of a model are small: a kernel for each would mostly start and end. One
kernel copies all of them into VMEM at once. There, each begins with a new piece of some
long arrays, in which a loop takes the step, piece by piece.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Shaped

from ..._storage.codec import Reduction
from ..._tile.tile import LeafScalars, no_update, StepScalars, StepStructure, TileState
from ..interpreter.scalars import pack
from .block import AbstractBlock, AbstractChunk, LANES
from .chip import Chip
from .chunk import ChunkStep
from .scratch import scratch_shapes
from .vectors import place_in_piece, reduced_along_lanes, spread_along_lanes
from .view import View


# Vectors of a kernel, at most: more take the compiler longer than several kernels.
_MOST_VECTORS = 24
# Pieces of a kernel, at most: they have room in VMEM.
_MOST_PIECES = 64
# The scales of a piece begin a tile of their own.
_TILE = 1024


def pieces_of(view: View) -> int:
    """How many pieces of a kernel this vector takes."""
    (length,) = view.elements.lengths
    return pl.cdiv(length, view.group_size * LANES)


def gathered(pieces: list[int]) -> list[list[int]]:
    """Which vectors share a kernel, by how many pieces each has."""
    found: list[list[int]] = []
    room = 0
    for i, count in enumerate(pieces):
        if count > room or len(found[-1]) == _MOST_VECTORS:
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
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
    interpret: bool = False,
) -> tuple[TileState, ...]:
    """One step of several vectors. See `AbstractBackend.load`."""
    chip = Chip.current()
    arithmetic = chip.arithmetic.exact if interpret else chip.arithmetic
    places = _Places.of(views)
    # Of each vector, the gradient and the arrays of its state, of which the last ones
    # are scales.
    arrays = [[g, *jtu.tree_leaves(x)] for g, x in zip(grads, old, strict=True)]
    treedef, width = jtu.tree_structure(old[0]), len(arrays[0])
    scales = len(jtu.tree_leaves(old[0].scales))
    # How long a piece of each array is, and how far apart two are.
    size = places.group_size * LANES
    sizes = [
        (LANES, _TILE) if i >= width - scales else (size, size) for i in range(width)
    ]

    of_leaf = lambda x: x.leaf
    *packed, unpack = pack(eqx.tree_at(of_leaf, scalars, None))
    # What is not the same for all vectors, for each piece.
    stack = lambda *xs: jnp.stack([xs[place.vector] for place in places.all])
    own, own_structure = jtu.tree_flatten(jtu.tree_map(stack, *leaves))
    lengths = jnp.asarray([place.length for place in places.all], jnp.int32)
    small = [x.reshape(1, -1) for x in (*packed, lengths, *own)]

    block = _GatheredBlock(places)
    count = len(views) * width
    # All but the gradients are updated in place.
    results = [i for i in range(count) if i % width > 0]
    flat = [x for of_vector in arrays for x in of_vector]

    def kernel(floats: Any, integers: Any, lengths: Any, *refs: Any) -> None:
        parts = len(own), count, len(results), count, width
        own_refs, inputs, outputs, copies, scratch, rest = _split(refs, parts)
        *rest, semaphore = rest
        grad, *state = scratch
        state = treedef.unflatten(state)
        scalars = unpack(lambda i: floats[0, i], lambda i: integers[0, i])

        def pieces(i: int) -> Iterator[tuple[Any, Any]]:
            """Where the pieces of an array are in its copy and in scratch."""
            length, distance = sizes[i % width]
            (end,) = copies[i].shape
            for k, piece in enumerate(places.of_vector(i // width)):
                here = min(length, end - k * length)
                yield pl.ds(k * length, here), pl.ds(piece * distance, here)

        _copy(inputs, copies, semaphore)
        for i, ref in enumerate(copies):
            for source, target in pieces(i):
                scratch[i % width][target] = ref[source]

        def update(index: Any, carry: None) -> None:
            here = own_structure.unflatten([x[0, index] for x in own_refs])
            own_scalars = eqx.tree_at(of_leaf, scalars, here, is_leaf=_is_none)
            dither = structure.dither_weights
            chunk = ChunkStep(
                structure=structure,
                arithmetic=arithmetic,
                block=block,
                block_index=(lengths,),
                scalars=own_scalars,
                dithers=own_scalars.dithers(structure),
                threshold=own_scalars.weight_threshold if dither else None,
                grad=grad,
                old=state,
                new=state,
                scratch=tuple(rest),
                zero=integers[0, 0],
            )
            chunk.update(index, carry)

        step = partial(lax.fori_loop, 0, len(places.all), update, None)
        if scalars.take is None:
            step()
        else:
            pl.when(scalars.take)(step)
            if structure.as_update:

                @pl.when(jnp.logical_not(scalars.take))
                def _():
                    state.weight[...] = no_update(state.weight[...])

        for i in results:
            for target, source in pieces(i):
                copies[i][target] = scratch[i % width][source]
        _copy([copies[i] for i in results], outputs, semaphore)

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    new = pl.pallas_call(
        kernel,
        out_shape=[pltpu.HBM(flat[i].shape, flat[i].dtype) for i in results],
        in_specs=[
            *[pl.BlockSpec(memory_space=pltpu.SMEM) for _ in small],
            *[in_hbm for _ in flat],
        ],
        out_specs=[in_hbm for _ in results],
        scratch_shapes=[
            *[pltpu.VMEM(x.shape, x.dtype) for x in flat],
            *[
                pltpu.VMEM((len(places.all) * distance,), x.dtype)
                for (_, distance), x in zip(sizes, arrays[0], strict=True)
            ],
            *scratch_shapes(structure, block),
            pltpu.SemaphoreType.DMA,
        ],
        input_output_aliases={len(small) + i: j for j, i in enumerate(results)},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=chip.vmem_limit, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=50 * sum([x.size for x in grads]),
            transcendentals=4 * sum([x.size for x in grads]),
            bytes_accessed=sum(
                [x.nbytes * (2 if i in results else 1) for i, x in enumerate(flat)]
            ),
        ),
        interpret=interpret,
        name=f"flashquinox_{type(structure.rule).__name__.lower()}_vectors",
    )(*small, *flat)
    each = width - 1
    return tuple(
        [treedef.unflatten(new[i * each : (i + 1) * each]) for i in range(len(views))]
    )


def _is_none(x: Any) -> bool:
    return x is None


def _split(refs: tuple[Any, ...], sizes: tuple[int, ...]) -> list[tuple[Any, ...]]:
    ends = np.cumsum([0, *sizes])
    parts = [refs[i:j] for i, j in itertools.pairwise(ends)]
    return [*parts, refs[ends[-1] :]]


def _copy(sources: Sequence[Any], targets: Sequence[Any], semaphore: Any) -> None:
    """All at the same time."""
    copies = [
        pltpu.make_async_copy(source, target, semaphore)
        for source, target in zip(sources, targets, strict=True)
    ]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


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
            (length,) = view.elements.lengths
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
