"""Directions: what rules that need whole leaves make between the two passes of a
step."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._common import meshes
from .._common.dtypes import compute_dtype
from .._rules.checks import check_like, check_transformed
from .._rules.rule import rule_structure
from .._rules.whole_leaf import (
    AbstractMatrixRule,
    AbstractMeansRule,
    AbstractWholeLeafRule,
)
from .._sharding import state_specs
from .._sharding.matrices import map_matrices
from .part import Part
from .passes import axes_of


if TYPE_CHECKING:
    from .step_in_progress import StepInProgress


def direction_dtype(rule: Any, weight: Array) -> Any:
    """The dtype in which a rule gets the direction of a leaf."""
    dtype = compute_dtype(weight.dtype)
    is_matrix = isinstance(rule, AbstractMatrixRule)
    return jnp.bfloat16 if is_matrix and dtype == jnp.float32 else dtype


def between(
    step: "StepInProgress",
    of: Sequence[Part],
    directions: list[Array],
    masters: list[Array],
    all_finite: Bool[Array, ""] | None,
) -> list[tuple[Array, dict[str, Array]]]:
    """What the rules make of the directions of a batch, and the new means."""
    rule: Any = step.passes[of[0].number].between
    sharding = of[0].sharding
    if isinstance(rule, AbstractMatrixRule):
        axes = axes_of(step.call, rule, step.leaves[of[0].number])
        function = _Transform(rule_structure(rule))  # pyright: ignore
        return [(x, {}) for x in map_matrices(function, axes, sharding, directions)]
    return [
        _transformed(step, *each, all_finite)
        for each in zip(of, directions, masters, strict=True)
    ]


def _transformed(
    step: "StepInProgress",
    x: Part,
    direction: Array,
    master: Array,
    all_finite: Bool[Array, ""] | None,
) -> tuple[Array, dict[str, Array]]:
    """What a rule makes of the direction of a leaf, and the new means."""
    call, passes = step.call, step.passes[x.number]
    cast = lambda n: n.astype(master.dtype) if eqx.is_array(n) else n
    rule: Any = jtu.tree_map(cast, passes.between)
    if isinstance(rule, AbstractWholeLeafRule):
        transformed = rule.transform(direction, master)
        method = f"{type(rule).__name__}.transform"
        what = "the gradient of the second pass"
        check_like(call, method, what, transformed, direction)
        return meshes.as_typed(transformed, x.sharding), {}
    assert isinstance(rule, AbstractMeansRule)
    old = {name: x.old.codes[name] for name in passes.means}
    number = step.settings.number(step.count).astype(master.dtype)
    result = rule.transform(direction, master, old, number)
    check_transformed(call, rule, result, direction, old)
    transformed, new = result
    if all_finite is not None:
        new = {k: jnp.where(all_finite, v, old[k]) for k, v in new.items()}
    if x.sharding is not None:
        new = {
            k: meshes.constrain(v, state_specs.of_array(v.shape, x.sharding))
            for k, v in new.items()
        }
    return meshes.as_typed(transformed, x.sharding), new


class _Transform(NamedTuple):
    """The function of a rule without its numbers, with a hash."""

    rule: AbstractMatrixRule

    def __call__(self, matrices: Float[Array, "stack rows columns"]) -> Array:
        return self.rule.transform(matrices)
