"""Counts of steps in the states of Optax."""

from typing import Any

import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from .._common.placement import put_like
from .._optimizer.states import find


# Wrappers that count calls, and the field with the count. It stands for the count of
# steps where nothing else counts them.
CALL_COUNTERS: dict[Any, str] = {
    optax.MultiStepsState: "gradient_step",
    optax.InjectStatefulHyperparamsState: "count",
    optax.InjectHyperparamsState: "count",
}


def counts_of_steps(tree: PyTree, moments: Any) -> list[Any]:
    """All counts of steps in a state. They must be equal."""
    field = count_field(moments)
    counts = [] if field is None else [getattr(moments, field)]
    counts += [x.count for kind in schedule_states() for x in find(tree, kind).values]
    if counts:
        return counts
    for kind, field in CALL_COUNTERS.items():
        counts += [getattr(x, field) for x in find(tree, kind).values]
    return counts[:1]


def schedule_states() -> tuple[Any, ...]:
    """The states of schedules: in a chain, and in `optax.inject_hyperparams`."""
    wrapped = optax.schedules.WrappedSchedule(lambda count: count)
    return optax.ScaleByScheduleState, type(wrapped.init())


def count_field(moments: Any) -> str | None:
    """The field with the count of steps in a state with moments; `None` if it has
    none."""
    # `count` is a method of every tuple, so the fields tell. Adan's count is `t`.
    fields = getattr(moments, "_fields", ())
    return next((name for name in ("count", "t") if name in fields), None)


def the_one_count(call: str, counts: list[Any]) -> Any:
    shapes = [jnp.shape(x) for x in counts]
    if any(shapes):
        raise ValueError(
            f"`{call}`: the count of steps in `optax_state` has shape {max(shapes)}, "
            "where that of one model is a scalar. Convert an ensemble under `jax.vmap`."
        )
    known = sorted({int(x) for x in counts if not is_traced(x)})
    if len(known) > 1:
        raise ValueError(
            f"`{call}`: the optimizer and the schedules of `optax_state` have counted "
            f"different numbers of steps, {known}, of which a state here can keep one. "
            "Set them to the same with `optax.tree.set`."
        )
    return counts[0] if counts else None


def with_counts(call: str, tree: PyTree, count: Any) -> PyTree:
    """A state in which every counter of steps or calls has this count."""
    for kind, field in (
        CALL_COUNTERS | dict.fromkeys(schedule_states(), "count")
    ).items():
        is_leaf = lambda x, kind=kind: isinstance(x, kind)

        def count_here(x: Any, is_leaf: Any = is_leaf, field: str = field) -> Any:
            if not is_leaf(x):
                return x
            return x._replace(**{field: as_count(call, count, getattr(x, field))})

        tree = jtu.tree_map(count_here, tree, is_leaf=is_leaf)
    return tree


def as_count(call: str, count: Any, like: Any) -> Any:
    """A count as an int32 array where `like` is; numbers too large for that become its
    largest."""
    if not is_traced(count):
        count = min(int(count), jnp.iinfo(jnp.int32).max)
    return put_like(call, "count", jnp.asarray(count, jnp.int32), like)


def is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)
