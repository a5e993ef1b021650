"""What a step updates at a time, and what comes of it."""

from typing import Any, NamedTuple

from jax.sharding import NamedSharding

from .._tile.step import TileState
from .stored_leaf import Learned


class Part(NamedTuple):
    """A leaf, or one layer of a stacked leaf, and its gradient. `number` is that of the
    leaf. `parameters` are those of codecs that learn."""

    number: int
    old: TileState
    # On the device, where a pass is taken.
    grad: Any
    sharding: NamedSharding | None
    parameters: Learned


class Advanced(NamedTuple):
    """What a leaf is after a step. `total` are the arrays of the sum that its gradient
    was stored in, if it was."""

    new: TileState
    parameters: Learned
    total: TileState | None = None
