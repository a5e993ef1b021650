from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .bias_correction import bias_correction
from .chained import AbstractChainedRule
from .rule import AbstractRule, hyperparameter, Moment


class ScheduleFreeAdamW(AbstractChainedRule):
    r"""Adam's second moment with an average of all iterates in place of momentum, and
    of a schedule.

    The weight is $y$, where gradients are taken. With $\lambda$ that of weight decay,
    $z_0 = x_0 = y_0$, and $\gamma_t = \alpha_t \min(1, (t - 1) / T)$ where there are
    $T$ `warmup_steps`,

    $$
    \begin{aligned} v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    z_t &= z_{t-1} - \gamma_t \left(\frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}
    + \lambda y_{t-1}\right) \\
    x_t &= (1 - c_t) x_{t-1} + c_t z_t \\
    y_t &= (1 - \beta_1) z_t + \beta_1 x_t \end{aligned}
    $$

    $c_t = w_t / \sum_{i \le t} w_i$ with $w_t = \min(1, t / T)^2$: without warm-up, $x$
    is the mean of all $z$. $x$ is what to evaluate:
    [`flashquinox.schedule_free_weights`][].

    One moment, the offset $x_t - y_t$, is kept as it is, in float32; $z_t$ follows from
    it and the weight. It is small beside the weight, so that steps of $z$ that are much
    less than the precision of a bfloat16 weight are not lost.

    ??? cite "Reference"

        Defazio et al., *The Road Less Scheduled*, NeurIPS 2024,
        [arXiv:2405.15682](https://arxiv.org/abs/2405.15682), Algorithm 1. The warm-up
        is that of Optax.
    """

    b1: ScalarLike = hyperparameter(0.9, high=1.0)
    b2: ScalarLike = hyperparameter(0.999, high=1.0)
    eps: ScalarLike = hyperparameter(1e-8)
    warmup_steps: int = eqx.field(static=True, default=0)

    @property
    def before(self) -> AbstractRule:
        return _Normalized(self.b2, self.eps)

    @property
    def after(self) -> AbstractRule:
        return _Averaged(self.b1, self.warmup_steps)


class _Normalized(AbstractRule):
    """The gradient over the root of the second moment."""

    # Numbers, or their placeholders in the structure of a rule.
    b2: Any
    eps: Any

    @property
    def moments(self) -> dict[str, Moment]:
        return {"nu": Moment("nonnegative")}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        # As in Adam: numerator and eps are multiplied by r = sqrt(1 - b2^t).
        root_correction2 = jnp.sqrt(bias_correction(self.b2, count))
        return {
            "b2": self.b2,
            "one_minus_b2": 1 - self.b2,
            "eps": self.eps * root_correction2,
            "step": -learning_rate * root_correction2,
        }

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        nu = scalars["b2"] * moments["nu"] + scalars["one_minus_b2"] * (grad * grad)
        return scalars["step"] * grad / (jnp.sqrt(nu) + scalars["eps"]), {"nu": nu}


class _Averaged(AbstractRule):
    """The step of z, and the average of all z."""

    # A number, or its placeholder.
    b1: Any
    warmup_steps: int = eqx.field(static=True)

    @property
    def moments(self) -> dict[str, Moment]:
        return {"offset": Moment("signed", kept="exact")}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        share, step = 1 / count, -learning_rate
        if self.warmup_steps > 0:
            # The sum of the first n squares is n (n + 1) (2 n + 1) / 6.
            steps = jnp.asarray(self.warmup_steps, count.dtype)
            total = (steps + 1) * (2 * steps + 1) / (6 * steps) + count - steps
            share = jnp.where(
                count < steps, 6 * count / ((count + 1) * (2 * count + 1)), 1 / total
            )
            step = step * jnp.minimum(1, (count - 1) / steps)
        # The gap is z - x. As y = (1 - b1) z + b1 x, the offset x - y is b1 - 1 times
        # the gap, and y - x is 1 - b1 times it.
        behind = (1 - self.b1) * (1 - share)
        return {
            "step": step,
            "gap": -1 / (1 - self.b1),
            "offset": -behind,
            "ahead": share + behind,
        }

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        # From the new z to the old x, which is averaged with it then.
        gap = scalars["gap"] * moments["offset"] + scalars["step"] * grad
        update = moments["offset"] + scalars["ahead"] * gap
        return update, {"offset": scalars["offset"] * gap}
