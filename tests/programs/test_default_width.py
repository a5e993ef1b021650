"""What `master_weight_bits` is where nobody passes it, or where it reaches nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import pytest

import flashquinox as fq

from ..helpers import assert_raises, weights


_makers = [fq.adamw, fq.adam, fq.lion, fq.sgd, fq.sgdw]


def _params():
    return {
        "narrow": weights("matrix")["matrix"],
        "wide": weights("matrix", dtype=jnp.float32)["matrix"],
    }


@pytest.mark.parametrize("make", _makers)
def test_default_is_for_narrow_weights(make):
    params = _params()
    corrections = make(1e-3).init(params).corrections
    assert corrections["narrow"].dtype == jnp.int8 and corrections["wide"] is None
    model = {"wide": params["wide"]}
    optim = make(1e-3)
    new, state = optim.step(model, optim.init(model), model)
    assert state.corrections["wide"] is None
    assert jnp.any(new["wide"] != model["wide"])


@pytest.mark.once
def test_groups_of_one_dtype():
    params = _params()
    groups = {"narrow": fq.adamw(1e-2), "wide": fq.adamw(1e-2)}
    optim = optax.partition(groups, {name: name for name in params})
    updates, _ = optim.update(params, optim.init(params), params)
    assert all(jnp.any(x != 0) for x in jtu.tree_leaves(updates))
    # A width that somebody asked for has to reach something.
    groups["wide"] = fq.adamw(1e-2, storage=fq.Storage(master_weight_bits=24))
    optim = optax.partition(groups, {name: name for name in params})
    assert_raises(ValueError, lambda: optim.init(params), "no effect", "['wide']")


def test_inject_hyperparams_and_memory_plan():
    inject = optax.inject_hyperparams(fq.adamw, hyperparam_dtype=jnp.float32)
    params = {"wide": _params()["wide"]}
    state = jax.jit(inject(learning_rate=1e-3).init)(params)
    assert set(state.hyperparams) == {"learning_rate"}
    assert fq.memory_plan(params, fq.adamw(1e-3)).step.corrections == 0


def test_messages_name_what_differs(without_typechecker):
    params = {"w": _params()["narrow"]}
    optim = fq.adamw(1e-3)
    state = optim.init(params)
    wide = fq.cast(params, jnp.float32)
    assert_raises(
        ValueError,
        lambda: optim.step(wide, state, wide),
        "`['w']` is float32",
        "int8 correction",
    )
    without = fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=None)).init(params)
    assert_raises(
        ValueError,
        lambda: optim.step(params, without, params),
        "`Storage(master_weight_bits=None)`",
        "`Storage(master_weight_bits=24)`, as 'auto' is",
    )
    assert_raises(
        ValueError,
        lambda: fq.adamw(1e-3, storage=fq.Storage(group_size=32.0)),
        "integer",
        "32.0",
    )
    assert_raises(
        ValueError,
        lambda: fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=24.0)),
        "24.0",
    )


def test_state_of_an_ensemble(without_typechecker):
    members = jtu.tree_map(lambda x: jnp.stack([x, x]), {"w": _params()["narrow"]})
    optim = fq.adamw(1e-3)
    state = eqx.filter_vmap(optim.init)(members)
    assert_raises(
        ValueError,
        lambda: optim.step(members, state, members),
        "`adamw(...).step`",
        "ensemble",
        "vmap",
    )
    eqx.filter_vmap(optim.step)(members, state, members)
