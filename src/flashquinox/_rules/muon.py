import math

import equinox as eqx
from jaxtyping import Array, Float, Scalar, ScalarLike

from .bias_correction import bias_correction
from .newton_schulz import (
    Coefficients,
    named_coefficients,
    orthogonalized,
    width_scale,
)
from .rule import AbstractRule, hyperparameter, Moment
from .sgd import SGD
from .whole_leaf import AbstractMatrixRule


class Momentum(AbstractRule):
    r"""An exponential moving average of gradients, with bias correction.

    $$
    m_t = \beta m_{t-1} + (1 - \beta) g_t \qquad u_t = -\alpha_t \cdot
    \begin{cases} m_t / (1 - \beta^t) \\ \beta m_t / (1 - \beta^{t+1}) + (1 - \beta) g_t
    / (1 - \beta^t) & \text{with Nesterov} \end{cases}
    $$

    ??? cite "Reference"

        Nesterov's form is that of Dozat, *Incorporating Nesterov Momentum into Adam*,
        ICLR 2016 Workshop.
    """

    beta: ScalarLike = hyperparameter(0.95, high=1.0)
    nesterov: bool = eqx.field(static=True, default=True)

    @property
    def moments(self) -> dict[str, Moment]:
        return {"momentum": Moment("signed", before="decay", after="one_minus_beta")}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        # `update` has m / (1 - beta).
        share = 1 - self.beta
        scalars = {"decay": self.beta / share, "one_minus_beta": share}
        step, correction = -learning_rate * share, bias_correction(self.beta, count)
        if self.nesterov:
            next_correction = bias_correction(self.beta, count + 1)
            scalars["momentum_step"] = step * self.beta / next_correction
            scalars["grad_step"] = step / correction
        else:
            scalars["momentum_step"] = step / correction
        return scalars

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        momentum = moments["momentum"] + grad
        update = scalars["momentum_step"] * momentum
        if self.nesterov:
            update = update + scalars["grad_step"] * grad
        return update, {"momentum": momentum}


class Muon(AbstractMatrixRule):
    r"""Momentum, orthogonalized by a Newton-Schulz iteration.

    With $d_t$ the update of [`flashquinox.Momentum`][] and $n \times m$ the shape of
    the matrix, from $n$ inputs to $m$ outputs, $u_t = -\alpha_t s X_K$, where

    $$
    X_0 = \frac{d_t}{\|d_t\|_F + \epsilon} \qquad
    X_{k+1} = a_k X_k + (b_k A + c_k A^2) X_k, \quad A = X_k X_k^\top \qquad
    s = \begin{cases} \sqrt{\max(1, m / n)} & \text{without `consistent_rms`} \\
    \rho \sqrt{\max(n, m)} & \text{with } \rho = \text{`consistent_rms`} \end{cases}
    $$

    The products are in bfloat16.

    ??? cite "References"

        Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024,
        [kellerjordan.github.io/posts/muon](https://kellerjordan.github.io/posts/muon/).
        Consistent RMS: Liu et al., *Muon is Scalable for LLM Training*,
        [arXiv:2502.16982](https://arxiv.org/abs/2502.16982), where $\rho = 0.2$.
        `"polar_express"`: Amsel, Persson, Musco and Gower, *The Polar Express: Optimal
        Matrix Sign Methods and Their Application to the Muon Algorithm*,
        [arXiv:2505.16932](https://arxiv.org/abs/2505.16932).
    """

    beta: ScalarLike = hyperparameter(0.95, high=1.0)
    consistent_rms: ScalarLike | None = hyperparameter(None)
    nesterov: bool = eqx.field(static=True, default=True)
    # For each iteration.
    ns_coeffs: tuple[Coefficients, ...] = eqx.field(
        static=True, default=named_coefficients("quintic", 5)
    )
    eps: float = eqx.field(static=True, default=1e-8)
    reduction_axis: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    output_axis: tuple[int, ...] = eqx.field(static=True, default=(-1,))

    @property
    def before(self) -> AbstractRule:
        return Momentum(self.beta, self.nesterov)

    @property
    def after(self) -> AbstractRule:
        return SGD()

    def axes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if max(map(abs, self.reduction_axis + self.output_axis)) > len(shape):
            raise ValueError(
                f"a weight of shape {shape} has no axes {self.reduction_axis} and "
                f"{self.output_axis}, which are those of a matrix. Use "
                "`flashquinox.muon`, which trains such weights by AdamW."
            )
        return self.reduction_axis, self.output_axis

    def scale(self, rows: int, columns: int) -> ScalarLike:
        if self.consistent_rms is None:
            return width_scale(rows, columns)
        return self.consistent_rms * math.sqrt(max(rows, columns))

    def transform(
        self, matrices: Float[Array, "stack rows columns"]
    ) -> Float[Array, "stack rows columns"]:
        return orthogonalized(matrices, self.ns_coeffs, self.eps)
