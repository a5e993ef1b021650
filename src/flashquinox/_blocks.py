"""Which leaves of a model are layers in a stack."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from ._trees import flatten, Leaf


class _Place:
    """Stands for a leaf of the model, where a function is asked which it takes."""


def leaves_of(
    call: str, name: str, choose: Callable[[PyTree], PyTree], model: PyTree
) -> set[int]:
    """The numbers of the leaves in the part of a model that a function takes."""
    leaves, rebuild = flatten(model)
    places: list[Any] = [_Place() for _ in leaves]
    numbers = {id(place): i for i, place in enumerate(places)}
    chosen = [leaf.value for leaf in flatten(choose(rebuild(places)))[0]]
    strange = next((x for x in chosen if id(x) not in numbers), None)
    if strange is not None or not chosen:
        raise ValueError(
            f"`{call}({name}=...)` takes a function from the model to a part of it, or "
            f"to several: `lambda model: model.{name}`, say. What it gave has "
            + ("no leaves." if not chosen else f"{strange!r}, which is no part of it.")
        )
    return {numbers[id(place)] for place in chosen}


def count_layers(call: str, stacked: list[Leaf]) -> int:
    """The number of layers of these leaves: the length of their first axes."""
    first = stacked[0].value.shape[:1] if stacked else ()
    for leaf in stacked:
        shape = leaf.value.shape
        if len(first) == 0 or shape[:1] != first or 0 in shape[:1]:
            raise ValueError(
                f"`{call}(blocks=...)`: the first axis of every array in the blocks is "
                f"that of the layers, but `{leaf.name}` has shape {shape} and "
                f"`{stacked[0].name}` {stacked[0].value.shape}. Stack the blocks, as "
                "`eqx.filter_vmap` makes them, or leave `blocks` out."
            )
    return first[0] if first else 1
