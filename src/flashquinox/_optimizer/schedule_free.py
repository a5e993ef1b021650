from typing import Unpack

import jax.numpy as jnp
from jaxtyping import PyTree, ScalarLike

from .._common import eager
from .._common.placement import compute_like
from .._common.text import shown
from .._model.trained import is_trainable
from .._model.trees import flatten, Leaf, match, Model
from .._rules.schedule_free import ScheduleFreeAdamW
from .._storage.storage import Storage
from .factory import factory
from .master_weights import master_weights
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .states import only
from .weight_decay import l2, Mask


@factory
def schedule_free_adamw(
    learning_rate: ScalarOrSchedule,
    warmup_steps: int = 0,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.999,
    eps: ScalarLike = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
) -> Optimizer:
    r"""AdamW without a schedule: [`flashquinox.ScheduleFreeAdamW`][], in 8.0625 bytes
    per parameter at rest: a bfloat16 weight, an 8-bit correction, an 8-bit second
    moment with a 16-bit scale per 32 elements, and the offset of the average in
    float32.

    The model's weights are those where gradients are taken. Evaluate
    [`flashquinox.schedule_free_weights`][].

    ??? cite "Reference"

        Defazio et al., *The Road Less Scheduled*, NeurIPS 2024,
        [arXiv:2405.15682](https://arxiv.org/abs/2405.15682). Storage: FlashOptim,
        [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).

    **Arguments:**

    - `learning_rate`: $\alpha$: a float; or an Optax schedule of the number of steps
        taken, from 0, which does not change how much a step weighs in the average.
    - `warmup_steps`: $T$: over how many steps the learning rate rises from 0 by a line.
        Steps of the warm-up weigh less in the average.
    - `b1`: $\beta_1 \in [0, 1)$: how near to the average gradients are taken.
    - `b2`: $\beta_2 \in [0, 1)$: the decay rate of the second moment.
    - `eps`: $\epsilon \ge 0$: is added to the denominator, outside of the square root.
    - `weight_decay`: $\lambda$, times the learning rate, as in Optax.
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
    is_whole = isinstance(warmup_steps, int) and not isinstance(warmup_steps, bool)
    if not is_whole or warmup_steps < 0:
        raise ValueError(
            "`schedule_free_adamw(warmup_steps=...)` takes a whole number from 0; got "
            f"{shown(warmup_steps)}."
        )
    return build_optimizer(
        "schedule_free_adamw",
        ScheduleFreeAdamW(b1, b2, eps, warmup_steps),
        learning_rate,
        l2(weight_decay, mask),
        storage,
        options,
    )


def schedule_free_weights(model: Model, state: PyTree) -> Model:
    """The average $x$ of a model that [`flashquinox.schedule_free_adamw`][] trains: in
    float32 (float64 where weights are). For evaluation and export.

    **Arguments:**

    - `model`: the model.
    - `state`: its optimizer state; or the state of a wrapper with one inside.

    **Returns:**

    A pytree like `model`. Leaves that are not trained are master weights, or as they
    are: see [`flashquinox.master_weights`][].

    **Raises:**

    `ValueError` if the state is not one of this model, or of another optimizer;
    `TypeError` if there is no [`flashquinox.OptimizerState`][] in it.
    """
    call = "schedule_free_weights"
    masters = master_weights(model, state)
    one, _ = only(call, state)
    if "offset" not in one.moments:
        names = ", ".join(one.moments) or "none"
        raise ValueError(
            f"`{call}`: the state has no moment 'offset' but {names}. It takes the "
            "state of `flashquinox.schedule_free_adamw`."
        )
    leaves, rebuild = flatten(masters)
    offsets = match(call, "state.moments['offset']", one.moments["offset"], leaves)

    def averaged(leaf: Leaf, offset: PyTree) -> PyTree:
        if offset is None or not is_trainable(leaf.value):
            return leaf.value
        both = [leaf.value, offset]
        add = eager.elementwise(jnp.add)
        return compute_like(call, leaf.name, add, both, both[:1] * 2)

    pairs = zip(leaves, offsets, strict=True)
    return rebuild([averaged(leaf, offset) for leaf, offset in pairs])
