import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar, ScalarLike

from .._backends.dispatch import Backend
from .._checksums import Verify
from .._defaults import (
    Bits,
    GROUP_SIZE,
    Integer,
    MASTER_WEIGHT_BITS,
    with_static_defaults,
)
from .._moment_codecs import MomentCodecs
from .._number_checks import check_flag
from .._optimizer import build_optimizer, Optimizer
from .._rule import AbstractRule, MomentKind
from .._transformation import Mask, ScalarOrSchedule


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

    b1: ScalarLike = 0.9
    b2: ScalarLike = 0.999
    eps: ScalarLike = 1e-8
    nesterov: bool = eqx.field(static=True, default=False)

    @property
    def moments(self) -> dict[str, MomentKind]:
        return {"mu": "signed", "nu": "nonnegative"}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        return {"b1": (0.0, 1.0), "b2": (0.0, 1.0), "eps": (0.0, float("inf"))}

    @property
    def factors(self) -> dict[str, tuple[str | None, str | None]]:
        return {"mu": ("decay", "one_minus_b1")}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        # With r = sqrt(1 - b2^t): m/(sqrt(v)/r + eps) = m r / (sqrt(v) + eps r).
        root_correction2 = jnp.sqrt(_bias_correction(self.b2, count))
        correction1 = _bias_correction(self.b1, count)
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
            next_correction1 = _bias_correction(self.b1, count + 1)
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


def _bias_correction(decay: ScalarLike, count: Scalar) -> Scalar:
    """`1 - decay^count`, without the cancellation for `decay` close to 1."""
    return -jnp.expm1(count * jnp.log1p(jnp.asarray(decay - 1, count.dtype)))


@with_static_defaults
def adamw(
    learning_rate: ScalarOrSchedule,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.999,
    eps: ScalarLike = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    nesterov: bool = False,
    decouple_lr: bool = False,
    peak_learning_rate: ScalarLike | None = None,
    master_weight_bits: Bits = MASTER_WEIGHT_BITS,
    moments: str | tuple[str, str] | MomentCodecs = "flashquinox",
    group_size: Integer | Array = GROUP_SIZE,
    skip_nonfinite: bool = False,
    dither_weights: bool = False,
    verify_weights: Verify = None,
    backend: Backend = "auto",
    shardings: PyTree = None,
) -> Optimizer:
    r"""Adam with decoupled weight decay: [`flashquinox.Adam`][] and

    $$w_t = (1 - \alpha_t \lambda) w_{t-1} + u_t$$

    in 5.125 bytes per parameter at rest: a bfloat16 weight, an 8-bit correction, and
    two 8-bit moments with a 16-bit scale per 32 elements.

    ??? cite "References"

        Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019,
        [arXiv:1711.05101](https://arxiv.org/abs/1711.05101), Algorithm 2. Storage:
        Gonzalez Ortiz, Gupta, Rinard and Blalock, *FlashOptim: Optimizers for Memory
        Efficient Training*, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `b1`, `b2`: $\beta_1, \beta_2 \in [0, 1)$: the decay rates of the two moments.
    - `eps`: $\epsilon \ge 0$: is added to the denominator, outside of the square root.
    - `weight_decay`: $\lambda$, times the learning rate, as in Optax and PyTorch.
    - `mask`: which weights decay: a pytree of booleans like the model or a prefix of
        it, or a function from the floating-point part of the model to one.
    - `nesterov`: whether to use Nesterov momentum.
    - `decouple_lr`, `peak_learning_rate`: make the decay $\lambda\alpha_t /
        \alpha_\text{peak}$ instead of $\lambda\alpha_t$.
    - `master_weight_bits`, `moments`, `group_size`, `skip_nonfinite`,
        `dither_weights`, `verify_weights`, `backend`, `shardings`: how weights and
        moments are stored, rounded and checked, what a NaN does, and where they are:
        see [`flashquinox.optimizer`][].

    **Returns:**

    A [`flashquinox.Optimizer`][], which is also an
    `optax.GradientTransformationExtraArgs`.

    **Raises:**

    `ValueError` or `TypeError` for arguments out of range.
    """
    return build_optimizer(
        "adamw",
        Adam(b1, b2, eps, check_flag("adamw", "nesterov", nesterov)),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        decoupled=True,
        decouple_lr=decouple_lr,
        peak_learning_rate=peak_learning_rate,
        mask=mask,
        master_weight_bits=master_weight_bits,
        moments=moments,
        group_size=group_size,
        skip_nonfinite=skip_nonfinite,
        dither_weights=dither_weights,
        verify_weights=verify_weights,
        backend=backend,
        shardings=shardings,
    )


@with_static_defaults
def adam(
    learning_rate: ScalarOrSchedule,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.999,
    eps: ScalarLike = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    nesterov: bool = False,
    master_weight_bits: Bits = MASTER_WEIGHT_BITS,
    moments: str | tuple[str, str] | MomentCodecs = "flashquinox",
    group_size: Integer | Array = GROUP_SIZE,
    skip_nonfinite: bool = False,
    dither_weights: bool = False,
    verify_weights: Verify = None,
    backend: Backend = "auto",
    shardings: PyTree = None,
) -> Optimizer:
    r"""Adam, with L2 regularization if wanted: [`flashquinox.Adam`][] with
    $g_t + \lambda w_{t-1}$ for the gradient.

    ??? cite "Reference"

        Kingma and Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015,
        [arXiv:1412.6980](https://arxiv.org/abs/1412.6980).

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `b1`, `b2`: $\beta_1, \beta_2 \in [0, 1)$: the decay rates of the two moments.
    - `eps`: $\epsilon \ge 0$: is added to the denominator, outside of the square root.
    - `weight_decay`: $\lambda$, the coefficient of L2 regularization. For decoupled
        decay use [`flashquinox.adamw`][].
    - `mask`: which weights decay: a pytree of booleans like the model or a prefix of
        it, or a function from the floating-point part of the model to one.
    - `nesterov`: whether to use Nesterov momentum.
    - `master_weight_bits`, `moments`, `group_size`, `skip_nonfinite`,
        `dither_weights`, `verify_weights`, `backend`, `shardings`: how weights and
        moments are stored, rounded and checked, what a NaN does, and where they are:
        see [`flashquinox.optimizer`][].

    **Returns:**

    A [`flashquinox.Optimizer`][], which is also an
    `optax.GradientTransformationExtraArgs`.

    **Raises:**

    `ValueError` or `TypeError` for arguments out of range.
    """
    return build_optimizer(
        "adam",
        Adam(b1, b2, eps, check_flag("adam", "nesterov", nesterov)),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        decoupled=False,
        decouple_lr=False,
        peak_learning_rate=None,
        mask=mask,
        master_weight_bits=master_weight_bits,
        moments=moments,
        group_size=group_size,
        skip_nonfinite=skip_nonfinite,
        dither_weights=dither_weights,
        verify_weights=verify_weights,
        backend=backend,
        shardings=shardings,
    )
