from typing import Unpack

from jaxtyping import ScalarLike

from .._common.number_checks import check_flag
from .._rules.adam import Adam
from .._storage.storage import Storage
from .factory import factory
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .weight_decay import decoupled, DecoupledDecay, l2, Mask


@factory
def adamw(
    learning_rate: ScalarOrSchedule,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.999,
    eps: ScalarLike = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    nesterov: bool = False,
    decay: DecoupledDecay = "decoupled",
    peak_learning_rate: ScalarLike | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
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
        "adamw",
        Adam(b1, b2, eps, check_flag("adamw", "nesterov", nesterov)),
        learning_rate,
        decoupled("adamw", weight_decay, mask, decay, peak_learning_rate),
        storage,
        options,
    )


@factory
def adam(
    learning_rate: ScalarOrSchedule,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.999,
    eps: ScalarLike = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    nesterov: bool = False,
    storage: Storage = Storage(),
    **options: Unpack[Options],
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
        "adam",
        Adam(b1, b2, eps, check_flag("adam", "nesterov", nesterov)),
        learning_rate,
        l2(weight_decay, mask),
        storage,
        options,
    )
