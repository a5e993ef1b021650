from typing import Unpack

from .._rules.added import Added
from .._storage.storage import Storage
from .factory import factory
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .weight_decay import l2


@factory
def add_updates(
    *, storage: Storage = Storage(), **options: Unpack[Options]
) -> Optimizer:
    r"""Adds updates of Optax's transformations to weights in bfloat16 with corrections:
    $w_t = w_{t-1} + u_t$, in 3 bytes per parameter at rest. It goes last, in
    `optax.chain(..., fq.add_updates())`.

    ??? cite "Reference"

        Storage: FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).

    **Arguments:**

    - `storage`: how weights are stored: a [`flashquinox.Storage`][].
    - `options`: what all optimizers take: how steps are executed, such as what a NaN
        does and where the state lives. See [`flashquinox.Options`][].

    **Returns:**

    A [`flashquinox.Optimizer`][], which is also an
    `optax.GradientTransformationExtraArgs`, and takes updates for gradients.

    **Raises:**

    `ValueError` or `TypeError` for arguments out of range.
    """
    return build_optimizer("add_updates", Added(), 1.0, l2(0.0, None), storage, options)
