"""Parts of a model that are not trained."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq
from flashquinox.checkpoint import Checkpoints

from ..helpers import assert_raises, slow, tree_identical, weights


def _model(dtype=jnp.bfloat16):
    w = weights("matrix", "bias")
    base = jnp.full((4, 64), 0.5, dtype)
    return {"base": base, "adapter": w["matrix"], "b": w["bias"]}


_spec = {"base": False, "adapter": True, "b": True}
_frozen_dtypes = pytest.mark.parametrize(
    "dtype", [jnp.float8_e4m3fn, jnp.float4_e2m1fn, jnp.complex64, jnp.int8]
)


def _grads(model):
    return {name: model[name] if _spec[name] else None for name in model}


@pytest.mark.parametrize("make", [slow(fq.adamw), fq.lion, fq.sgd])
def test_state_of_the_trained_part(make, without_typechecker):
    model, optim = _model(), make(1e-2)
    trained, _ = eqx.partition(model, _spec)
    state = optim.init(trained)
    assert len(jtu.tree_leaves(state)) < len(jtu.tree_leaves(optim.init(model)))
    new, new_state = jax.jit(optim.step)(model, state, _grads(model))
    part, part_state = jax.jit(optim.step)(trained, state, _grads(trained))
    assert tree_identical(new, part | {"base": model["base"]})
    assert tree_identical(new_state, part_state)
    updates, _ = optim.update(_grads(model), state, model)
    assert updates["base"] is None
    # What looks into states takes the whole model.
    masters = fq.master_weights(model, state)
    assert masters["base"].dtype == jnp.float32
    back, same = fq.from_master_weights(masters, model, state)
    assert tree_identical((back, same), (model, state))
    wide = fq.widen_corrections(model, state)
    assert wide.corrections["base"] is None
    assert wide.corrections["adapter"].dtype == jnp.int16
    report = fq.check_numerics(model, state, 1e-2)
    assert [leaf.path for leaf in report.leaves] == ["adapter", "b"]
    # But a gradient without a state is a mistake.
    for take in (
        lambda: optim.step(model, state, model),
        lambda: optim.update(model, state, model),
    ):
        assert_raises(
            ValueError, take, "gradient at `['base']`", "frozen", "`init`", "None"
        )
    missing = lambda: optim.step(trained, state, model)
    assert_raises(ValueError, missing, "`['base']`", "model has None")


def test_leaves_without_anything_in_the_state():
    # SGD keeps nothing for float32 weights: these are not frozen.
    model = _model() | {"wide": weights("matrix", dtype=jnp.float32)["matrix"]}
    trained = model | {"base": None}
    optim = fq.sgd(1e-2)
    new, _ = optim.step(model, optim.init(trained), trained)
    assert tree_identical(new["base"], model["base"])
    assert jnp.any(new["wide"] != model["wide"])


@_frozen_dtypes
def test_dtypes_that_cannot_be_trained(dtype, without_typechecker):
    model, optim = _model(dtype), fq.lion(1e-2)
    state = optim.init(model)
    assert state.moments["mu"]["base"] is None and state.corrections["base"] is None
    new, state = jax.jit(optim.step)(model, state, _grads(model))
    assert tree_identical(new["base"], model["base"])
    masters = fq.master_weights(new, state)
    assert tree_identical(masters["base"], model["base"])
    assert tree_identical(fq.from_master_weights(masters, new, state)[0], new)
    fq.widen_corrections(model, state)
    assert len(fq.check_numerics(model, state, 1e-2).leaves) == 2
    plan = fq.memory_plan(model, optim)
    assert plan.parameters == model["adapter"].size + model["b"].size
    assert plan.step.gradients == 2 * plan.parameters
    for wrapped in (
        optax.masked(optim, _spec),
        optax.partition({True: optim, False: optax.set_to_zero()}, _spec),
    ):
        grads = jtu.tree_map(jnp.zeros_like, model)
        wrapped.update(grads, wrapped.init(model), model)
    if jnp.issubdtype(dtype, jnp.inexact):
        assert_raises(
            TypeError,
            lambda: optim.step(model, state, model),
            "`lion(...).step`",
            "`['base']`",
            jnp.dtype(dtype).name,
            "None",
        )


def test_cast_leaves_quantized_weights_and_states_alone():
    model = _model(jnp.float8_e4m3fn)
    optim = fq.adamw(1e-2, storage=fq.Storage(moments="float32"))
    state = optim.init(model)
    for keep in (None, "base"):
        cast = fq.cast(model, jnp.float32, keep=keep)
        assert cast["base"] is model["base"] and cast["adapter"].dtype == jnp.float32
    both = fq.cast((model, optax.chain(optim).init(model)), jnp.float16)
    assert both[0]["b"].dtype == jnp.float16
    assert tree_identical(both[1], (state,))


def test_release_and_checkpoints(tmp_path):
    wide = lambda x: x.astype(jnp.float32)
    loss = fq.LayeredLoss(
        blocks=lambda model: model["blocks"],
        prologue=lambda model, batch, key: batch * model["scale"],
        block=lambda layer, x, batch, key: x * wide(layer["w"] + layer["f"]),
        epilogue=lambda model, x, batch, key: jnp.sum(x * batch),
    )
    half = jnp.full((2, 32), 0.5, jnp.bfloat16)
    model = {"blocks": {"w": half, "f": half}, "scale": jnp.ones(32)}
    optim = fq.adamw(1e-2)
    state = optim.init(model | {"blocks": {"w": half, "f": None}})
    step = jax.jit(lambda *args: fq.release_step(optim, loss, *args))
    new, new_state, _ = step(model, state, jnp.ones(32))
    assert tree_identical(new["blocks"]["f"], half)
    assert jnp.all(new["blocks"]["w"] != half)
    quantized = new | {"base": jnp.ones((4, 64), jnp.float8_e4m3fn)}
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, quantized, new_state)
        checkpoints.wait()
        found = checkpoints.restore(quantized, new_state)
    assert tree_identical(found, (quantized, new_state))


def test_derivative_of_master_weights():
    params = weights("matrix")
    state = fq.adamw(1e-2).init(params)
    total = lambda params: jnp.sum(fq.master_weights(params, state)["matrix"])
    assert jnp.all(jax.grad(total)(params)["matrix"] == 1)


def test_numpy_weights_are_trained():
    # NumPy takes bfloat16 for no kind of number.
    model = jtu.tree_map(np.asarray, weights("matrix"))
    optim = fq.adamw(1e-2, weight_decay=0.1, mask={"matrix": True})
    jaxed = jtu.tree_map(jnp.asarray, model)
    expected = optim.step(jaxed, optim.init(jaxed), jaxed)
    assert tree_identical(optim.step(model, optim.init(model), model), expected)
