import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .bias_correction import bias_correction
from .rule import AbstractRule, hyperparameter, Moment
from .saturate import saturate


class AdEMAMix(AbstractRule):
    r"""Adam with a second, much slower average of gradients.

    $$
    \begin{aligned} m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
    s_t &= \beta_3 s_{t-1} + (1 - \beta_3) g_t \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    u_t &= -\alpha_t \frac{m_t / (1 - \beta_1^t) + a s_t}
    {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \end{aligned}
    $$

    The moments $m$ and $s$ are `m1` and `m2`, as in Optax. The slow one is kept as it
    is, in float32. The paper's schedules of $a$
    and $\beta_3$ are `optax.inject_hyperparams`.

    ??? cite "Reference"

        Pagliardini, Ablin and Grangier, *The AdEMAMix Optimizer: Better, Faster,
        Older*, [arXiv:2409.03137](https://arxiv.org/abs/2409.03137), Algorithm 1.
    """

    b1: ScalarLike = hyperparameter(0.9, high=1.0)
    b2: ScalarLike = hyperparameter(0.999, high=1.0)
    b3: ScalarLike = hyperparameter(0.9999, high=1.0)
    alpha: ScalarLike = hyperparameter(5.0)
    eps: ScalarLike = hyperparameter(1e-8)

    @property
    def moments(self) -> dict[str, Moment]:
        return {
            "m1": Moment(
                "signed", before="decay1", after="one_minus_b1", relative_to="nu"
            ),
            # It forgets so slowly that the noise of rounded codes would add up.
            "m2": Moment("signed", before="decay3", after="one_minus_b3", kept="exact"),
            "nu": Moment("nonnegative"),
        }

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        # As in Adam: with r = sqrt(1 - b2^t), the numerator and eps are multiplied by
        # r, and `update` has m / (1 - b1) and s / (1 - b3).
        root_correction2 = jnp.sqrt(bias_correction(self.b2, count))
        step = -learning_rate * root_correction2
        return {
            "decay1": self.b1 / (1 - self.b1),
            "one_minus_b1": 1 - self.b1,
            "decay3": self.b3 / (1 - self.b3),
            "one_minus_b3": 1 - self.b3,
            "b2": self.b2,
            "one_minus_b2": 1 - self.b2,
            "eps": self.eps * root_correction2,
            "m1_step": step * (1 - self.b1) / bias_correction(self.b1, count),
            "m2_step": step * (1 - self.b3) * self.alpha,
        }

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        # The stored average of squares ends there. Beside it, the slow moment of a
        # larger gradient would be a huge update.
        grad = saturate(grad)
        m1, m2 = moments["m1"] + grad, moments["m2"] + grad
        nu = scalars["b2"] * moments["nu"] + scalars["one_minus_b2"] * (grad * grad)
        numerator = scalars["m1_step"] * m1 + scalars["m2_step"] * m2
        update = numerator / (jnp.sqrt(nu) + scalars["eps"])
        return update, {"m1": m1, "m2": m2, "nu": nu}
