from typing import Unpack

import jax
from jaxtyping import ScalarLike

from .._common.number_checks import check_flag, check_number, is_zero
from .._rules.sgd import SGD
from .._storage.storage import Storage
from .factory import factory
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .weight_decay import decoupled, DecoupledDecay, l2, Mask


@factory
def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: ScalarLike | None = None,
    nesterov: bool = False,
    *,
    dampening: ScalarLike = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
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
    - `storage`: how weights and moments are stored: a [`flashquinox.Storage`][].
    - `options`: what all optimizers take: how steps are executed, such as what a NaN
        does and where the state lives. See [`flashquinox.Options`][].

    **Returns:**

    A [`flashquinox.Optimizer`][], which is also an
    `optax.GradientTransformationExtraArgs`.

    **Raises:**

    `ValueError` or `TypeError` for arguments out of range.
    """
    return build_optimizer(
        "sgd",
        _rule("sgd", momentum, nesterov, dampening),
        learning_rate,
        l2(weight_decay, mask),
        storage,
        options,
    )


@factory
def sgdw(
    learning_rate: ScalarOrSchedule,
    momentum: ScalarLike | None = None,
    nesterov: bool = False,
    *,
    dampening: ScalarLike = 0.0,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    decay: DecoupledDecay = "decoupled",
    peak_learning_rate: ScalarLike | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
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
    - `decay`: `"decoupled"`, or `"independent"` of the height of the learning rate:
        $\lambda \alpha_t / \alpha_\text{peak}$ in place of $\lambda\alpha_t$.
    - `peak_learning_rate`: $\alpha_\text{peak}$. Needed with `decay="independent"`,
        unless `learning_rate` is a number, which is its own peak.
    - `storage`: how weights and moments are stored: a [`flashquinox.Storage`][].
    - `options`: what all optimizers take: how steps are executed, such as what a NaN
        does and where the state lives. See [`flashquinox.Options`][].

    **Returns:**

    A [`flashquinox.Optimizer`][], which is also an
    `optax.GradientTransformationExtraArgs`.

    **Raises:**

    `ValueError` or `TypeError` for arguments out of range.
    """
    return build_optimizer(
        "sgdw",
        _rule("sgdw", momentum, nesterov, dampening),
        learning_rate,
        decoupled("sgdw", weight_decay, mask, decay, peak_learning_rate),
        storage,
        options,
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
