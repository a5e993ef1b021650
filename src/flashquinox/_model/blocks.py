"""Parts of a model that functions select, and stacks of layers among them."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from .._common.text import shown
from .trees import flatten, Leaf


class _Placeholder:
    """Stands for a leaf of the model, to see which leaves a function selects."""

    def __repr__(self) -> str:
        return "<a leaf of the model>"


def part_of(
    call: str, name: str, choose: Callable[[PyTree], PyTree], model: PyTree
) -> tuple[list[int], Callable[[list[Any]], PyTree]]:
    """The numbers of the leaves in the part of a model that a function selects, and a
    function from as many values to such a part."""
    takes = (
        f"`{call}({name}=...)` takes a function from the model to a part of it, or to "
        f"several: `lambda model: model.{name}`, say."
    )
    if not callable(choose):
        raise TypeError(f"{takes} It got {shown(choose)}.")
    leaves, rebuild = flatten(model)
    placeholders: list[Any] = [_Placeholder() for _ in leaves]
    numbers = {id(x): i for i, x in enumerate(placeholders)}
    chosen, rebuild_part = flatten(choose(rebuild(placeholders)))
    if not chosen:
        raise ValueError(f"{takes} What it gave has no leaves.")
    found: list[int] = []
    for leaf in chosen:
        if id(leaf.value) not in numbers:
            raise ValueError(
                f"{takes} What it gave has {leaf.value!r} at `{leaf.name}`, which is "
                "no part of it."
            )
        found.append(numbers[id(leaf.value)])
        if found[-1] in found[:-1]:
            raise ValueError(
                f"{takes} What it gave has `{leaves[found[-1]].name}` twice, once at "
                f"`{leaf.name}`."
            )
    return found, rebuild_part


def count_layers(call: str, stacked: list[Leaf]) -> int:
    """The number of layers in stacked leaves: the length of their first axes."""
    if not stacked:
        raise ValueError(
            f"`{call}(blocks=...)`: there are no arrays in the blocks, of which every "
            "one has the layers along its first axis."
        )
    first = stacked[0].value.shape[:1]
    for leaf in stacked:
        shape = leaf.value.shape
        if len(first) == 0 or shape[:1] != first or 0 in shape[:1]:
            raise ValueError(
                f"`{call}(blocks=...)`: the first axis of every array in the blocks is "
                f"that of the layers, but `{leaf.name}` has shape {shape} and "
                f"`{stacked[0].name}` {stacked[0].value.shape}. Stack the blocks, as "
                "`eqx.filter_vmap` makes them."
            )
    return first[0]
