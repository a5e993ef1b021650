"""A small GPT that float32 Adam trains, while something else sees its gradients too."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
import optax
from _gpt import GPT, loss, sample
from jaxtyping import Array, Key, PyTree, ScalarLike, UInt8


# How many steps there are, and from which on they count in means.
STEPS, FIRST_STEP = 250, 10

_LEARNING_RATE = 1e-3

C = TypeVar("C")
Y = TypeVar("Y")


def beside_float32_adam(
    text: UInt8[Array, " bytes"],
    key: Key[Array, ""],
    start: Callable[[PyTree], C],
    watch: Callable[[C, PyTree, PyTree, PyTree], tuple[C, Y]],
    *,
    b2: ScalarLike,
    batch: int,
) -> Y:
    """What `watch` finds in each step, stacked: from what it has kept, the gradients,
    the exact direction of Adam and its state, it gives what it keeps and what it finds.
    `start` makes the first that it keeps, from the first weights."""
    model_key, data_key = jax.random.split(key)
    model, static = eqx.partition(GPT(key=model_key), eqx.is_inexact_array)
    reference = optax.scale_by_adam(b2=b2)

    def step(carry, step_key):
        model, state, kept = carry
        grads = jax.grad(
            lambda m: loss(eqx.combine(m, static), sample(text, batch, step_key))
        )(model)
        direction, state = reference.update(grads, state)
        kept, found = watch(kept, grads, direction, state)
        model = jtu.tree_map(lambda w, u: w - _LEARNING_RATE * u, model, direction)
        return (model, state, kept), found

    carry = (model, reference.init(model), start(model))
    return jax.lax.scan(step, carry, jax.random.split(data_key, STEPS))[1]
