"""An optimizer is three things: a *rule* (which moments it keeps, and how they turn a
gradient into an update), a *codec* (how a moment is stored in 8 bits), and a *split*
(how a float32 weight is stored as a narrow weight plus a correction).

For example, AdamW is `Adam` (the rule) with decoupled weight decay; its first moment is
stored through softsign companding, its second through logarithmic companding; and its
weights are bfloat16 plus an int8 correction.

Only the rule differs between optimizers. It sees float32 arrays of one tile, never
bytes, so the same few lines serve every backend.
"""

import abc
from typing import Any, get_args, Literal, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Scalar, ScalarLike


MomentKind: TypeAlias = Literal["signed", "nonnegative"]


def is_kind(call: str, kind: Any) -> None:
    """Raises if it is none: a codec would take it for one of the two."""
    if kind not in get_args(MomentKind):
        raise ValueError(
            f"`{call}(kind=...)` must be 'signed' or 'nonnegative'; got {kind!r}."
        )


class AbstractRule(eqx.Module):
    r"""The arithmetic of an optimizer, for one element.

    A rule turns a gradient $g$ and the previous moments into an update $u$ and the new
    moments. The weight then becomes

    $$w \leftarrow (1 - \alpha \lambda) \, w + u$$

    where $\lambda$ is the decoupled weight decay and $\alpha$ the learning rate, or,
    for L2 regularization, $w \leftarrow w + u$ with $g + \lambda w$ in place of $g$.
    Decay, masks, schedules, storage and sharding are not the rule's business.

    Numeric hyperparameters are ordinary fields: they may be traced arrays. Everything
    that changes the structure of the computation (`nesterov`, say) must be a static
    field.

    ??? Example

        Heavy-ball momentum in a dozen lines:

        ```python
        class HeavyBall(fq.AbstractRule):
            momentum: float = 0.9

            @property
            def moments(self):
                return {"trace": "signed"}

            def scalars(self, count, learning_rate):
                return {"momentum": self.momentum, "step": -learning_rate}

            def update(self, grad, weight, moments, scalars):
                trace = scalars["momentum"] * moments["trace"] + grad
                return scalars["step"] * trace, {"trace": trace}

        optim = fq.optimizer(HeavyBall(0.9), learning_rate=1e-2)
        ```
    """

    @property
    @abc.abstractmethod
    def moments(self) -> dict[str, MomentKind]:
        """The names of the moments this rule keeps, each with its kind: `"signed"`, or
        `"nonnegative"` for averages of squares. The names are the keys of
        `OptimizerState.moments`.
        """

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """For each hyperparameter that has one, its valid range `low <= value < high`.
        Checked when the optimizer is built, wherever the value is concrete.
        """
        return {}

    @property
    def factors(self) -> dict[str, tuple[str | None, str | None]]:
        r"""For moments that need it, the names of two of `scalars`: what the stored
        moment is multiplied by before `update` sees it, and what the one that `update`
        returns is multiplied by before it is stored. `None` is 1.

        Of a compressed moment these products are free, as they go into the scales of
        its groups: with $\beta / (1 - \beta)$ and $1 - \beta$, an exponential moving
        average $m \leftarrow \beta m + (1 - \beta) x$ is one addition of $x$.
        """
        return {}

    @abc.abstractmethod
    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        """Is called once per step, to compute everything that is the same for all
        elements. Fold as much as possible in here.

        **Arguments:**

        - `count`: the number of this step, counted from 1, as a float.
        - `learning_rate`: the learning rate of this step.

        **Returns:**

        A dictionary of scalars, passed on to `update`.
        """

    @abc.abstractmethod
    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        """Is called for every tile of every leaf, possibly inside a kernel: elementwise
        arithmetic only, which [`flashquinox.optimizer`][] checks. Numeric fields of
        `self` are not available here; pass them through `scalars`.

        **Arguments:**

        - `grad`: the gradient, with L2 regularization already added.
        - `weight`: the master weight before this step.
        - `moments`: the decoded moments of the previous step, times their factors.
        - `scalars`: what the method `scalars` returned.

        **Returns:**

        A 2-tuple of the update, which is *added* to the weight, and the new moments,
        before their factors.
        """


class _Withheld:
    """Stands for a numeric hyperparameter where only the rule's structure is wanted."""

    def __repr__(self) -> str:
        return "<hyperparameter: use `scalars`>"


_withheld = _Withheld()


def _is_numeric(x: object) -> bool:
    return eqx.is_array_like(x) and not isinstance(x, bool)


def rule_structure(rule: AbstractRule) -> AbstractRule:
    """The rule without its numbers: hashable, free of tracers, safe to close over."""
    return jtu.tree_map(lambda x: _withheld if _is_numeric(x) else x, rule)


def rule_scalars(
    rule: AbstractRule, count: Scalar, learning_rate: Scalar, dtype: DTypeLike
) -> dict[str, Scalar]:
    """`rule.scalars` in the precision `dtype`. Python numbers stay Python numbers, so
    that `1 - b2` is rounded once only.
    """
    scalars = raw_scalars(rule, count, learning_rate, dtype)
    return {name: jnp.asarray(value, dtype) for name, value in scalars.items()}


def raw_scalars(
    rule: AbstractRule, count: Scalar, learning_rate: Scalar, dtype: DTypeLike
) -> Any:
    """The same as the rule returns it, whatever that is."""
    cast = lambda x: x.astype(dtype) if eqx.is_array(x) else x
    return jtu.tree_map(cast, rule).scalars(
        jnp.asarray(count, dtype), jnp.asarray(learning_rate, dtype)
    )
