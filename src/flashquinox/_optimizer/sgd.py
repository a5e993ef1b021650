import jax
from jaxtyping import Array, PyTree, ScalarLike

from .._backends.dispatch import Backend
from .._common.number_checks import check_flag, check_number, is_zero
from .._rules.sgd import SGD
from .._storage.defaults import Bits, GROUP_SIZE, Integer, MASTER_WEIGHT_BITS
from .._storage.moment_codecs import MomentCodecs
from .checksums import Verify
from .defaults import with_static_defaults
from .engine import Mask, ScalarOrSchedule
from .optimizer import build_optimizer, Optimizer


@with_static_defaults
def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: ScalarLike | None = None,
    nesterov: bool = False,
    *,
    dampening: ScalarLike = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    master_weight_bits: Bits = MASTER_WEIGHT_BITS,
    moments: str | tuple[str, str] | MomentCodecs = "flashquinox",
    group_size: Integer | Array = GROUP_SIZE,
    skip_nonfinite: bool = False,
    dither_weights: bool = False,
    verify_weights: Verify = None,
    backend: Backend = "auto",
    shardings: PyTree = None,
) -> Optimizer:
    r"""Stochastic gradient descent, with L2 regularization if wanted:
    [`flashquinox.SGD`][] with $g_t + \lambda w_{t-1}$ for the gradient; in 4.0625 bytes
    per parameter at rest with momentum, 3 without.

    ??? cite "Reference"

        Storage: FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `momentum`: $\mu \in [0, 1)$. `None` or the number 0 store no momentum at all.
    - `nesterov`: whether to use Nesterov momentum.
    - `dampening`: $\tau \in [0, 1)$: as in PyTorch, from the second step on.
    - `weight_decay`: $\lambda$, the coefficient of L2 regularization. For decoupled
        decay use [`flashquinox.sgdw`][].
    - `mask`: which weights decay: a pytree of booleans like the model or a prefix of
        it, or a function from the floating-point part of the model to one.
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
        "sgd",
        _rule("sgd", momentum, nesterov, dampening),
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


@with_static_defaults
def sgdw(
    learning_rate: ScalarOrSchedule,
    momentum: ScalarLike | None = None,
    nesterov: bool = False,
    *,
    dampening: ScalarLike = 0.0,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
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
    r"""Stochastic gradient descent with decoupled weight decay: [`flashquinox.SGD`][]
    and

    $$w_t = (1 - \alpha_t \lambda) w_{t-1} + u_t$$

    ??? cite "Reference"

        Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019,
        [arXiv:1711.05101](https://arxiv.org/abs/1711.05101), Algorithm 1.

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `momentum`: $\mu \in [0, 1)$. `None` or the number 0 store no momentum at all.
    - `nesterov`: whether to use Nesterov momentum.
    - `dampening`: $\tau \in [0, 1)$: as in PyTorch, from the second step on.
    - `weight_decay`: $\lambda$, times the learning rate.
    - `mask`: which weights decay: a pytree of booleans like the model or a prefix of
        it, or a function from the floating-point part of the model to one.
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
        "sgdw",
        _rule("sgdw", momentum, nesterov, dampening),
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


def _rule(
    call: str, momentum: ScalarLike | None, nesterov: bool, dampening: ScalarLike
) -> SGD:
    if is_zero(momentum):
        momentum = None
    if check_flag(call, "nesterov", nesterov) and momentum is None:
        raise ValueError(
            f"`{call}(nesterov=True)` needs momentum: pass `momentum=0.9`, say."
        )
    check_number(call, "dampening", dampening)
    is_known = not isinstance(dampening, jax.Array)
    if momentum is None and is_known and not is_zero(dampening):
        raise ValueError(
            f"`{call}(dampening={dampening})` needs momentum: pass `momentum=0.9`, say."
        )
    return SGD(momentum, dampening, nesterov)
