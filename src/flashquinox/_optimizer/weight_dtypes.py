"""The dtypes of weights that a state records.

Corrections of bfloat16 and of float16 weights have the same dtype, and count steps of
other sizes. A model that is cast from one to the other would silently get other master
weights.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from .._common.dtypes import NARROW_DTYPES
from .._model.trees import Leaf
from .._sharding.record import OfNothing


# The names of the dtypes of weights with corrections, in order; one name if all have
# the same. It is empty where none is known, as in states of earlier versions.
WeightDtypes: TypeAlias = tuple[str, ...]


def record_dtypes(leaves: Sequence[Leaf], corrections: Sequence[Any]) -> WeightDtypes:
    if not leaves:
        return OfNothing()
    names = tuple(
        leaf.value.dtype.name
        for leaf, correction in zip(leaves, corrections, strict=True)
        if correction is not None
    )
    return names[:1] if len(set(names)) == 1 else names


def check_weight_dtypes(
    call: str,
    leaves: Sequence[Leaf],
    corrections: Sequence[Any],
    recorded: Any,
    replaced: Sequence[Any] | None = None,
) -> None:
    """Weights with corrections must have the dtypes that they had when these were made,
    but for those that are replaced."""
    held = [
        (leaf, new is not None)
        for leaf, correction, new in zip(
            leaves, corrections, replaced or [None] * len(leaves), strict=True
        )
        if correction is not None
    ]
    names = recorded * len(held) if len(recorded) == 1 else recorded
    if len(names) != len(held):
        # Leaves were taken out since.
        return
    for (leaf, is_replaced), name in zip(held, names, strict=True):
        dtype = leaf.value.dtype
        if not is_replaced and dtype.name != name and dtype in NARROW_DTYPES:
            raise ValueError(
                f"`{call}`: the weight at `{leaf.name}` is {dtype.name}, but its "
                f"correction in the state is that of a {name} weight, which counts "
                f"other steps. Cast the model back; or, to go on in {dtype.name}, take "
                "`masters = flashquinox.master_weights(model, state)` of the model "
                "before it is cast, and then `flashquinox.from_master_weights(masters, "
                "cast_model, state)`; or make a new state with `init`."
            )
