"""Which leaves a step takes together: those of one stack of matrices, and those whose
copies from host memory are on the device at the same time."""

import math
from collections.abc import Sequence
from typing import Any, TYPE_CHECKING

from .._common.batches import batches_by_size
from .._common.dtypes import compute_dtype
from .._rules.rule import rule_structure
from .._rules.whole_leaf import AbstractMatrixRule
from .._storage.layout import Layout
from .._tile.stored_gradient import StoredGradient
from .part import Part
from .slices import elements_on_device, slices_of
from .streaming import Piece, PORTION, Portion


if TYPE_CHECKING:
    from .step_in_progress import StepInProgress

# How many elements of matrices a device has in one stack, if that is more than one
# leaf: 12 of GPT-2's largest matrices are 28 million, for which products are as fast as
# they get, in 57 MB of bfloat16.
STACK = 2**25

# Of other leaves, a batch may also have this share of all elements, or so many: each
# batch has its directions in memory, and kernels of its own. If it was no larger than
# the largest leaf, of which ConvNeXt-T has twelve times as much in all, that would have
# 50 kernels for LAMB on a GPU; it has 15.
_SHARE, _LEAST_ROOM = 4, 2**22


def room_for_directions(step: "StepInProgress") -> int:
    """How many elements of leaves a device has directions of, if that is more than the
    largest leaf has."""
    rules = {i: x.between for i, x in step.passes.items()}
    whole = [
        math.prod(step.leaves[i].value.shape)
        for i, rule in rules.items()
        if rule is not None and not isinstance(rule, AbstractMatrixRule)
    ]
    return max(sum(whole) // _SHARE, _LEAST_ROOM)


def batches(
    step: "StepInProgress", of: Sequence[Part], numbers: list[int], room: int = 0
) -> list[list[int]]:
    """Which of these leaves take their two passes together: those of one stack of
    matrices, or as many as are not larger than the largest one, or than `room` where
    that is more."""
    stacks: dict[Any, list[int]] = {}
    others: dict[int, int] = {}
    for i in numbers:
        number, old, grad, sharding, *_ = of[i]
        rule = step.passes[number].between
        if not isinstance(rule, AbstractMatrixRule):
            others[i] = grad.size
            continue
        dtype = compute_dtype(old.weight.dtype)
        kind = rule_structure(rule), grad.shape, dtype, sharding  # pyright: ignore
        group = step.rules[number].group
        stacks.setdefault((group, *kind), []).append(i)
    found = batches_by_size(others, room)
    for stack in stacks.values():
        grad, sharding = of[stack[0]].grad, of[stack[0]].sharding
        devices = 1 if sharding is None else sharding.mesh.size
        most = max(1, STACK // grad.size) * devices
        found += [stack[i : i + most] for i in range(0, len(stack), most)]
    return found


def portions(
    step: "StepInProgress", of: Sequence[Part], numbers: list[int]
) -> list[Portion]:
    """Which of these leaves, or slices of them, are on the device together. Rules
    that need whole leaves get them: matrices in the batches of leaves on the device, so
    that their products are the same, and no more of others than the largest leaf has.
    Codecs that learn get whole leaves too, and kernels that take states where they
    are."""
    found: list[Portion] = []
    room, whole = 0, []
    for i in numbers:
        number, _, grad, sharding, parameters = of[i]
        if step.passes[number].between is not None:
            whole.append(i)
            continue
        slices = None
        if not parameters and step.is_streamed(of[i]):
            layouts = _layouts(step, of[i])
            slices = slices_of(grad.shape, layouts, sharding, PORTION)
        if slices is not None:
            found += [[Piece(i, x)] for x in slices]
            room = 0
            continue
        size = elements_on_device(grad.shape, sharding)
        if size > room:
            found.append([])
            room = PORTION
        found[-1].append(Piece(i, None))
        room -= size
    return found + [
        [Piece(i, None) for i in batch] for batch in batches(step, of, whole)
    ]


def _layouts(step: "StepInProgress", x: Part) -> list[Layout | None]:
    """The groups of the state of a leaf, and those of the sum that its gradient is
    stored in, if it is."""
    layout = step.stored[x.number].layout
    of_state = layout(x.grad.shape) if x.old.is_grouped else None
    if not isinstance(x.grad, StoredGradient):
        return [of_state]
    return [of_state, x.grad.layout]
