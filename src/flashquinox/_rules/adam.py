import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .bias_correction import bias_correction
from .rule import AbstractRule, hyperparameter, Moment


class Adam(AbstractRule):
    r"""Adaptive moment estimation.

    $$
    \begin{aligned} m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\ v_t &= \beta_2 v_{t-1}
    + (1 - \beta_2) g_t^2 \\ u_t &= -\alpha_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t /
    (1 - \beta_2^t)} + \epsilon} \end{aligned}
    $$

    With `nesterov=True`, $m_t / (1 - \beta_1^t)$ is replaced by
    $\beta_1 m_t / (1 - \beta_1^{t+1}) + (1 - \beta_1) g_t / (1 - \beta_1^t)$.

    ??? cite "References"

        Kingma and Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015,
        [arXiv:1412.6980](https://arxiv.org/abs/1412.6980), Algorithm 1. Nesterov:
        Dozat, *Incorporating Nesterov Momentum into Adam*, ICLR 2016 Workshop.
    """

    b1: ScalarLike = hyperparameter(0.9, high=1.0)
    b2: ScalarLike = hyperparameter(0.999, high=1.0)
    eps: ScalarLike = hyperparameter(1e-8)
    nesterov: bool = eqx.field(static=True, default=False)

    @property
    def moments(self) -> dict[str, Moment]:
        return {
            "mu": Moment(
                "signed", before="decay", after="one_minus_b1", relative_to="nu"
            ),
            "nu": Moment("nonnegative"),
        }

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        # With r = sqrt(1 - b2^t): m/(sqrt(v)/r + eps) = m r / (sqrt(v) + eps r).
        root_correction2 = jnp.sqrt(bias_correction(self.b2, count))
        correction1 = bias_correction(self.b1, count)
        step = -learning_rate * root_correction2
        scalars = {
            "decay": self.b1 / (1 - self.b1),
            "one_minus_b1": 1 - self.b1,
            "b2": self.b2,
            "one_minus_b2": 1 - self.b2,
            "eps": self.eps * root_correction2,
        }
        # `update` has m / (1 - b1).
        step = step * (1 - self.b1)
        if self.nesterov:
            next_correction1 = bias_correction(self.b1, count + 1)
            scalars["mu_step"] = step * self.b1 / next_correction1
            scalars["grad_step"] = step / correction1
        else:
            scalars["mu_step"] = step / correction1
        return scalars

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        mu = moments["mu"] + grad
        nu = scalars["b2"] * moments["nu"] + scalars["one_minus_b2"] * (grad * grad)
        numerator = scalars["mu_step"] * mu
        if self.nesterov:
            numerator = numerator + scalars["grad_step"] * grad
        update = numerator / (jnp.sqrt(nu) + scalars["eps"])
        return update, {"mu": mu, "nu": nu}
