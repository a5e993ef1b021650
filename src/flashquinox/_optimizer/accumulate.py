"""Accumulation of gradients in few bytes."""

from collections.abc import Callable
from typing import Any, cast, TYPE_CHECKING, TypeAlias

import numpy as np
import optax
from jaxtyping import PyTree, Scalar, ScalarLike

from .._common.number_checks import check_flag
from .._common.text import function_name, shown
from .._model.trees import Model, Updates
from .accumulate_engine import AccumulateEngine
from .accumulation_state import AccumulationState, adding_settings, SumBits
from .engine import StepEngine
from .method import Method
from .optimizer import Optimizer, settings_of
from .schedules import check_takes_count


Every: TypeAlias = int | Callable[[Scalar], ScalarLike]


class AccumulatingOptimizer(optax.GradientTransformationExtraArgs):
    """An optimizer that takes a step for every few gradients: see
    [`flashquinox.accumulate`][]. It is also an
    `optax.GradientTransformationExtraArgs`.
    """

    # At run time, the two fields of the tuple: `Method`s of one `AccumulateEngine`.
    if TYPE_CHECKING:

        def init(self, params: PyTree) -> AccumulationState: ...

        def update(
            self,
            updates: Updates,
            state: AccumulationState,
            params: PyTree | None = None,
            **extra_args: Any,
        ) -> tuple[Updates, AccumulationState]: ...

    def __repr__(self) -> str:
        """One line: the call that makes such an optimizer."""
        engine = _engine_of(self)
        every = engine.every
        others = "" if engine.bits == 24 else f", bits={engine.bits}"
        others += "" if engine.mean else ", mean=False"
        shown_every = function_name(every) if callable(every) else every
        return f"accumulate({self.inner!r}, every={shown_every}{others})"

    @property
    def inner(self) -> Optimizer:
        """The optimizer that takes the steps."""
        engine = _engine_of(self).inner
        init, update = Method(engine, "init"), Method(engine, "update")
        return Optimizer(cast(Any, init), cast(Any, update))

    def step(
        self,
        model: Model,
        state: AccumulationState,
        grads: PyTree,
        *,
        max_norm: ScalarLike | None = None,
    ) -> tuple[Model, AccumulationState]:
        """Adds gradients to the sums. With the last of `every`, takes a step.

        **Arguments:**

        - `model`, `state`, `grads`: as of [`flashquinox.Optimizer.step`][]. A leaf
            whose gradient is `None` keeps its sum, and takes no step if this is the
            last of `every`.
        - `max_norm`: the largest norm of the *mean* of the gradients (of their sum,
            with `mean=False`). Only the step has to do with it.

        **Returns:**

        A 2-tuple of the model, which is that of before until the last of `every`, and
        the new state.

        **Raises:**

        `TypeError` or `ValueError` if the trees, shapes or dtypes do not fit together,
        or the state is that of another optimizer. The message names the leaf.
        """
        return _engine_of(self).advance("step", model, state, grads, max_norm)


def _engine_of(optim: AccumulatingOptimizer) -> AccumulateEngine:
    return cast(Any, optim.update).module


