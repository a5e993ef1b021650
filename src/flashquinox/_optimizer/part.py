"""What a step updates at a time, and what comes of it."""

from typing import NamedTuple

from jax.sharding import NamedSharding
from jaxtyping import Array

from .._tile.step import TileState
from .stored_leaf import Learned


class Part(NamedTuple):
    """A leaf, or one layer of a stacked leaf, and its gradient. `number` is that of the
    leaf. `parameters` are those of codecs that learn."""

    number: int
    old: TileState
    grad: Array
    sharding: NamedSharding | None
    parameters: Learned


class Advanced(NamedTuple):
    new: TileState
    parameters: Learned
