"""The memory of gradients in gradient release."""

import jax

from .._model.blocks import count_layers
from .._model.trees import Leaf
from .device_bytes import bytes_on_device


def released_gradients(
    call: str,
    leaves: list[Leaf],
    trained: dict[int, jax.ShapeDtypeStruct],
    blocks: set[int] | None,
    prologue: set[int] | None,
    epilogue: set[int] | None,
) -> int | None:
    """The most bytes of gradients at one time: before the blocks, at one block, or
    after the blocks. `None` without blocks."""
    if blocks is None:
        return None
    stacked = [i for i in trained if i in blocks]
    layers = count_layers(call, [leaves[i] for i in stacked])
    layer = bytes_on_device(trained[i] for i in stacked) // layers
    outside = set(trained) - blocks
    first = outside if prologue is None else outside & prologue
    last = outside if epilogue is None else outside & epilogue
    of = lambda numbers: bytes_on_device(trained[i] for i in numbers)
    # Weights that neither prologue nor epilogue reads are updated before the blocks
    # too.
    return max(of(outside - (first - last)), layer + of(first & last), of(first))
