import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .._common.number_checks import is_zero
from .rule import AbstractRule, hyperparameter, Moment


class SGD(AbstractRule):
    r"""Gradient descent, with momentum if wanted.

    Without momentum, $u_t = -\alpha_t g_t$, and nothing is stored. With momentum $\mu$
    and dampening $\tau$,

    $$
    m_t = \begin{cases} g_t & t = 1 \\ \mu m_{t-1} + (1 - \tau) g_t & t > 1 \end{cases}
    \qquad u_t = -\alpha_t \cdot
    \begin{cases} m_t \\ g_t + \mu m_t & \text{with Nesterov} \end{cases}
    $$

    ??? cite "References"

        Sutskever, Martens, Dahl and Hinton, *On the importance of initialization and
        momentum in deep learning*, ICML 2013. The form is that of `torch.optim.SGD`,
        dampening and first step included.
    """

    momentum: ScalarLike | None = hyperparameter(None, high=1.0)
    dampening: ScalarLike = hyperparameter(0.0, high=1.0)
    nesterov: bool = eqx.field(static=True, default=False)

    @property
    def moments(self) -> dict[str, Moment]:
        if self.momentum is None:
            return {}
        return {"trace": Moment("signed", before="momentum")}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        scalars: dict[str, ScalarLike] = {"step": -learning_rate}
        if self.momentum is not None:
            scalars["momentum"] = self.momentum
            if not is_zero(self.dampening):
                scalars["grad"] = jnp.where(count == 1, 1, 1 - self.dampening)
        return scalars

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        if self.momentum is None:
            return scalars["step"] * grad, {}
        dampened = scalars["grad"] * grad if "grad" in scalars else grad
        trace = moments["trace"] + dampened
        direction = grad + scalars["momentum"] * trace if self.nesterov else trace
        return scalars["step"] * direction, {"trace": trace}
