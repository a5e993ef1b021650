"""Models of the kinds that Equinox's documentation trains, with an optimizer of this
library where those programs have one of Optax's."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq

from ..helpers import slow
from .equinox_models import Program, PROGRAMS


@pytest.fixture(autouse=True)
def _promotion():
    # Layers of other libraries promote.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _init(way, optim, model, trained):
    if way == "arrays":
        return optim.init(eqx.filter(model, eqx.is_array))
    if way == "inexact":
        return optim.init(eqx.filter(model, trained))
    return optim.init(model)


def _advance(way, optim, model, opt_state, grads, trained):
    """The ways in which programs take a step."""
    if way == "step":
        return optim.step(model, opt_state, grads)
    if way == "whole":
        params = model
    elif way == "arrays":
        params = eqx.filter(model, eqx.is_array)
    else:
        params = eqx.filter(model, trained)
    updates, opt_state = optim.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state


def _train(program: Program, optim, way: str, dtype):
    """The model as it was, the trained one, and the loss in every step."""
    model, state = eqx.filter_jit(program.make)()
    if dtype != jnp.float32:
        model = fq.cast(model, dtype, keep=program.keep)
    trained = (
        eqx.is_inexact_array if program.trained is None else program.trained(model)
    )
    opt_state = _init(way, optim, model, trained)

    def split_loss(diff, rest, state, key):
        return program.loss(eqx.combine(diff, rest), state, key, dtype)

    # Most of the time goes to compilers.
    @eqx.filter_jit(compiler_options={"xla_backend_optimization_level": 0})
    def step(model, state, opt_state, key):
        diff, rest = eqx.partition(model, trained)
        loss = eqx.filter_value_and_grad(split_loss, has_aux=True)
        (value, state), grads = loss(diff, rest, state, key)
        model, opt_state = _advance(way, optim, model, opt_state, grads, trained)
        return model, state, opt_state, value

    start, losses = model, []
    for i in range(program.steps):
        model, state, opt_state, value = step(model, state, opt_state, jr.key(i))
        losses.append(float(value))
    return start, model, losses


@ft.cache
def _losses_of_optax(name: str) -> list[float]:
    program = PROGRAMS[name]
    optim = optax.adamw(program.learning_rate, weight_decay=1e-2)
    return _train(program, optim, "inexact", jnp.float32)[2]


# Every way with every dtype, and several models.
_WAYS = {
    "classification": ("step", "arrays"),
    "recurrent": ("whole", "inexact"),
    "bert": ("arrays", "whole"),
    "vit": ("inexact", "step"),
    "diffusion": ("step", "inexact"),
    "unet": ("whole", "arrays"),
    "norms": ("arrays", "step"),
    "frozen": ("inexact", "whole"),
}
# The others take long to compile.
_QUICK = {
    *((name, True) for name in ("classification", "norms")),
    ("frozen", False),
}


@pytest.mark.product
@pytest.mark.parametrize(
    "name, narrow",
    [
        slow(
            name,
            narrow,
            id=f"{name}-{'bfloat16' if narrow else 'float32'}",
            unless=(name, narrow) in _QUICK,
        )
        for name in PROGRAMS
        for narrow in (True, False)
    ],
)
def test_learns_as_with_optax(name, narrow):
    program, way = PROGRAMS[name], _WAYS[name][not narrow]
    optim = fq.adamw(program.learning_rate, weight_decay=1e-2)
    dtype = jnp.bfloat16 if narrow else jnp.float32
    start, model, losses = _train(program, optim, way, dtype)
    expected = _losses_of_optax(name)
    learned = expected[0] - expected[-1]
    difference = np.max(np.abs(np.subtract(losses, expected))) / learned
    assert learned > 0.05 * expected[0]
    # Logits in bfloat16, and moments of 8 bits.
    assert difference <= 0.1
    _kept(start, model)


def _kept(start, model):
    """What is no weight is as it was, in its place."""
    assert jtu.tree_structure(start) == jtu.tree_structure(model)
    rest = lambda tree: eqx.filter(tree, eqx.is_inexact_array, inverse=True)
    assert eqx.tree_equal(rest(start), rest(model))
