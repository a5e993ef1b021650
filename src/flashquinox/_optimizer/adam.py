from jaxtyping import Array, PyTree, ScalarLike

from .._backends.dispatch import Backend
from .._common.number_checks import check_flag
from .._rules.adam import Adam
from .._storage.defaults import Bits, GROUP_SIZE, Integer, MASTER_WEIGHT_BITS
from .._storage.moment_codecs import MomentCodecs
from .checksums import Verify
from .defaults import with_static_defaults
from .engine import Mask, ScalarOrSchedule
from .optimizer import build_optimizer, Optimizer


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
