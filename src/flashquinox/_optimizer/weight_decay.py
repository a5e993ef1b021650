"""Weight decay: how strong, of which weights, and in which of four forms."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, get_args, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree, Scalar, ScalarLike

from .._common.number_checks import check_in_range, is_zero, known_number
from .._common.text import shown
from .schedules import ScalarOrSchedule


Mask: TypeAlias = PyTree[bool] | Callable[[PyTree], PyTree[bool]]
DecoupledDecay: TypeAlias = Literal["decoupled", "independent"]
Decay: TypeAlias = Literal[DecoupledDecay, "unscaled", "l2"]


class WeightDecay(eqx.Module):
    r"""The arguments of an optimizer that weight decay depends on.

    - `rate`: $\lambda$, or a schedule of it.
    - `mask`: which weights decay; `None` for all.
    - `form`: what a step computes, with $\alpha$ for the learning rate and
        $\alpha_\text{peak}$ for its peak:

        | | |
        | --- | --- |
        | `"decoupled"` | $w \leftarrow (1 - \alpha\lambda) w + u$ |
        | `"independent"` | the same with $\lambda/\alpha_\text{peak}$ for $\lambda$ |
        | `"unscaled"` | $w \leftarrow (1 - \lambda) w + u$ |
        | `"l2"` | $g \leftarrow g + \lambda w$, before the rule |
    - `rate_name`, `mask_name`: how the call that makes the optimizer names these.
    """

    rate: ScalarOrSchedule
    mask: Mask | None
    form: Decay = eqx.field(static=True)
    peak_learning_rate: ScalarLike | None
    rate_name: str = eqx.field(static=True, default="weight_decay")
    mask_name: str = eqx.field(static=True, default="mask")

    @property
    def is_decoupled(self) -> bool:
        return self.form != "l2"

    def scalar(
        self, rate: ScalarLike, learning_rate: Scalar, dtype: DTypeLike
    ) -> Scalar | None:
        r"""What a step multiplies the weight by, to subtract the product from the
        weight, or with L2 regularization to add it to the gradient; in the dtype
        `dtype`. `None` if the rate is the constant 0.

        `rate` and `learning_rate` are the values of this step.
        """
        if is_zero(self.rate):
            return None
        decay = jnp.asarray(rate, dtype)
        if self.form in ("l2", "unscaled"):
            return decay
        if self.peak_learning_rate is None:
            return learning_rate * decay
        peak = jnp.asarray(self.peak_learning_rate, dtype)
        # A traced peak of 0 cannot be refused. It counts as 1, as does the peak of a
        # constant learning rate of 0.
        return learning_rate / jnp.where(peak == 0, 1, peak) * decay


def l2(weight_decay: ScalarOrSchedule, mask: Mask | None) -> WeightDecay:
    return WeightDecay(weight_decay, mask, "l2", None)


def unscaled(
    rate: ScalarOrSchedule, mask: Mask | None, rate_name: str, mask_name: str
) -> WeightDecay:
    return WeightDecay(rate, mask, "unscaled", None, rate_name, mask_name)


def decoupled(
    call: str,
    weight_decay: ScalarOrSchedule,
    mask: Mask | None,
    decay: DecoupledDecay,
    peak_learning_rate: ScalarLike | None,
) -> WeightDecay:
    """The weight decay of an optimizer that has no L2 regularization."""
    if isinstance(decay, str) and decay in get_args(DecoupledDecay):
        return WeightDecay(weight_decay, mask, decay, peak_learning_rate)
    raise ValueError(
        f"`{call}(decay=...)` must be 'decoupled' or 'independent'; got "
        f"{shown(decay)}. For L2 regularization use `flashquinox.adam`, `sgd` or "
        "`optimizer(..., decay='l2')`."
    )


def check_weight_decay(
    call: str, decay: WeightDecay, learning_rate: Any
) -> WeightDecay:
    """Checks all but the rate, which is checked with the other numbers.

    **Returns:**

    The same weight decay, with the peak of the learning rate filled in where it is
    needed and the learning rate is a number.
    """
    if decay.mask is not None and is_zero(decay.rate):
        warnings.warn(
            f"`{call}({decay.mask_name}=...)` has no effect: the mask says which "
            f"weights decay, and `{decay.rate_name}` is 0. Pass "
            f"`{decay.rate_name}=...`, or leave the mask out.",
            stacklevel=5,
        )
    forms = "decoupled", "independent", "unscaled", "l2"
    if not isinstance(decay.form, str) or decay.form not in forms:
        raise ValueError(
            f"`{call}(decay=...)` must be 'decoupled', 'independent', 'unscaled' or "
            f"'l2'; got {shown(decay.form)}."
        )
    peak = _peak(call, decay, learning_rate)
    return dataclasses.replace(decay, peak_learning_rate=peak)


def _peak(call: str, decay: WeightDecay, learning_rate: Any) -> Any:
    """The peak learning rate of independent decay; `None` for other forms."""
    peak = decay.peak_learning_rate
    if decay.form != "independent":
        if peak is not None:
            raise ValueError(
                f"`{call}(peak_learning_rate=...)` only has a meaning with "
                "`decay='independent'`."
            )
        return None
    if peak is not None:
        check_in_range(call, "peak_learning_rate", peak, 0.0, float("inf"))
        if known_number(peak) == 0:
            raise ValueError(f"`{call}(peak_learning_rate=...)` must not be 0.")
        return peak
    # An array may have another value in each step, as with `optax.inject_hyperparams`.
    if callable(learning_rate) or isinstance(learning_rate, jax.Array | np.ndarray):
        raise ValueError(
            f"`{call}(decay='independent')` divides by the peak of the learning rate, "
            "which a schedule or an array does not tell: pass "
            "`peak_learning_rate=...`."
        )
    # With a learning rate of 0 nothing decays, whatever the peak.
    return 1.0 if known_number(learning_rate) == 0 else learning_rate
