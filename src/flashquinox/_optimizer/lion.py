from jaxtyping import Array, PyTree, ScalarLike

from .._backends.dispatch import Backend
from .._rules.lion import Lion
from .._storage.defaults import Bits, GROUP_SIZE, Integer, MASTER_WEIGHT_BITS
from .._storage.moment_codecs import MomentCodecs
from .checksums import Verify
from .defaults import with_static_defaults
from .engine import Mask, ScalarOrSchedule
from .optimizer import build_optimizer, Optimizer


@with_static_defaults
def lion(
    learning_rate: ScalarOrSchedule,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.99,
    *,
    weight_decay: ScalarOrSchedule = 1e-3,
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
        "lion",
        Lion(b1, b2),
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
