"""Plain XLA: the whole leaf is one tile."""

from functools import partial

import jax
from jaxtyping import Array, Float

from .._storage.layout import Layout
from .._tile.shapes import update_tile_of_any_shape
from .._tile.tile import StepScalars, StepStructure, TileState


@partial(jax.jit, static_argnums=(0, 1))
def update_leaf(
    structure: StepStructure,
    layout: Layout,
    scalars: StepScalars,
    grad: Float[Array, "*shape"],
    old: TileState,
) -> TileState:
    """One step of one leaf. Compiled once for all leaves of the same shape and
    dtypes."""
    tile = update_tile_of_any_shape(
        structure,
        scalars,
        layout.tile_axis,
        layout.tile(grad),
        old.map(layout.tile),
    )
    return tile.map(layout.untile)
