from typing import Unpack

from jaxtyping import ScalarLike

from .._rules.ademamix import AdEMAMix
from .._storage.storage import Storage
from .factory import factory
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .weight_decay import decoupled, DecoupledDecay, Mask


@factory
def ademamix(
    learning_rate: ScalarOrSchedule,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.999,
    b3: ScalarLike = 0.9999,
    alpha: ScalarLike = 5.0,
    eps: ScalarLike = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    decay: DecoupledDecay = "decoupled",
    peak_learning_rate: ScalarLike | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
) -> Optimizer:
    r"""AdEMAMix with decoupled weight decay: [`flashquinox.AdEMAMix`][] and

    $$w_t = (1 - \alpha_t \lambda) w_{t-1} + u_t$$

    in 9.125 bytes per parameter at rest: a bfloat16 weight, an 8-bit correction, two
    8-bit moments with a 16-bit scale per 32 elements, and the slow average in float32.

    ??? cite "Reference"

        Pagliardini, Ablin and Grangier, *The AdEMAMix Optimizer: Better, Faster,
        Older*, [arXiv:2409.03137](https://arxiv.org/abs/2409.03137). Storage:
        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `b1`, `b2`, `b3`: $\beta_1, \beta_2, \beta_3 \in [0, 1)$: the decay rates of the
        fast average of gradients, of that of squares, and of the slow one of gradients.
    - `alpha`: $a \ge 0$: the weight of the slow average.
    - `eps`: $\epsilon \ge 0$: is added to the denominator, outside of the square root.
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
        "ademamix",
        AdEMAMix(b1, b2, b3, alpha, eps),
        learning_rate,
        decoupled("ademamix", weight_decay, mask, decay, peak_learning_rate),
        storage,
        options,
    )
