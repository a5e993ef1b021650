"""Exponential moving averages of master weights, in 24 bits."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Int8, Int32, PyTree, ScalarLike

from .._common import eager, memory
from .._common.dtypes import compute_dtype
from .._common.number_checks import check_in_range
from .._common.placement import compute_like, put_like
from .._model.trained import is_trainable
from .._model.trees import flatten, Leaf, match, Model, with_values
from .._model.variables import without_variables
from .._storage.thresholds import rounding_threshold
from .accumulation_state import AccumulationState
from .call_checks import check_given, check_has_values
from .ema_arithmetic import as_average, decoded, moved_average, share_of_weights
from .states import find, open_states, OpenedStates


class EMAState(eqx.Module):
    """An average of weights, of [`flashquinox.ema`][]. `weights` and `corrections` are
    trees of the structure of the model, with `None` for leaves that are not trained.

    - `count`: how many steps are in the average.
    - `steps_seen`: the number of steps that the optimizer had taken then.
    - `weights`: the average, rounded to bfloat16. Of float64 weights, in float64.
    - `corrections`: the `int8` that extends each of these to 24 bits: see
        [`flashquinox.ECCWeight`][].
    """

    count: Int32[Array, "*ensemble"]
    steps_seen: Int32[Array, "*ensemble"]
    weights: PyTree[Float[Array, "..."] | None]
    corrections: PyTree[Int8[Array, "..."] | None]


class EMA(eqx.Module):
    """An exponential moving average, made by [`flashquinox.ema`][]: functions of its
    state, an [`flashquinox.EMAState`][]."""

    decay: ScalarLike

    def init(self, model: PyTree, state: PyTree) -> EMAState:
        """The average before the first step: the master weights themselves.

        **Arguments:**

        - `model`: the model.
        - `state`: the state of its optimizer, or that of a wrapper with one or more
            inside. It has the lower bits of weights, and tells which are trained.

        **Returns:**

        An average with copies of the weights, divided among devices like these.

        **Raises:**

        The errors of [`flashquinox.master_weights`][].
        """
        call = "ema(...).init"
        opened = open_states(call, model, state)
        _, rebuild = flatten(model)
        weights: list[Any] = [None for _ in opened.leaves]
        corrections: list[Any] = [None for _ in opened.leaves]
        for i, leaf in _averaged(opened):
            read = [leaf.value, opened.corrections[i]]
            read = [x for x in read if x is not None]
            average = eager.elementwise(as_average)
            stored = compute_like(call, leaf.name, average, read, read)
            stored = [
                None if x is None else put_like(call, leaf.name, x, leaf.value)
                for x in stored
            ]
            if memory.is_on_host(opened.corrections[i]):
                stored = memory.to_host(stored)
            weights[i], corrections[i] = stored
        seen = _steps(opened)
        return EMAState(
            count=jnp.zeros_like(seen),
            steps_seen=seen + 0,
            weights=rebuild.state(weights),
            corrections=rebuild.state(corrections),
        )

    def update(self, average: EMAState, model: PyTree, state: PyTree) -> EMAState:
        """Takes the weights after a step into the average.

        Where the optimizer has taken no step since, because it accumulates gradients or
        has skipped those that were not finite, the average stays as it is.

        **Arguments:**

        - `average`: from `init` or from the previous `update`.
        - `model`, `state`: what the step returned.

        **Returns:**

        The new average. In a compiled step that donates the old one, it is in its
        place.

        **Raises:**

        `TypeError` or `ValueError` if average, model and state do not fit together. The
        message names the leaf.
        """
        call = "ema(...).update"
        _check_average(call, average)
        opened = open_states(call, model, state)
        check_has_values(call, average=average)
        weights, corrections = _match(call, average, opened.leaves)
        _check_averaged(call, opened, weights)
        counts = without_variables((average.count, average.steps_seen))
        count, seen_before = memory.to_device(jtu.tree_map(jnp.asarray, counts))
        seen = _steps(opened)
        has_moved = seen != seen_before

        def move(stored: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
            new: list[tuple[Any, Any]] = []
            for (i, leaf), old in zip(_averaged(opened), stored, strict=True):
                masters = leaf.value, memory.to_device(opened.corrections[i])
                there, old = old, memory.to_device(old)
                # One leaf after the other, so that only one has numbers in memory that
                # are not stored.
                (old, masters), new[-1:] = lax.optimization_barrier(
                    ((old, masters), new[-1:])
                )
                dtype = compute_dtype(leaf.value.dtype)
                share = share_of_weights(self.decay, count, dtype)
                share = jnp.where(has_moved, share, 0)
                threshold = rounding_threshold(count, np.uint32(i))
                moved = moved_average(*old, *masters, share, threshold)
                new.append(memory.where(moved, there))
            return new

        stored = [(weights[i], corrections[i]) for i, _ in _averaged(opened)]
        if find(state, AccumulationState).values:
            # Most calls take no step.
            new = lax.cond(has_moved, move, lambda stored: stored, stored)
        else:
            new = move(stored)
        pairs = list(zip(_averaged(opened), new, strict=True))
        with_new = lambda tree, part: with_values(
            tree, {leaf.unwrapped: x[part] for (_, leaf), x in pairs}
        )
        next_count = jnp.asarray(optax.safe_increment(count))
        return EMAState(
            count=jnp.where(has_moved, next_count, count),
            steps_seen=seen,
            weights=with_new(average.weights, 0),
            corrections=with_new(average.corrections, 1),
        )

    def model(self, average: EMAState, model: Model) -> Model:
        """The model with the averaged weights, in its own dtypes: for evaluation.

        Averages of bfloat16 weights are those of `average.weights` themselves. Outside
        of `jit` they are not copied: a step that donates `average` deletes them.

        **Arguments:**

        - `average`: the average.
        - `model`: the model. Of leaves that are averaged, only the dtypes count.

        **Returns:**

        A pytree like `model`.

        **Raises:**

        `ValueError` if the average is not one of this model.
        """
        call = "ema(...).model"
        return _with_average(call, average, model, lambda leaf: leaf.value.dtype)

    def master_weights(self, average: EMAState, model: Model) -> Model:
        """The model with the averaged weights in float32 (float64 where weights are).
        As [`flashquinox.master_weights`][], of the average: also to go on training from
        it, by [`flashquinox.from_master_weights`][].
        """
        call = "ema(...).master_weights"
        wide = lambda leaf: compute_dtype(leaf.value.dtype)
        return _with_average(call, average, model, wide)


def ema(decay: ScalarLike) -> EMA:
    r"""An exponential moving average of the *master* weights $w_t$, debiased, in 3
    bytes per parameter:

    $$a_t = a_{t-1} + \frac{1 - \beta}{1 - \beta^t} (w_t - a_{t-1}) =
    \frac{1 - \beta}{1 - \beta^t} \sum_{i=1}^t \beta^{t-i} w_i$$

    so that the first average is the weights after the first step, and none has a part
    in it of what was before. It is a bfloat16 number and an 8-bit correction, 24 bits
    in all, 16 of them significant. A bfloat16 number would not move: with $\beta =
    0.999$, an average moves by a thousandth of a difference.

    Even of 24 bits, an average often moves by less than a unit. So it is rounded by a
    threshold that rotates through $[0, 1)$ from step to step: a hundredth of a unit
    moves it by one unit in one of a hundred steps.

    ??? Example

        ```python
        optim, ema = fq.adamw(1e-3), fq.ema(0.999)
        model, state = fq.prepare(float32_model, optim)
        average = ema.init(model, state)

        @eqx.filter_jit(donate="all-except-first")
        def train_step(batch, model, state, average):
            grads = eqx.filter_grad(loss)(model, batch)
            model, state = optim.step(model, state, grads)
            return model, state, ema.update(average, model, state)

        evaluated = ema.model(average, model)
        ```

    An update has to read a weight and its correction, and to read and write the average
    and its correction: 9 bytes per parameter. On TPUs and CPUs, XLA makes two passes,
    and moves 15.

    **Arguments:**

    - `decay`: $\beta \in [0, 1)$: a number, or a scalar array, which may be traced.

    **Returns:**

    A [`flashquinox.EMA`][], with the functions `init`, `update`, `model` and
    `master_weights`.

    **Raises:**

    `TypeError` or `ValueError` for a decay out of range.
    """
    check_in_range("ema", "decay", decay, 0.0, 1.0)
    return EMA(decay)


def _averaged(opened: OpenedStates) -> list[tuple[int, Leaf]]:
    """The leaves that are trained, with their numbers."""
    return [(i, leaf) for i, leaf in enumerate(opened.leaves) if opened.trained[i]]


def _steps(opened: OpenedStates) -> Int32[Array, ""]:
    """How many steps all optimizers together have taken."""
    counts = memory.to_device([jnp.asarray(x.count) for x in opened.states])
    return sum(counts, jnp.int32(0))


def _with_average(
    call: str, average: EMAState, model: Model, dtype_of: Callable[[Leaf], Any]
) -> Model:
    """The model with the average in place of weights, in these dtypes."""
    _check_average(call, average)
    check_given(call, model)
    check_has_values(call, average=average)
    leaves, rebuild = flatten(model)
    weights, corrections = _match(call, average, leaves)
    values = []
    for leaf, weight, correction in zip(leaves, weights, corrections, strict=True):
        value, lower = (leaf.value, None) if weight is None else (weight, correction)
        value, lower = memory.to_device((value, lower))
        if is_trainable(leaf.value) and value.dtype != dtype_of(leaf):
            value = decoded(value, lower, jnp.dtype(dtype_of(leaf)))
        values.append(value)
    return rebuild(values)


def _match(call: str, average: EMAState, leaves: list[Leaf]) -> tuple[Any, Any]:
    weights = match(call, "average.weights", average.weights, leaves)
    for leaf, weight in zip(leaves, weights, strict=True):
        shape = jnp.shape(leaf.value) if is_trainable(leaf.value) else None
        if weight is not None and jnp.shape(weight) != shape:
            found = "no weight" if shape is None else f"a weight of shape {shape}"
            raise ValueError(
                f"`{call}`: the average at `{leaf.name}` has shape {weight.shape}, "
                f"where the model has {found}. Pass the average of this model."
            )
    return weights, match(call, "average.corrections", average.corrections, leaves)


def _check_average(call: str, average: Any) -> None:
    if not isinstance(average, EMAState):
        raise TypeError(
            f"`{call}`: the average is no `flashquinox.EMAState` but a "
            f"{type(average).__name__}. It comes first: `ema.update(average, model, "
            "state)`, `ema.model(average, model)`."
        )
    shape = np.shape(without_variables(average.count))
    if shape != ():
        raise ValueError(
            f"`{call}`: the average has counts of shape {shape}: it is one of an "
            "ensemble, which `vmap` made. Call this under `vmap` too."
        )


def _check_averaged(call: str, opened: OpenedStates, weights: list[Any]) -> None:
    """What is averaged must be what is trained."""
    for leaf, is_trained, weight in zip(
        opened.leaves, opened.trained, weights, strict=True
    ):
        if is_trained == (weight is not None):
            continue
        found = "nothing" if is_trained else "an array"
        raise ValueError(
            f"`{call}`: the average has {found} for the weight at `{leaf.name}`, which "
            f"is {'' if is_trained else 'not '}trained. Make an average of this model "
            "and this state by `init`."
        )
