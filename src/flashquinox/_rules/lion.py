import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .rule import AbstractRule, hyperparameter, Moment


class Lion(AbstractRule):
    r"""The sign of an interpolation between momentum and gradient.

    $$
    \begin{aligned}
    u_t &= -\alpha_t \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t) \\
    m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t
    \end{aligned}
    $$

    ??? cite "Reference"

        Chen et al., *Symbolic Discovery of Optimization Algorithms*, NeurIPS 2023,
        [arXiv:2302.06675](https://arxiv.org/abs/2302.06675), Program 1.
    """

    b1: ScalarLike = hyperparameter(0.9, high=1.0)
    b2: ScalarLike = hyperparameter(0.99, high=1.0)

    @property
    def moments(self) -> dict[str, Moment]:
        return {"mu": Moment("signed", before="decay", after="one_minus_b2")}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        del count
        # `update` has b2 m / (1 - b2), and divides what it takes the sign of by 1 - b1.
        # With b2 = 0, something that is lost in any sum.
        decay = jnp.maximum(self.b2 / (1 - self.b2), 1e-20)
        return {
            "decay": decay,
            "one_minus_b2": 1 - self.b2,
            "direction": self.b1 / (1 - self.b1) / decay,
            "step": -learning_rate,
        }

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        direction = scalars["direction"] * moments["mu"] + grad
        mu = moments["mu"] + grad
        return scalars["step"] * jnp.sign(direction), {"mu": mu}
