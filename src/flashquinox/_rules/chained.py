"""Rules that are two elementwise rules, one after the other."""

import abc
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .rule import AbstractRule, Moment


class AbstractChainedRule(AbstractRule):
    r"""An elementwise rule that is two others in turn, in one pass over a leaf.

    With $\lambda w$ for L2 regularization,

    $$d = \operatorname{before}(g), \quad w \leftarrow (1 - \alpha\lambda) w +
    \operatorname{after}(d + \lambda w)$$
    """

    @property
    @abc.abstractmethod
    def before(self) -> AbstractRule:
        """The rule whose update, for a learning rate of -1, is the direction. Is also
        called on `rule_structure(self)`, where placeholders are in the place of
        numbers; and so is `after`."""

    @property
    @abc.abstractmethod
    def after(self) -> AbstractRule:
        """The rule that takes the direction for its gradient, with the learning rate of
        the step. Its moments have other names."""

    @property
    def moments(self) -> dict[str, Moment]:
        """Those of both rules."""
        moments = {}
        for part, rule in self._rules.items():
            for name, moment in rule.moments.items():
                moments[name] = dataclasses.replace(
                    moment,
                    before=_of(part, moment.before),
                    after=_of(part, moment.after),
                )
        return moments

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        """Those of both rules, named by the rule."""
        minus_one = jnp.asarray(-1, learning_rate.dtype)
        rates = {"before": minus_one, "after": learning_rate}
        return {
            f"{part}.{name}": scalar
            for part, rule in self._rules.items()
            for name, scalar in rule.scalars(count, rates[part]).items()
        }

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
        l2: Float[Array, "*tile"] | None = None,
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        """The update with L2 regularization, or none, added to the direction."""
        new = {}
        for part, rule in self._rules.items():
            start = len(part) + 1
            own = {
                name[start:]: x
                for name, x in scalars.items()
                if name.startswith(f"{part}.")
            }
            of_rule = {name: moments[name] for name in rule.moments}
            grad, moved = rule.update(grad, weight, of_rule, own)
            new |= moved
            if part == "before" and l2 is not None:
                grad = grad + l2
        return grad, new

    @property
    def _rules(self) -> dict[str, AbstractRule]:
        return {"before": self.before, "after": self.after}


def regularized_update(
    rule: AbstractRule,
    grad: Float[Array, "*tile"],
    weight: Float[Array, "*tile"],
    moments: dict[str, Float[Array, "*tile"]],
    scalars: dict[str, Scalar],
    l2: Float[Array, "*tile"],
) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
    """The update of a rule, and its new moments, with L2 regularization where it
    belongs."""
    if isinstance(rule, AbstractChainedRule):
        return rule.update(grad, weight, moments, scalars, l2)
    return rule.update(grad + l2, weight, moments, scalars)


def _of(part: str, scalar: str | None) -> str | None:
    return None if scalar is None else f"{part}.{scalar}"
