import dataclasses
from typing import Unpack

from jaxtyping import ScalarLike

from .._common.number_checks import check_flag
from .._common.text import shown
from .._rules.adafactor import Adafactor
from .._storage.storage import Storage
from .factored import ByLength
from .factory import factory
from .groups import Group
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .weight_decay import Mask, unscaled


@factory
def adafactor(
    learning_rate: ScalarOrSchedule,
    min_dim_size_to_factor: int = 128,
    decay_rate: ScalarLike = 0.8,
    decay_offset: ScalarLike = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: ScalarLike | None = 1.0,
    momentum: ScalarLike | None = None,
    *,
    weight_decay_rate: ScalarOrSchedule = 0.0,
    eps: ScalarLike = 1e-30,
    factored: bool = True,
    weight_decay_mask: Mask | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
) -> Optimizer:
    r"""Adafactor: [`flashquinox.Adafactor`][] and

    $$w_t = (1 - \lambda) w_{t-1} + u_t$$

    A matrix takes 3 bytes per parameter at rest, a bfloat16 weight and an 8-bit
    correction, and 4 bytes for each row and each column; with momentum 1.0625 bytes per
    parameter more. Weights without two long axes have an 8-bit mean square of 1.0625
    bytes, and vectors of fewer than 4096 elements one in float32.

    ??? cite "Reference"

        Shazeer and Stern, *Adafactor: Adaptive Learning Rates with Sublinear Memory
        Cost*, ICML 2018, [arXiv:1804.04235](https://arxiv.org/abs/1804.04235).
        Arguments are those of `optax.adafactor`, but for `dtype_momentum`.

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0. With `multiply_by_parameter_scale`, it is in units of the size of
        a leaf: by 0.01, say, a step moves weights by 1 % of their root mean square.
    - `min_dim_size_to_factor`: weights are factored if two of their axes have at least
        this length: the two longest are rows and columns. All other axes are of a stack
        of matrices.
    - `decay_rate`: $\gamma \ge 0$, by which decay rates grow:
        $\beta_t = 1 - (t - t_0)^{-\gamma}$.
    - `decay_offset`: $t_0 \ge 0$: the number of steps taken before fine-tuning, in a
        state whose count goes on.
    - `multiply_by_parameter_scale`: whether updates are scaled to the root mean square
        of their leaf, which counts as at least $10^{-3}$.
    - `clipping_threshold`: $\theta \ge 1$: the largest root mean square of a leaf's
        direction. `None` is no clipping.
    - `momentum`: $\mu \in [0, 1)$, of steps. `None` keeps none.
    - `weight_decay_rate`: $\lambda$, which is not multiplied by the learning rate.
    - `eps`: $\epsilon \ge 0$: is added to squares of gradients.
    - `factored`: whether any weights are factored.
    - `weight_decay_mask`: which weights decay: a pytree of booleans like the model or a
        prefix of it, or a function from the floating-point part of the model to one.
    - `storage`: how weights and moments are stored: a [`flashquinox.Storage`][]. Means
        over rows and columns are float32, whatever it says.
    - `options`: what all optimizers take: how steps are executed, such as what a NaN
        does and where the state lives. See [`flashquinox.Options`][].

    **Returns:**

    A [`flashquinox.Optimizer`][], which is also an
    `optax.GradientTransformationExtraArgs`.

    **Raises:**

    `ValueError` or `TypeError` for arguments out of range.
    """
    smallest = min_dim_size_to_factor
    if not isinstance(smallest, int) or isinstance(smallest, bool) or smallest < 1:
        raise ValueError(
            "`adafactor(min_dim_size_to_factor=...)` takes a length, at least 1; got "
            f"{shown(smallest)}."
        )
    decay = unscaled(
        weight_decay_rate, weight_decay_mask, "weight_decay_rate", "weight_decay_mask"
    )
    factored_rule = Adafactor(
        decay_rate,
        decay_offset,
        clipping_threshold,
        momentum,
        eps,
        check_flag(
            "adafactor", "multiply_by_parameter_scale", multiply_by_parameter_scale
        ),
    )
    return build_optimizer(
        "adafactor",
        factored_rule,
        learning_rate,
        decay,
        storage,
        options,
        (Group(dataclasses.replace(factored_rule, axes=None), learning_rate, decay),),
        ByLength(smallest, check_flag("adafactor", "factored", factored)),
    )
