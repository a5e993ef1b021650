from typing import Unpack

from jaxtyping import ScalarLike

from .._rules.adan import Adan
from .._storage.storage import Storage
from .factory import factory
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .weight_decay import decoupled, DecoupledDecay, Mask


@factory
def adan(
    learning_rate: ScalarOrSchedule,
    b1: ScalarLike = 0.98,
    b2: ScalarLike = 0.92,
    b3: ScalarLike = 0.99,
    eps: ScalarLike = 1e-8,
    eps_root: ScalarLike = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    decay: DecoupledDecay = "decoupled",
    peak_learning_rate: ScalarLike | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
) -> Optimizer:
    r"""Adan with decoupled weight decay: [`flashquinox.Adan`][] and

    $$w_t = (1 - \alpha_t \lambda) w_{t-1} + u_t$$

    in 10.1875 bytes per parameter at rest: a bfloat16 weight, an 8-bit correction,
    three 8-bit moments with a 16-bit scale per 32 elements, and the previous gradient
    in float32.

    ??? cite "References"

        Xie et al., *Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing
        Deep Models*, [arXiv:2208.06677](https://arxiv.org/abs/2208.06677). Storage:
        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `b1`, `b2`, `b3`: $\beta_1, \beta_2, \beta_3 \in [0, 1)$: the decay rates of the
        averages of gradients, of differences of gradients, and of squares. They are 1
        less those of the paper. Differences count by $\beta_2$; in Optax 0.2.8 by
        $1 - \beta_2$, so that steps are only equal for $\beta_2 = 1/2$.
    - `eps`: $\epsilon \ge 0$: is added to the denominator, outside of the square root.
    - `eps_root`: $\bar\epsilon \ge 0$: is added inside of it.
    - `weight_decay`: $\lambda$, times the learning rate, as in Optax. The paper divides
        by $1 + \alpha_t \lambda$ instead.
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
        "adan",
        Adan(b1, b2, b3, eps, eps_root),
        learning_rate,
        decoupled("adan", weight_decay, mask, decay, peak_learning_rate),
        storage,
        options,
    )
