import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .rule import AbstractRule, hyperparameter, Moment


class RMSProp(AbstractRule):
    r"""Gradients divided by the root of an average of their squares.

    $$
    \begin{aligned} v_t &= \beta v_{t-1} + (1 - \beta) g_t^2 \\
    s_t &= \alpha_t \frac{g_t}{\sqrt{v_t + \epsilon}} \end{aligned} \qquad u_t = -s_t
    $$

    With momentum $\mu$, $m_t = \mu m_{t-1} - s_t$, and $u_t = m_t$; with
    `nesterov=True`, $u_t = \mu m_t - s_t$.

    ??? cite "References"

        Hinton, *Overview of mini-batch gradient descent*, 2012. Momentum: Graves,
        *Generating Sequences With Recurrent Neural Networks*,
        [arXiv:1308.0850](https://arxiv.org/abs/1308.0850).
    """

    decay: ScalarLike = hyperparameter(0.9, high=1.0)
    eps: ScalarLike = hyperparameter(1e-8)
    momentum: ScalarLike | None = hyperparameter(None, high=1.0)
    nesterov: bool = eqx.field(static=True, default=False)

    @property
    def moments(self) -> dict[str, Moment]:
        moments = {"nu": Moment("nonnegative")}
        if self.momentum is not None:
            moments["trace"] = Moment("signed", before="momentum")
        return moments

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        del count
        scalars = {"decay": self.decay, "rest": 1 - self.decay, "eps": self.eps}
        if self.momentum is not None:
            scalars["momentum"] = self.momentum
        return scalars | {"step": -learning_rate}

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        nu = scalars["decay"] * moments["nu"] + scalars["rest"] * (grad * grad)
        step = scalars["step"] * grad / jnp.sqrt(nu + scalars["eps"])
        if self.momentum is None:
            return step, {"nu": nu}
        trace = moments["trace"] + step
        update = step + scalars["momentum"] * trace if self.nesterov else trace
        return update, {"nu": nu, "trace": trace}
