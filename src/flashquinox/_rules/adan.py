import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .bias_correction import bias_correction
from .rule import AbstractRule, hyperparameter, Moment


class Adan(AbstractRule):
    r"""Adaptive Nesterov momentum: beside the gradients, the differences of subsequent
    gradients are averaged.

    With $d_t = g_t - g_{t-1}$, and $d_1 = 0$,

    $$
    \begin{aligned}
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) d_t \\
    n_t &= \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 d_t)^2 \\
    u_t &= -\alpha_t \frac{m_t / (1 - \beta_1^t) + \beta_2 v_t / (1 - \beta_2^t)}
    {\sqrt{n_t / (1 - \beta_3^t) + \bar\epsilon} + \epsilon}
    \end{aligned}
    $$

    The previous gradient $g_{t-1}$ is kept as it is, in float32: a difference of
    rounded gradients would be mostly rounding.

    The $\beta$ are decay rates, as in the authors' code and in Optax: 1 less those of
    the paper. Optax 0.2.8 has $1 - \beta_2$ where $\beta_2$ multiplies $d_t$ and $v_t$,
    which is the paper's only for $\beta_2 = 1/2$.

    ??? cite "Reference"

        Xie et al., *Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing
        Deep Models*, TPAMI 2024, [arXiv:2208.06677](https://arxiv.org/abs/2208.06677),
        Algorithm 1. The bias corrections are those of the authors' code.
    """

    b1: ScalarLike = hyperparameter(0.98, high=1.0)
    b2: ScalarLike = hyperparameter(0.92, high=1.0)
    b3: ScalarLike = hyperparameter(0.99, high=1.0)
    eps: ScalarLike = hyperparameter(1e-8)
    eps_root: ScalarLike = hyperparameter(1e-8)

    @property
    def moments(self) -> dict[str, Moment]:
        return {
            "m": Moment(
                "signed", before="decay1", after="one_minus_b1", relative_to="n"
            ),
            "v": Moment(
                "signed", before="decay2", after="one_minus_b2", relative_to="n"
            ),
            "n": Moment("nonnegative"),
            "g": Moment("signed", kept="exact"),
        }

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        # As in Adam: with r = sqrt(1 - b3^t), the numerator and eps are multiplied by
        # r, and `update` has m / (1 - b1) and v / (1 - b2).
        correction3 = bias_correction(self.b3, count)
        root_correction3 = jnp.sqrt(correction3)
        step = -learning_rate * root_correction3
        m_step = step * (1 - self.b1) / bias_correction(self.b1, count)
        v_step = step * (1 - self.b2) / bias_correction(self.b2, count)
        return {
            "decay1": self.b1 / (1 - self.b1),
            "one_minus_b1": 1 - self.b1,
            "decay2": self.b2 / (1 - self.b2),
            "one_minus_b2": 1 - self.b2,
            "b2": self.b2,
            "b3": self.b3,
            "one_minus_b3": 1 - self.b3,
            "eps": self.eps * root_correction3,
            "eps_root": self.eps_root * correction3,
            # The first gradient has none before it.
            "has_previous": jnp.where(count == 1, 0, 1),
            "m_step": m_step,
            "v_step": self.b2 * v_step,
        }

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        difference = scalars["has_previous"] * (grad - moments["g"])
        m = moments["m"] + grad
        v = moments["v"] + difference
        ahead = grad + scalars["b2"] * difference
        n = scalars["b3"] * moments["n"] + scalars["one_minus_b3"] * (ahead * ahead)
        numerator = scalars["m_step"] * m + scalars["v_step"] * v
        root = jnp.sqrt(n + scalars["eps_root"])
        update = numerator / (root + scalars["eps"])
        return update, {"m": m, "v": v, "n": n, "g": grad}
