from typing import Unpack

from jaxtyping import ScalarLike

from .._rules.lion import Lion
from .._storage.storage import Storage
from .factory import factory
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .weight_decay import decoupled, DecoupledDecay, Mask


@factory
def lion(
    learning_rate: ScalarOrSchedule,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.99,
    *,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: Mask | None = None,
    decay: DecoupledDecay = "decoupled",
    peak_learning_rate: ScalarLike | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
) -> Optimizer:
    r"""Lion with decoupled weight decay: [`flashquinox.Lion`][] and

    $$w_t = (1 - \alpha_t \lambda) w_{t-1} + u_t$$

    in 4.0625 bytes per parameter at rest: a bfloat16 weight, an 8-bit correction, and
    one 8-bit moment with a 16-bit scale per 32 elements.

    ??? cite "References"

        Chen et al., *Symbolic Discovery of Optimization Algorithms*, NeurIPS 2023,
        [arXiv:2302.06675](https://arxiv.org/abs/2302.06675). Storage: FlashOptim,
        [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `b1`: $\beta_1 \in [0, 1)$: the share of the momentum in the update.
    - `b2`: $\beta_2 \in [0, 1)$: the decay rate of the momentum.
    - `weight_decay`: $\lambda$, times the learning rate, as in Optax.
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
        "lion",
        Lion(b1, b2),
        learning_rate,
        decoupled("lion", weight_decay, mask, decay, peak_learning_rate),
        storage,
        options,
    )
