import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar, ScalarLike

from .._backends.dispatch import Backend
from .._checksums import Verify
from .._defaults import (
    Bits,
    GROUP_SIZE,
    Integer,
    MASTER_WEIGHT_BITS,
    with_static_defaults,
)
from .._moment_codecs import MomentCodecs
from .._optimizer import build_optimizer, Optimizer
from .._rule import AbstractRule, MomentKind
from .._transformation import Mask, ScalarOrSchedule


class Lion(AbstractRule):
    r"""The sign of an interpolation between momentum and gradient.

    $$
    \begin{aligned}
    u_t &= -\alpha_t \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t) \\
    m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t
    \end{aligned}
    $$

    ??? cite "Reference"

        Chen et al., *Symbolic Discovery of Optimization Algorithms*, NeurIPS 2023,
        [arXiv:2302.06675](https://arxiv.org/abs/2302.06675), Program 1.
    """

    b1: ScalarLike = 0.9
    b2: ScalarLike = 0.99

    @property
    def moments(self) -> dict[str, MomentKind]:
        return {"mu": "signed"}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        return {"b1": (0.0, 1.0), "b2": (0.0, 1.0)}

    @property
    def factors(self) -> dict[str, tuple[str | None, str | None]]:
        return {"mu": ("decay", "one_minus_b2")}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        del count
        # `update` has b2 m / (1 - b2), and divides what it takes the sign of by 1 - b1.
        # With b2 = 0, something that is lost in any sum.
        decay = jnp.maximum(self.b2 / (1 - self.b2), 1e-20)
        return {
            "decay": decay,
            "one_minus_b2": 1 - self.b2,
            "direction": self.b1 / (1 - self.b1) / decay,
            "step": -learning_rate,
        }

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        direction = scalars["direction"] * moments["mu"] + grad
        mu = moments["mu"] + grad
        return scalars["step"] * jnp.sign(direction), {"mu": mu}


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
