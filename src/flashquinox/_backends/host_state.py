"""The state of a leaf in host memory, or of one layer of a stack that is there."""

import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import Array, Scalar

from .._common import memory
from .._tile.step import TileState


def read(state: TileState, layer: Scalar | None) -> TileState:
    """The state on the device. Arrays in host memory have all layers, if one is
    asked for."""

    def one(x: Array) -> Array:
        if layer is not None and memory.is_on_host(x):
            x = lax.dynamic_index_in_dim(x, layer, keepdims=False)
        return memory.to_device(x)

    return jtu.tree_map(one, state)


def write(state: TileState, new: TileState, layer: Scalar | None) -> TileState:
    """The new state, where the old one was."""

    def one(x: Array, y: Array) -> Array:
        y = memory.where(y, x)
        if layer is not None and memory.is_on_host(x):
            return lax.dynamic_update_index_in_dim(x, y, layer, 0)
        return y

    return jtu.tree_map(one, state, new)
