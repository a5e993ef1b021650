import math

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .rule import AbstractRule, hyperparameter, Moment
from .saturate import saturate
from .sgd import SGD
from .whole_leaf import AbstractMeansRule


# The smallest scale of a leaf, by the paper.
_SMALLEST_SCALE = 1e-3
# A gradient's square counts in the means of its row and its column, and by these in all
# updates of its leaf. Their squares are as large again as that, so the sums of a leaf
# of 2^30 elements are finite.
_LARGEST_OF_LEAF = 2.0**48


class GrowingMeanSquare(AbstractRule):
    r"""A gradient over the root of its mean square, whose decay rate grows.

    $$
    v_t = \beta_t v_{t-1} + (1 - \beta_t)(g_t^2 + \epsilon) \qquad
    u_t = -\alpha_t \frac{g_t}{\sqrt{v_t}} \qquad \beta_t = 1 - (t - t_0)^{-\gamma}
    $$

    ??? cite "Reference"

        Shazeer and Stern, [arXiv:1804.04235](https://arxiv.org/abs/1804.04235),
        section 7.2.
    """

    decay_rate: ScalarLike = hyperparameter(0.8)
    decay_offset: ScalarLike = hyperparameter(0.0)
    eps: ScalarLike = hyperparameter(1e-30)

    @property
    def moments(self) -> dict[str, Moment]:
        return {"v": Moment("nonnegative", before="decay", after="share")}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        # `update` has v / (1 - beta).
        share = _share(count, self.decay_rate, self.decay_offset)
        return {
            "decay": (1 - share) / share,
            "share": share,
            "eps": self.eps,
            "step": -learning_rate / jnp.sqrt(share),
        }

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        grad = saturate(grad)
        v = moments["v"] + (grad * grad + scalars["eps"])
        return scalars["step"] * grad / jnp.sqrt(v), {"v": v}


class StepAverage(AbstractRule):
    r"""An exponential moving average of steps, rather than of gradients.

    $$
    m_t = \mu m_{t-1} - (1 - \mu) \alpha_t g_t \qquad u_t = m_t
    $$

    ??? cite "Reference"

        Shazeer and Stern, [arXiv:1804.04235](https://arxiv.org/abs/1804.04235),
        section 2, of the momentum of an update.
    """

    momentum: ScalarLike = hyperparameter(0.9, high=1.0)

    @property
    def moments(self) -> dict[str, Moment]:
        return {"momentum": Moment("signed", before="decay", after="share")}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        del count
        # `update` has m / (1 - mu).
        share = 1 - self.momentum
        decay = self.momentum / share
        return {"decay": decay, "share": share, "step": -learning_rate}

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        momentum = moments["momentum"] + scalars["step"] * grad
        return scalars["share"] * momentum, {"momentum": momentum}


