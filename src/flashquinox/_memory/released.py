"""The memory of gradients in gradient release."""

from typing import Any

import jax
from jaxtyping import PyTree

from .._model.blocks import count_layers
from .._model.trees import is_array, Leaf
from .._optimizer.optimizer import Optimizer, settings_of
from .._optimizer.passes import layers_are_apart
from .device_bytes import bytes_on_device


def released_gradients(
    call: str,
    leaves: list[Leaf],
    trained: dict[int, jax.ShapeDtypeStruct],
    blocks: set[int] | None,
    prologue: set[int] | None,
    epilogue: set[int] | None,
    waiting: set[int],
) -> int | None:
    """The most bytes of gradients at one time: before the blocks, at one block, or
    after the blocks. `None` without blocks. `waiting` are leaves of which all layers
    are updated after the blocks."""
    if blocks is None:
        return None
    stacked = [i for i in trained if i in blocks]
    layers = count_layers(call, [leaves[i] for i in stacked])
    of = lambda numbers: bytes_on_device(trained[i] for i in numbers)
    held = [i for i in stacked if i in waiting]
    layer = of(i for i in stacked if i not in waiting) // layers + of(held)
    outside = set(trained) - blocks
    first = outside if prologue is None else outside & prologue
    last = outside if epilogue is None else outside & epilogue
    # Weights that neither prologue nor epilogue reads are updated before the blocks
    # too.
    return max(
        of(outside - (first - last)), layer + of(first & last), of(first) + of(held)
    )


def waiting_leaves(
    call: str, optim: Any, model: PyTree, leaves: list[Leaf]
) -> set[int]:
    """The leaves whose layers cannot be updated one by one, by the rules of an
    optimizer. None in a wrapper, which takes no gradient release."""
    if not isinstance(optim, Optimizer):
        return set()
    rules = settings_of(optim).rules(call, model, leaves)
    return {
        i
        for i, (leaf, (_, rule)) in enumerate(zip(leaves, rules, strict=True))
        if is_array(leaf.value) and not layers_are_apart(call, rule, leaf)
    }
