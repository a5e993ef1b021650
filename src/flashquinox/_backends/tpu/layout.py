"""Which leaves the kernel for TPUs takes, and how it sees them."""

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ..._storage.layout import Layout, lies_transposed
from ..._tile.tile import TileState


# The rows of a tile of 8-bit integers.
_TILE_ROWS = 32


def layout_of(layout: Layout, old: TileState) -> Layout:
    """The layout of a leaf; of one without groups, that of the kernel's choice."""
    if jtu.tree_leaves(old.scales) or len(layout.shape) < 2:
        return layout
    axes = (-1, -2) if lies_transposed(layout.shape) else (-2,)
    fitting = [axis for axis in axes if layout.shape[axis] % _TILE_ROWS == 0]
    return Layout(layout.shape, (*fitting, -2)[:1], _TILE_ROWS)


def supports(layout: Layout, old: TileState, grad: Array) -> bool:
    """Whether the kernel can take this leaf. The others take plain XLA."""
    if layout.axes == (-1,) and lies_transposed(layout.shape):
        layout = transposed(layout)
    if layout.axes != (-2,) or layout.group_size % _TILE_ROWS != 0:
        return False
    if layout.shape[-2] % layout.group_size != 0:
        return False
    dtypes = {jnp.dtype(x.dtype) for x in jtu.tree_leaves((old, grad))}
    return not dtypes & {jnp.dtype(jnp.float16), jnp.dtype(jnp.float64)}


def transposed(layout: Layout) -> Layout:
    *leading, rows, columns = layout.shape
    return Layout((*leading, columns, rows), (-2,), layout.group_size)
