"""The passes of a step over a leaf: one for most rules, and two for those that need
whole leaves, with a function of the leaf between them."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Scalar

from .._common.dtypes import compute_dtype
from .._model.trees import Leaf
from .._rules.rule import AbstractRule, Moment, moments_of, rule_structure
from .._rules.whole_leaf import (
    AbstractMatrixRule,
    AbstractMeansRule,
    AnyRule,
    WholeLeafRule,
)
from .._sharding.matrices import MatrixAxes
from .groups import LeafRule
from .settings import Rates, Settings


class Pass(NamedTuple):
    """An elementwise rule without its numbers, its moments and its scalars, and what
    applies weight decay."""

    rule: AbstractRule
    moments: dict[str, Moment]
    scalars: dict[str, Scalar]
    decay: Scalar | None
    is_decoupled: bool


class Passes(NamedTuple):
    """`last` changes the weight. Of a rule that needs whole leaves, `first` makes the
    direction, if anything does, and `between` is the rule, with its numbers."""

    first: Pass | None
    between: WholeLeafRule | None
    # The coefficient of L2 regularization, which is added to a direction.
    l2: Scalar | None
    last: Pass
    # Those of all.
    moments: dict[str, Moment]

    # Those of them that are means, which `between` updates.
    means: dict[str, Moment]

    @staticmethod
    def of(
        first: Pass | None, between: WholeLeafRule | None, l2: Scalar | None, last: Pass
    ) -> "Passes":
        means = between.means if isinstance(between, AbstractMeansRule) else {}
        moments = {} if first is None else first.moments
        return Passes(first, between, l2, last, moments | last.moments | means, means)


@dataclasses.dataclass(frozen=True)
class PassMaker:
    """Makes the passes of all leaves in one step. Leaves that are trained alike share
    them, and others with the same rule its scalars."""

    call: str
    settings: Settings
    rates: list[Rates]
    count: Scalar
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def of_leaf(self, leaf: Leaf, rule: LeafRule, decays: bool) -> Passes:
        dtype = compute_dtype(leaf.value.dtype)
        # Of matrices, the learning rate depends on the shape.
        is_matrix = isinstance(rule.rule, AbstractMatrixRule)
        shape = leaf.value.shape if is_matrix else None
        key = "leaf", rule.group, id(rule.rule), dtype, decays, shape
        if key not in self.made:
            self.made[key] = self._passes(leaf, rule, dtype, decays)
        return self.made[key]

    def _passes(
        self, leaf: Leaf, rule: LeafRule, dtype: DTypeLike, decays: bool
    ) -> Passes:
        """`dtype` is that in which the leaf computes."""
        decay = self._once(("decay", rule.group, dtype), self._decay, rule.group, dtype)
        decay = decay if decays else None
        decoupled = self.settings.groups[rule.group].decay.is_decoupled
        if isinstance(rule.rule, AbstractRule):
            only = self._pass(rule, "only", dtype, (decay, decoupled))
            return Passes.of(None, None, None, only)
        first, scale = None, None
        if rule.rule.before is not None:
            first = self._pass(rule, "before", dtype, (None, True))
        if isinstance(rule.rule, AbstractMatrixRule):
            scale = axes_of(self.call, rule.rule, leaf).size(leaf.value.shape)
        own = decay if decoupled else None
        last = self._pass(rule, "after", dtype, (own, decoupled), scale)
        return Passes.of(first, rule.rule, None if decoupled else decay, last)

    def _pass(
        self,
        rule: LeafRule,
        name: str,
        dtype: Any,
        decay: tuple[Scalar | None, bool],
        shape: tuple[int, int] | None = None,
    ) -> Pass:
        def make() -> tuple[AbstractRule, dict[str, Scalar]]:
            own: Any = rule.rule if name == "only" else getattr(rule.rule, name)
            rate: Any = self.rates[rule.group][0]
            if name == "before":
                rate = -1.0
            rate = jnp.asarray(rate, dtype)
            if shape is not None:
                rate = rate * jnp.asarray(rule.rule.scale(*shape), dtype)  # pyright: ignore
            scalars = self.settings.scalars(own, rate, self.count, dtype)
            return rule_structure(own), scalars

        structure, scalars = self._once((name, rule.group, dtype, shape), make)
        return Pass(structure, moments_of(structure), scalars, *decay)

    def _decay(self, group: int, dtype: Any) -> Scalar | None:
        return self.settings.decay_scalar(group, self.rates[group], dtype)

    def _once(self, key: Any, make: Any, *args: Any) -> Any:
        if key not in self.made:
            self.made[key] = make(*args)
        return self.made[key]


def all_passes(
    call: str,
    settings: Settings,
    rates: list[Rates],
    count: Scalar,
    leaves: list[Leaf],
    rules: list[LeafRule],
    decayed: list[bool],
    trained: list[int],
) -> dict[int, Passes]:
    """The passes of all leaves that are trained, in the step after so many."""
    maker = PassMaker(call, settings, rates, count)
    return {i: maker.of_leaf(leaves[i], rules[i], decayed[i]) for i in trained}


def axes_of(call: str, rule: AbstractMatrixRule, leaf: Leaf) -> MatrixAxes:
    """The axes of the matrices of a leaf."""
    try:
        return MatrixAxes(*rule.axes(leaf.value.shape))
    except ValueError as error:
        raise ValueError(f"`{call}`: at `{leaf.name}`, {error}") from None


def check_has_axes(call: str, rule: AbstractMeansRule, leaf: Leaf) -> None:
    """A leaf must have the axes over which a rule keeps means of it."""
    for moment in rule.means.values():
        try:
            moment.shape(leaf.value.shape)
        except ValueError as error:
            raise ValueError(f"`{call}`: at `{leaf.name}`, {error}") from None


def layers_are_apart(call: str, rule: AnyRule, leaf: Leaf) -> bool:
    """Whether the entries along the first axis of a leaf may be updated one by one: of
    rules that need whole leaves, only matrices."""
    if isinstance(rule, AbstractRule):
        return True
    if not isinstance(rule, AbstractMatrixRule):
        return False
    return -leaf.value.ndim not in axes_of(call, rule, leaf).of_matrix
