from typing import Unpack

from jaxtyping import ScalarLike

from .._common.number_checks import check_flag, is_zero
from .._rules.rmsprop import RMSProp
from .._storage.storage import Storage
from .factory import factory
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .weight_decay import l2, Mask


@factory
def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: ScalarLike = 0.9,
    eps: ScalarLike = 1e-8,
    *,
    momentum: ScalarLike | None = None,
    nesterov: bool = False,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
) -> Optimizer:
    r"""RMSProp, with L2 regularization if wanted: [`flashquinox.RMSProp`][] with
    $g_t + \lambda w_{t-1}$ for the gradient; in 4.0625 bytes per parameter at rest, and
    5.125 with momentum.

    ??? cite "Reference"

        Hinton, *Overview of mini-batch gradient descent*, 2012. Storage: FlashOptim,
        [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `decay`: $\beta \in [0, 1)$: the decay rate of the average of squares.
    - `eps`: $\epsilon \ge 0$: is added to it, inside of the square root.
    - `momentum`: $\mu \in [0, 1)$. `None` or the number 0 store no momentum at all.
    - `nesterov`: whether to use Nesterov momentum.
    - `weight_decay`: $\lambda$, the coefficient of L2 regularization.
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
    momentum = None if is_zero(momentum) else momentum
    if check_flag("rmsprop", "nesterov", nesterov) and momentum is None:
        raise ValueError(
            "`rmsprop(nesterov=True)` needs momentum: pass `momentum=0.9`, say."
        )
    return build_optimizer(
        "rmsprop",
        RMSProp(decay, eps, momentum, nesterov),
        learning_rate,
        l2(weight_decay, mask),
        storage,
        options,
    )
