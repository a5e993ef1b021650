from typing import Unpack

from jaxtyping import ScalarLike

from .._common.number_checks import check_flag
from .._rules.lars import Lars
from .._storage.storage import Storage
from .factory import factory
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .weight_decay import l2, Mask


@factory
def lars(
    learning_rate: ScalarOrSchedule,
    *,
    trust_coefficient: ScalarLike = 0.001,
    eps: ScalarLike = 0.0,
    momentum: ScalarLike = 0.9,
    nesterov: bool = False,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
) -> Optimizer:
    r"""LARS, for large batches: [`flashquinox.Lars`][], in 4.0625 bytes per parameter
    at rest.

    ??? cite "Reference"

        You, Gitman and Ginsburg, *Large Batch Training of Convolutional Networks*,
        2017, [arXiv:1708.03888](https://arxiv.org/abs/1708.03888).

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `trust_coefficient`: $\eta \ge 0$.
    - `eps`: $\epsilon \ge 0$: is added to the norm of the gradient.
    - `momentum`: $\mu \in [0, 1)$.
    - `nesterov`: whether to use Nesterov momentum.
    - `weight_decay`: $\lambda$, before the scaling to the norm, as in the paper.
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
        "lars",
        Lars(
            trust_coefficient, eps, momentum, check_flag("lars", "nesterov", nesterov)
        ),
        learning_rate,
        l2(weight_decay, mask),
        storage,
        options,
    )
