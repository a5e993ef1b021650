"""Putting a model and its state together, after a step."""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from .._common import memory
from .._sharding import record
from .checksums import checksums
from .state import OptimizerState, StepCount
from .step_in_progress import StepInProgress


def close_step(
    step: StepInProgress,
    all_finite: Bool[Array, ""] | None,
    updates_of: Collection[int] | None = None,
) -> tuple[PyTree, OptimizerState]:
    """The new model and the new state. A step of gradients that were not all finite
    does not count. With `updates_of`, the updates of these leaves in place of the
    model, and `None` for all others."""
    count = jnp.asarray(optax.safe_increment(step.count))
    if all_finite is not None:
        count = jnp.where(all_finite, count, step.count)
    values: list[Any] = [leaf.value for leaf in step.leaves]
    moments: dict[str, list[Any]] = {
        name: [None for _ in values] for name in step.moments
    }
    corrections: list[Any] = [None for _ in values]
    for index, stored in step.stored.items():
        of_leaf, corrections[index] = stored.moments, stored.correction
        if index in step.new:
            new = step.new[index]
            corrections[index] = new.correction
            if new.weight is not None:
                values[index] = new.weight
            of_leaf = stored.put_together(new, step.learned[index])
        for name, moment in of_leaf.items():
            moments[name][index] = moment
    if updates_of is not None:
        values = [x if i in updates_of else None for i, x in enumerate(values)]
    return step.rebuild(values), OptimizerState(
        steps=StepCount(memory.where(count, step.old_count)),
        moments={name: step.rebuild.state(x) for name, x in moments.items()},
        corrections=step.rebuild.state(corrections),
        shardings=record.record(step.leaves, step.shardings, step.recorded),
        checksums=_new_checksums(step, as_update=updates_of is not None),
        weight_dtypes=step.weight_dtypes,
        packing=step.packing,
    )


def _new_checksums(step: StepInProgress, as_update: bool) -> PyTree:
    if step.settings.verify_weights is None:
        return None
    new: list[Any] = [None for _ in step.leaves]
    for index, stored in step.stored.items():
        new[index] = stored.checksum
    changed = [i for i in sorted(step.new) if new[i] is not None]
    held = [step.new[i].weight for i in changed]
    if as_update:
        # As the caller will round them.
        held = [
            jnp.asarray(step.leaves[i].value) + update
            for i, update in zip(changed, held, strict=True)
        ]
    for index, x in zip(changed, checksums(held), strict=True):
        new[index] = memory.where(x, new[index])
    return step.rebuild.state(new)
