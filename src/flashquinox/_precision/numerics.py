"""Whether steps are still large enough to change the weights that they are added to."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import PyTree

from .._common import eager
from .._common.number_checks import check_flag, check_number
from .._common.text import aligned
from .._model.trees import dotted_name, State
from .._optimizer.leaf_checks import check_not_traced
from .._optimizer.schedules import check_takes_count, ScalarOrSchedule, scheduled
from .._optimizer.states import open_states
from .._storage.split import master_digits
from .width import widen_corrections


class LeafNumerics(NamedTuple):
    """A weight in a [`flashquinox.NumericsReport`][].

    - `path`: its dotted path.
    - `dtype`: its own; `bits` are those of its master weight.
    - `largest`: the largest magnitude in it.
    - `half_unit`: half the distance from there to the next representable master weight.
        Smaller steps are rounded away.
    - `step`: the size of a step.
    """

    path: str
    dtype: str
    bits: int
    largest: float
    half_unit: float
    step: float

    @property
    def lost(self) -> bool:
        """Whether rounding to nearest would lose a step of the largest weight, or that
        is not finite."""
        return not self.step >= self.half_unit


@dataclasses.dataclass(frozen=True)
class NumericsReport:
    """What [`flashquinox.check_numerics`][] found. `str(report)` is a table."""

    leaves: tuple[LeafNumerics, ...]

    @property
    def lost(self) -> tuple[str, ...]:
        """The paths of weights for whose largest element a step is less than half a
        unit. They can be the `leaves` of [`flashquinox.widen_corrections`][]."""
        return tuple(leaf.path for leaf in self.leaves if leaf.lost)

    @property
    def ok(self) -> bool:
        """Whether rounding to nearest would lose no steps."""
        return not self.lost

    def __str__(self) -> str:
        header = ("weight", "dtype", "bits", "largest", "half unit", "step", "")
        rows = [
            (
                leaf.path or "(the root)",
                leaf.dtype,
                str(leaf.bits),
                f"{leaf.largest:.3g}",
                f"{leaf.half_unit:.3g}",
                f"{leaf.step:.3g}",
                "lost" if leaf.lost else "",
            )
            for leaf in self.leaves
        ]
        return aligned((header, *rows), left=2)


class NumericsError(ValueError):
    """Steps are lost in the rounding of weights, or weights are not finite. Its
    `report`, a [`flashquinox.NumericsReport`][], lists these weights."""

    def __init__(self, message: str, report: NumericsReport):
        super().__init__(message)
        self.report = report


def check_numerics(
    model: PyTree,
    state: PyTree,
    learning_rate: ScalarOrSchedule,
    *,
    update_size: float = 1.0,
    raise_on_error: bool = False,
) -> NumericsReport:
    r"""Whether each step of this learning rate can still change the largest weight of
    each leaf.

    A master weight $w$ with $p$ significant bits moves by a step $\alpha u$, rounded to
    nearest, if

    $$\alpha \, |u| \ge 2^{\lfloor \log_2 |w| \rfloor - p}$$

    which is half a unit in its last place. A bfloat16 weight has $p = 16$ with a
    correction of 8 bits, 24 with one of 16, and 8 without; float16 has 19, 24 and 11;
    float32 has 24.

    **Arguments:**

    - `model`: the model, outside of `jit`.
    - `state`: its optimizer state, or the state of a wrapper, such as `optax.chain` or
        `optax.partition`, with one or more inside. Weights that none of these
        optimizers trains are not in the report.
    - `learning_rate`: $\alpha$: a number, or an Optax schedule, of which the next step
        counts. Each weight takes the count of the state that trains it.
    - `update_size`: the typical $|u|$. Adam's and Lion's are at most about 1, the
        default. For SGD, pass the typical magnitude of the momentum.
    - `raise_on_error`: whether to raise if there are weights whose steps are less.

    **Returns:**

    A [`flashquinox.NumericsReport`][]. It does not know how weights are rounded. By
    default, `Storage(dither_weights=True)`, a step below half a unit changes the weight
    by one unit in the corresponding share of steps; with `False`, it is lost.

    **Raises:**

    [`flashquinox.NumericsError`][] with `raise_on_error`. `ValueError` if the state is
    not one of this model, or if the learning rate is not positive; `TypeError` if it is
    no number, or inside `jit`.
    """
    call = "check_numerics"
    check_flag(call, "raise_on_error", raise_on_error)
    report = _report(call, model, state, learning_rate, update_size)
    if raise_on_error:
        _check_not_lost(
            call,
            report,
            "Pass `report.lost` to `flashquinox.widen_corrections`, for corrections of "
            "16 bits.",
        )
    return report


def ensure_precision(
    model: PyTree,
    state: State,
    learning_rate: ScalarOrSchedule,
    *,
    update_size: float = 1.0,
) -> State:
    """Widens the corrections of just those weights that steps no longer change, as
    [`flashquinox.check_numerics`][] finds them. Call it between epochs, say, or when
    the learning rate has fallen.

    Arguments are those of `check_numerics`. Call it outside of `jit` too: the new state
    has other dtypes, so that a step compiles again.

    **Returns:**

    The new state; `state` itself if nothing is lost.

    **Raises:**

    [`flashquinox.NumericsError`][] if steps are lost in weights whose corrections
    cannot be widened: the master weights have 32 bits already, or there are no
    corrections, as with `Storage(master_weight_bits=None)`. Likewise if weights are not
    finite. The state is then not changed. Other errors are those of `check_numerics`.
    """
    call = "ensure_precision"
    report = _report(call, model, state, learning_rate, update_size)
    if report.ok:
        return state
    can_widen = {leaf.path for leaf in report.leaves if leaf.bits == 24}
    widened = state
    if any(path in can_widen for path in report.lost):
        paths = tuple(path for path in report.lost if path in can_widen)
        widened = widen_corrections(model, state, paths)
    _check_not_lost(
        call,
        _report(call, model, widened, learning_rate, update_size),
        "No correction is wide enough. Cast these weights to float32 or float64, or "
        "raise the learning rate.",
    )
    return widened


def _check_not_lost(call: str, report: NumericsReport, remedy: str) -> None:
    if report.ok:
        return
    broken = [leaf for leaf in report.leaves if not math.isfinite(leaf.largest)]
    if broken:
        names = ", ".join(f"`{leaf.path or '(the root)'}`" for leaf in broken)
        raise NumericsError(
            f"`{call}`: the weights at {names} are not all finite:\n{report}\nNo "
            "correction is of use there. Go back to weights that are finite; "
            "`skip_nonfinite=True` of the optimizer leaves weights as they are where "
            "gradients are not finite.",
            report,
        )
    raise NumericsError(
        f"`{call}`: a step of the largest weight of {len(report.lost)} of "
        f"{len(report.leaves)} leaves is less than half a unit in its last place:\n"
        f"{report}\n{remedy}",
        report,
    )


def _report(
    call: str,
    model: PyTree,
    state: PyTree,
    learning_rate: ScalarOrSchedule,
    update_size: float,
) -> NumericsReport:
    opened = open_states(call, model, state)
    counts = [jnp.max(one.count) for one in opened.states]
    steps = [_step_size(call, count, learning_rate, update_size) for count in counts]
    trained = []
    for leaf, owner, correction, is_trained in zip(
        opened.leaves, opened.owners, opened.corrections, opened.trained, strict=True
    ):
        if is_trained and leaf.value.size > 0:
            check_not_traced(call, leaf)
            step = max(steps) if owner is None else steps[owner]
            trained.append((leaf, correction, step))
    # One transfer from the device for all large leaves.
    maxima = jax.device_get([eager.largest(leaf.value) for leaf, _, _ in trained])
    return NumericsReport(
        tuple(
            _of_leaf(dotted_name(leaf.path), leaf.value.dtype, correction, x, step)
            for (leaf, correction, step), x in zip(trained, maxima, strict=True)
        )
    )


def _step_size(call: str, count: Any, learning_rate: Any, update_size: Any) -> float:
    if callable(learning_rate):
        check_takes_count(call, "learning_rate", learning_rate)
        learning_rate = scheduled(call, "learning_rate", learning_rate, count)
    for name, value in (
        ("learning_rate", learning_rate),
        ("update_size", update_size),
    ):
        if not isinstance(value, jax.core.Tracer):
            check_number(call, name, value)
        if isinstance(value, jax.core.Tracer) or not 0 < float(value) < math.inf:
            raise ValueError(
                f"`{call}({name}=...)` must be a positive number; got {value}. With a "
                "schedule that begins at 0, pass the rate that is of interest."
            )
    return float(learning_rate) * float(update_size)


def _of_leaf(
    path: str, dtype: Any, correction: Any, largest: Any, step: float
) -> LeafNumerics:
    correction_dtype = None if correction is None else correction.dtype
    digits = master_digits(dtype, correction_dtype)
    half_unit = math.nan
    if math.isfinite(largest := float(largest)):
        # Subnormal numbers are spaced like the smallest normal ones.
        least = jnp.finfo(dtype).minexp
        exponent = max(math.frexp(largest)[1] - 1, least) if largest > 0 else least
        half_unit = math.ldexp(1.0, int(exponent) - digits)
    bits = 8 * dtype.itemsize
    if correction_dtype is not None:
        bits += 8 * correction_dtype.itemsize
    return LeafNumerics(path, str(dtype), bits, largest, half_unit, step)
