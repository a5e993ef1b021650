from typing import Unpack

from jaxtyping import ScalarLike

from .._rules.lamb import Lamb
from .._storage.storage import Storage
from .factory import factory
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .weight_decay import l2, Mask


@factory
def lamb(
    learning_rate: ScalarOrSchedule,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.999,
    eps: ScalarLike = 1e-6,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
) -> Optimizer:
    r"""LAMB, for large batches: [`flashquinox.Lamb`][], in 5.125 bytes per parameter at
    rest.

    ??? cite "Reference"

        You et al., *Large Batch Optimization for Deep Learning: Training BERT in 76
        minutes*, ICLR 2020, [arXiv:1904.00962](https://arxiv.org/abs/1904.00962).

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `b1`, `b2`: $\beta_1, \beta_2 \in [0, 1)$: the decay rates of the two moments.
    - `eps`: $\epsilon \ge 0$: is added to the denominator, outside of the square root.
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
        "lamb",
        Lamb(b1, b2, eps),
        learning_rate,
        l2(weight_decay, mask),
        storage,
        options,
    )