class Adafactor(AbstractMeansRule):
    r"""Gradients over the root of their mean square, of which only the means over rows
    and over columns are kept; each update scaled to the size of its leaf.

    For a leaf with two `axes`, $i$ along the first and $j$ along the second,

    $$
    r_{i,t} = \beta_t r_{i,t-1} + (1 - \beta_t) \operatorname*{mean}_j
    (g_{ij,t}^2 + \epsilon) \qquad
    c_{j,t} = \beta_t c_{j,t-1} + (1 - \beta_t) \operatorname*{mean}_i
    (g_{ij,t}^2 + \epsilon)
    $$

    $$
    d_{ij} = g_{ij,t} \Big/ \sqrt{\frac{r_{i,t} \, c_{j,t}}{\operatorname*{mean}_i
    r_{i,t}}} \qquad \beta_t = 1 - (t - t_0)^{-\gamma}
    $$

    and for one without `axes`, $d = g_t / \sqrt{v_t}$ with the mean square $v$ of each
    element. Then, with $\operatorname{rms}$ of whole leaves,

    $$
    s_t = \alpha_t \max(10^{-3}, \operatorname{rms}(w_{t-1})) \,
    \frac{d}{\max(1, \operatorname{rms}(d) / \theta)} \qquad
    u_t = \begin{cases} -s_t & \text{without momentum} \\
    \mu u_{t-1} - (1 - \mu) s_t & \text{with momentum } \mu \end{cases}
    $$

    ??? cite "Reference"

        Shazeer and Stern, *Adafactor: Adaptive Learning Rates with Sublinear Memory
        Cost*, ICML 2018, [arXiv:1804.04235](https://arxiv.org/abs/1804.04235),
        Algorithms 4 and 5.
    """

    decay_rate: ScalarLike = hyperparameter(0.8)
    decay_offset: ScalarLike = hyperparameter(0.0)
    clipping_threshold: ScalarLike | None = hyperparameter(1.0, low=1.0, optional=True)
    momentum: ScalarLike | None = hyperparameter(None, high=1.0)
    eps: ScalarLike = hyperparameter(1e-30)
    multiply_by_parameter_scale: bool = eqx.field(static=True, default=True)
    # As negative numbers.
    axes: tuple[int, int] | None = eqx.field(static=True, default=(-2, -1))

    @property
    def before(self) -> AbstractRule | None:
        if self.axes is not None:
            return None
        return GrowingMeanSquare(self.decay_rate, self.decay_offset, self.eps)

    @property
    def after(self) -> AbstractRule:
        return SGD() if self.momentum is None else StepAverage(self.momentum)

    @property
    def means(self) -> dict[str, Moment]:
        if self.axes is None:
            return {}
        row, column = self.axes
        mean = lambda axis: Moment("nonnegative", kept="exact", mean_over=(axis,))
        return {"v_row": mean(column), "v_col": mean(row)}

    def transform(
        self,
        direction: Float[Array, "*shape"],
        weight: Float[Array, "*shape"],
        means: dict[str, Float[Array, "..."]],
        count: Scalar,
    ) -> tuple[Float[Array, "*shape"], dict[str, Float[Array, "..."]]]:
        if self.axes is not None:
            row, column = self.axes
            share = _share(count, self.decay_rate, self.decay_offset)
            direction = saturate(direction, _LARGEST_OF_LEAF)
            square = direction * direction + self.eps
            move = lambda old, axis: (
                (1 - share) * old + share * jnp.mean(square, axis=axis, keepdims=True)
            )
            rows, columns = move(means["v_row"], column), move(means["v_col"], row)
            share_of_row = rows / jnp.mean(rows, axis=row, keepdims=True)
            direction = direction * lax.rsqrt(share_of_row) * lax.rsqrt(columns)
            means = {"v_row": rows, "v_col": columns}
        if self.clipping_threshold is not None:
            size = _root_mean_square(direction) / self.clipping_threshold
            direction = direction / jnp.maximum(size, 1)
        if self.multiply_by_parameter_scale:
            size = jnp.maximum(_root_mean_square(weight), _SMALLEST_SCALE)
            direction = size * direction
        return direction, means


def factored_axes(shape: tuple[int, ...], smallest: int) -> tuple[int, int] | None:
    """The two longest axes of a leaf, as negative numbers, if both are at least so
    long; of equal ones, the last."""
    if len(shape) < 2:
        return None
    by_length = sorted(range(-len(shape), 0), key=lambda axis: shape[axis])
    row, column = by_length[-2:]
    return (row, column) if shape[row] >= smallest else None


def _share(count: Scalar, decay_rate: ScalarLike, decay_offset: ScalarLike) -> Scalar:
    """1 - beta: that of the gradient of this step. All of the first one."""
    return 1 / jnp.maximum(count - decay_offset, 1) ** decay_rate


def _root_mean_square(x: Float[Array, "*shape"]) -> Scalar:
    """That of no elements is 0."""
    return jnp.sqrt(jnp.sum(x * x) / max(1, math.prod(x.shape)))