def accumulate(
    optim: Optimizer, every: Every, *, bits: SumBits = 24, mean: bool = True
) -> AccumulatingOptimizer:
    r"""Accumulates gradients between calls, and takes a step of `optim` for every few
    of them:

    $$s_k = \operatorname{round}(s_{k-1} + g_k), \qquad \text{and if } k = n: \quad
    \text{step by } \frac{s_n}{n}, \quad s_n \leftarrow 0$$

    A sum takes 3 bytes per parameter: a bfloat16 number and an 8-bit correction, 24
    bits in all, 16 of them significant. `optax.MultiSteps` keeps 4 bytes, in float32.
    Each addition is one pass over memory, by the kernels that take steps: 2 bytes of
    gradient are read, 3 of sum are read and written.

    **Rounding.** A sum is rounded by a threshold that rotates through $[0, 1)$ from
    call to call, up or down in just the proportion that leaves it right on average.
    With 24 bits, that is by less than $2^{-15}$ of itself, and a bfloat16 gradient of
    at least $2^{-8}$ of its sum is added exactly. With 16 bits, it is by less than
    $2^{-12}$ where a sum is at least a quarter of the largest one of its group of 32,
    and by less than $2^{-9}$ down to $2^{-29}$ of that: see
    [`flashquinox.TaperedCodec`][]. What is lost in one addition has the variance of a
    rounding to nearest, $u^2 / 12$ for a unit $u$ of the sum, if remainders are spread
    evenly; no threshold has less. The step gets the mean in the dtype of the
    gradients: of bfloat16 ones, rounded once more, to nearest.

    ??? Example

        ```python
        optim = fq.accumulate(fq.adamw(1e-3), every=8)
        model, state = fq.prepare(float32_model, optim)

        @eqx.filter_jit(donate="all-except-first")
        def train_step(batch, model, state):
            grads = eqx.filter_grad(loss)(model, batch)
            return optim.step(model, state, grads)
        ```

    - Learning rates, weight decay and whatever else is scheduled count steps, not
        gradients. `state.count` is the number of steps, `state.mini_step` that of
        gradients since the last one.
    - With `skip_nonfinite=True` in `optim`, a gradient with a NaN or an infinity, or of
        more than 2^62 in magnitude, is left out and not counted: a step is taken once
        there are `every` others. As with `optax.MultiSteps` and `skip_not_finite`.
        Otherwise it damages the sums of the elements it came to, and the step with
        them. With 16 bits, an infinity is NaN there.
    - The state is a pytree like every other: a checkpoint in the middle of an
        accumulation goes on bit for bit.
    - With `state_memory="pinned_host"` in `optim`, sums are in host memory too, and
        gradients are added to them: by kernels for GPUs where they are; elsewhere,
        sums go through the device in portions. So they do in the last call of `every`,
        as the gradient of the step.
    - Under `vmap`, a step is computed in each call, and kept in the last of `every`.

    **Arguments:**

    - `optim`: an optimizer of this library. Transformations of Optax go around the
        result: in `optax.chain(transformation, fq.accumulate(...))`, they see each
        gradient.
    - `every`: $n$: how many gradients make a step: an integer of at least 1, or a
        function from the number of steps taken to one.
    - `bits`: in how many bits sums are stored: 24, in 3 bytes; 16, in 2.0625 bytes, as
        codes and scales of a [`flashquinox.TaperedCodec`][]; or 32, in 4 bytes, as
        float32 numbers. Sums of float64 weights are float64; with 16 bits, those of
        vectors of fewer than 4096 elements are float32.
    - `mean`: whether steps are taken by the mean of the gradients. If `False`, by their
        sum.

    **Returns:**

    A [`flashquinox.AccumulatingOptimizer`][], which has `init`, `step` and `update` and
    is also an `optax.GradientTransformationExtraArgs`. Its state is a
    [`flashquinox.AccumulationState`][].

    **Raises:**

    `TypeError` or `ValueError` for other arguments.
    """
    call = "accumulate"
    if not isinstance(optim, Optimizer):
        hint = "Transformations of Optax go around it."
        if isinstance(optim, AccumulatingOptimizer):
            hint = "This one accumulates already."
        raise TypeError(
            f"`{call}(optim, every)` takes an optimizer of this library, such as "
            f"`flashquinox.adamw(1e-3)`; got {shown(optim)}. {hint}"
        )
    settings = settings_of(optim)
    engine = AccumulateEngine(
        inner=StepEngine(settings),
        adding=adding_settings(call, settings, bits),
        every=_check_every(call, every),
        bits=int(bits),
        mean=check_flag(call, "mean", mean),
    )
    # Optax's types know no state that is not made of arrays.
    init, update = Method(engine, "init"), Method(engine, "update")
    return AccumulatingOptimizer(cast(Any, init), cast(Any, update))


def _check_every(call: str, every: Any) -> Every:
    if callable(every):
        check_takes_count(call, "every", every)
        return cast(Any, every)
    is_integer = isinstance(every, int | np.integer) and not isinstance(every, bool)
    if not is_integer or every < 1:
        raise ValueError(
            f"`{call}(every=...)` must be an integer of at least 1, or a function from "
            f"the number of steps taken to one; got {shown(every)}."
        )
    return int(every)
