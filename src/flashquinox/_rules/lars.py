import equinox as eqx
from jaxtyping import Array, Float, Scalar, ScalarLike

from .rule import AbstractRule, hyperparameter, Moment
from .trust_ratio import trust_ratio
from .whole_leaf import AbstractWholeLeafRule


class StepMomentum(AbstractRule):
    r"""Momentum of steps, rather than of gradients: it remembers their learning rates.

    $$
    m_t = \mu m_{t-1} - \alpha_t g_t \qquad
    u_t = \begin{cases} m_t \\ \mu m_t - \alpha_t g_t & \text{with Nesterov}
    \end{cases}
    $$

    ??? cite "Reference"

        Polyak, *Some methods of speeding up the convergence of iteration methods*,
        1964.
    """

    momentum: ScalarLike = hyperparameter(0.9, high=1.0)
    nesterov: bool = eqx.field(static=True, default=False)

    @property
    def moments(self) -> dict[str, Moment]:
        return {"trace": Moment("signed", before="momentum")}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        del count
        return {"momentum": self.momentum, "step": -learning_rate}

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        step = scalars["step"] * grad
        trace = moments["trace"] + step
        update = step + scalars["momentum"] * trace if self.nesterov else trace
        return update, {"trace": trace}


class Lars(AbstractWholeLeafRule):
    r"""Gradient descent with momentum, each gradient scaled to the norm of its leaf.

    With $\lambda$ that of L2 regularization,

    $$
    d_t = g_t + \lambda w_{t-1} \qquad s_t = \alpha_t \eta
    \frac{\|w_{t-1}\|}{\|d_t\| + \epsilon} d_t \qquad
    m_t = \mu m_{t-1} - s_t \qquad u_t = m_t
    $$

    With `nesterov=True`, $u_t = \mu m_t - s_t$. Where one of the norms is 0,
    $s_t = \alpha_t d_t$.

    ??? cite "Reference"

        You, Gitman and Ginsburg, *Large Batch Training of Convolutional Networks*,
        2017, [arXiv:1708.03888](https://arxiv.org/abs/1708.03888), Algorithm 1.
    """

    trust_coefficient: ScalarLike = hyperparameter(0.001)
    eps: ScalarLike = hyperparameter(0.0)
    momentum: ScalarLike = hyperparameter(0.9, high=1.0)
    nesterov: bool = eqx.field(static=True, default=False)

    @property
    def before(self) -> None:
        return None

    @property
    def after(self) -> AbstractRule:
        return StepMomentum(self.momentum, self.nesterov)

    def transform(
        self, direction: Float[Array, "*shape"], weight: Float[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        ratio = trust_ratio(weight, direction, self.trust_coefficient, self.eps)
        return ratio * direction
