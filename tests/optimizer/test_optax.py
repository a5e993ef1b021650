import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import flashquinox as fq

from ..helpers import OPTIMIZERS, slow, tree_identical, weights


_names = ("matrix", "bias")
_make = {name: case.make for name, case in OPTIMIZERS.items()}


@pytest.fixture(autouse=True)
def _promotion():
    # Optax's and Flax's own arithmetic promotes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        yield


def _run(optim, params, steps=3, method=None):
    """A few steps by the Optax interface."""
    method = method or optim.update
    names, state = list(params), optim.init(params)
    for count in range(steps):
        updates, state = method(weights(*names, seed=1 + count), state, params)
        dtypes = lambda tree: jtu.tree_map(lambda x: x.dtype, tree)
        assert dtypes(updates) == dtypes(params)
        params = optax.apply_updates(params, updates)
    return params, state


def _close(x, y, steps=3):
    # One program or two: multiplications and additions may be contracted, which a
    # bfloat16 unit per step covers.
    return all(
        np.all(np.abs(np.float64(a) - np.float64(b)) <= steps * 2**-8 * np.abs(b))
        for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y), strict=True)
    )


def test_is_a_gradient_transformation():
    optim = fq.adamw(1e-2)
    assert isinstance(optim, optax.GradientTransformationExtraArgs)
    assert isinstance(optim, optax.GradientTransformation)
    init, update = optim
    params = weights(*_names)
    grads = weights(*_names, seed=1)
    expected = optim.update(grads, optim.init(params), params)
    # Extra arguments, as of `optax.scale_by_backtracking_linesearch`, do not disturb.
    for extra in ({}, {"value": 1.0}):
        found = update(grads, init(params), params, **extra)
        assert tree_identical(found, expected)


@pytest.mark.parametrize("name", ["adamw", slow("lion"), slow("sgd-momentum")])
def test_chain_with_clipping(name):
    params, grads = weights(*_names), weights(*_names, seed=1)
    optim = _make[name](1e-2)
    chain = optax.chain(optax.clip_by_global_norm(0.1), optim)
    found, _ = chain.update(grads, chain.init(params), params)
    clip = optax.clip_by_global_norm(0.1)
    clipped, _ = clip.update(grads, clip.init(params))
    expected, _ = optim.update(clipped, optim.init(params), params)
    assert tree_identical(found, expected)


def test_multi_steps():
    params = weights(*_names)
    optim = optax.MultiSteps(fq.lion(1e-2), every_k_schedule=2)
    state = optim.init(params)
    grads = [weights(*_names, seed=1 + i) for i in range(4)]
    new = params
    update = jax.jit(optim.update)
    for i, grad in enumerate(grads):
        updates, state = update(grad, state, new)
        applied = optax.apply_updates(new, updates)
        assert tree_identical(applied, new) == (i % 2 == 0)
        new = applied
    assert int(optax.tree.get(state.inner_opt_state, "count")) == 2


@pytest.mark.parametrize(
    "name, dtype",
    [
        slow(name, dtype, unless=i % 2 == j)
        for i, name in enumerate(OPTIMIZERS)
        for j, dtype in enumerate([jnp.bfloat16, jnp.float32])
    ],
)
def test_inject_hyperparams(name, dtype):
    make, kwargs = _make[name].func if hasattr(_make[name], "func") else _make[name], {}
    kwargs = getattr(_make[name], "keywords", {})
    if dtype == jnp.float32:
        kwargs = kwargs | {"storage": fq.Storage(master_weight_bits=None)}
    inject = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)
    optim = inject(learning_rate=1e-2, **kwargs)
    # Codecs take no part: of one optimizer, all is seen.
    names = _names if name == "adamw" else ("bias",)
    params = weights(*names, dtype=dtype)
    grads = weights(*names, seed=1)
    state = jax.jit(optim.init)(params)
    assert tree_identical(jtu.tree_leaves(state), jtu.tree_leaves(optim.init(params)))
    # Every number is a traced array.
    assert {"learning_rate"} <= set(state.hyperparams)
    numbers = {k for k, v in kwargs.items() if isinstance(v, float)}
    assert numbers <= set(state.hyperparams)
    update = jax.jit(optim.update)
    updates, new_state = update(grads, state, params)
    plain = make(1e-2, **kwargs)
    expected, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    assert _close(updates, expected)
    # And can be changed.
    new_state.hyperparams["learning_rate"] = jnp.asarray(0.0, jnp.float32)
    updates, _ = update(grads, new_state, params)
    if name not in ("lars", "rmsprop-momentum", "adafactor"):
        # The momentum of these is that of earlier steps, whose rate was another one;
        # the decay of the last is not scaled by it.
        assert not any(np.any(x) for x in jtu.tree_leaves(updates))


def test_inject_hyperparams_with_a_schedule():
    optim = optax.inject_hyperparams(fq.adamw, hyperparam_dtype=jnp.float32)(
        learning_rate=optax.linear_schedule(0.0, 1e-2, 4)
    )
    params = weights("bias")
    plain = fq.adamw(optax.linear_schedule(0.0, 1e-2, 4))
    found, expected = (
        _run(o, params, method=jax.jit(o.update))[0] for o in (optim, plain)
    )
    assert _close(found, expected)


@pytest.mark.parametrize(
    "name",
    [
        slow(n, unless=n in ("adamw", "sgd"))
        for n in ("adamw", "adam", "lion", "sgd", "sgdw")
    ],
)
def test_inject_hyperparams_of_bfloat16(name):
    """Defaults are no part of the state, in which 0.999 would be 1. What is passed is
    rounded to the dtype of the weights, but for arrays of another one."""
    make = getattr(fq, name)
    params, grads = weights(*_names), weights(*_names, seed=1)
    for given, rate in (
        (1e-2, float(jnp.bfloat16(1e-2))),
        (jnp.asarray(1e-2, jnp.float32), 1e-2),
    ):
        optim = optax.inject_hyperparams(make)(learning_rate=given)
        state = optim.init(params)
        assert set(state.hyperparams) == {"learning_rate"}
        found, state = optim.update(grads, state, params)
        plain = make(rate)
        expected, expected_state = plain.update(grads, plain.init(params), params)
        assert _close(found, expected)
        assert _same_moments(state.inner_state, expected_state)


def _same_moments(state, expected):
    # Of two programs, of which one has a number as a constant.
    codes = (jtu.tree_leaves(x.moments) for x in (state, expected))
    return all(
        np.mean(np.asarray(x) != np.asarray(y)) < 0.01
        for x, y in zip(*codes, strict=True)
    )


@pytest.mark.parametrize("rate", ["b1", "b2"])
def test_decay_rates_of_bfloat16(rate):
    """Any of them is too far from what it was."""
    optim = optax.inject_hyperparams(fq.adamw)(learning_rate=1e-2, **{rate: 0.9})
    for init in (optim.init, jax.jit(optim.init)):
        with pytest.raises(
            ValueError, match=rf"{rate}=.*hyperparam_dtype=jnp\.float32"
        ):
            init(weights(*_names))
    optim = optax.inject_hyperparams(fq.adamw)(
        learning_rate=1e-2, **{rate: jnp.asarray(0.9, jnp.float32)}
    )
    optim.init(weights(*_names))


def test_defaults_are_what_they_look_like():
    parameters = inspect.signature(fq.adamw).parameters
    shown = {name: repr(parameters[name].default) for name in ("b1", "b2", "eps")}
    assert shown == {"b1": "0.9", "b2": "0.999", "eps": "1e-08"}
    assert parameters["nesterov"].default is False


def test_masked():
    params, grads = weights(*_names), weights(*_names, seed=1)
    optim = optax.masked(fq.adamw(1e-2), {"matrix": True, "bias": False})
    updates, _ = optim.update(grads, optim.init(params), params)
    plain = fq.adamw(1e-2)
    only = {"matrix": params["matrix"]}
    expected, _ = plain.update({"matrix": grads["matrix"]}, plain.init(only), only)
    assert tree_identical(updates["matrix"], expected["matrix"])
    # As ever with `optax.masked`: what is not transformed passes through.
    assert tree_identical(updates["bias"], grads["bias"])


@pytest.mark.parametrize("partition", [optax.partition, slow(optax.multi_transform)])
def test_partition(partition):
    params, grads = weights(*_names), weights(*_names, seed=1)
    optim = partition(
        {"a": fq.adamw(1e-2), "b": fq.lion(1e-3)}, {"matrix": "a", "bias": "b"}
    )
    updates, _ = jax.jit(optim.update)(grads, optim.init(params), params)
    for name, plain in (("matrix", fq.adamw(1e-2)), ("bias", fq.lion(1e-3))):
        one = {name: params[name]}
        expected, _ = plain.update({name: grads[name]}, plain.init(one), one)
        assert _close(updates[name], expected[name])


def test_apply_if_finite():
    params = weights(*_names)
    optim = optax.apply_if_finite(fq.lion(1e-2), max_consecutive_errors=3)
    state = optim.init(params)
    bad = jtu.tree_map(np.array, weights(*_names, seed=1))
    bad["matrix"][0] = np.nan
    update = jax.jit(optim.update)
    updates, new_state = update(bad, state, params)
    assert tree_identical(optax.apply_updates(params, updates), params)
    assert tree_identical(new_state.inner_state, state.inner_state)
    good = weights(*_names, seed=1)
    updates, _ = update(good, new_state, params)
    assert all(np.any(x) for x in jtu.tree_leaves(jax.device_get(updates)))


def test_tree_get():
    params = weights(*_names)
    optim = optax.chain(optax.clip(1.0), fq.adamw(1e-2))
    state = optim.init(params)
    assert int(optax.tree.get(state, "count")) == 0
    assert set(optax.tree.get(state, "mu")) == set(_names)
    assert isinstance(optax.tree.get(state, "nu")["matrix"], fq.QuantMoment)


def test_tree_map_params():
    params = weights(*_names)
    optim = fq.adamw(1e-2)
    state = optim.init(params)
    seen = []

    def record(x):
        seen.append(x)
        return x

    mapped = optax.tree.map_params(optim, record, state)
    assert tree_identical(mapped, state)
    # Two moments and a correction of each weight, and no count.
    assert not any(x is state.count for x in seen)
    assert any(x is state.corrections["matrix"] for x in seen)


@pytest.mark.parametrize(
    "name, jit",
    [
        ("lion", jax.jit),
        ("adamw", eqx.filter_jit),
        slow("sgd-momentum", jax.jit),
        slow("adamw", jax.jit),
        slow("lion", eqx.filter_jit),
    ],
)
def test_jit(name, jit):
    params = weights("matrix")
    optim = _make[name](1e-2)
    assert tree_identical(jit(optim.init)(params), optim.init(params))
    found, state = _run(optim, params, method=jit(optim.update))
    expected, _ = _run(optim, params)
    assert _close(found, expected)
    grads = weights("matrix", seed=1)
    new, _ = jit(optim.step)(found, state, grads)
    assert _close(new, optim.step(found, state, grads)[0])


def test_scan():
    params = weights(*_names)
    optim = fq.lion(1e-2)
    grads = [weights(*_names, seed=1 + i) for i in range(4)]
    stacked = jtu.tree_map(lambda *x: np.stack(x), *grads)
    carry = (params, optim.init(params))
    found, _ = jax.lax.scan(lambda c, g: (optim.step(*c, g), None), carry, stacked)
    step = jax.jit(optim.step)
    for grad in grads:
        carry = step(*carry, grad)
    assert jtu.tree_structure(found) == jtu.tree_structure(carry)
    assert int(found[1].count) == 4
    assert _close(found[0], carry[0], steps=4)


@pytest.mark.parametrize(
    "name, names",
    [
        # The shapes make the paths of the code, whatever the rule.
        ("adamw", ("ragged", "scalar")),
        ("lion", ("matrix",)),
        slow("sgd-momentum", ("matrix",)),
        slow("adamw", ("matrix", "ragged", "scalar")),
    ],
)
def test_vmap_over_an_ensemble(name, names):
    members = [weights(*names, seed=i) for i in range(2)]
    stack = lambda trees: jtu.tree_map(lambda *x: jnp.stack(x), *trees)
    optim = _make[name](1e-2)

    def step(carry, _):
        params, state = carry
        grads = jtu.tree_map(lambda x: 0.1 * x * x, params)
        return optim.step(params, state, grads), None

    def run(params):
        return jax.lax.scan(step, (params, optim.init(params)), length=2)[0]

    found = jax.jit(jax.vmap(run))(stack(members))
    separate = stack(list(map(jax.jit(run), members)))
    assert _close(found[0], separate[0])
    assert tree_identical(found[1].count, separate[1].count)
    # The state of an ensemble is an ensemble of states.
    member = jtu.tree_map(lambda x: x[0], found)
    assert jtu.tree_structure(member[1]) == jtu.tree_structure(optim.init(members[0]))
    jax.eval_shape(optim.step, *member, members[0])


def test_filter_vmap_of_a_model():
    make = lambda key: fq.cast(eqx.nn.MLP(40, 3, 1, 0, key=key), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 2)
    optim = fq.adamw(1e-2)

    def train(key):
        model = make(key)
        state = optim.init(model)
        loss = lambda model: jnp.sum(model(jnp.ones(40, jnp.bfloat16)) ** 2)
        return optim.step(model, state, eqx.filter_grad(loss)(model))[0]

    ensemble = eqx.filter_jit(eqx.filter_vmap(train))(keys)
    train = eqx.filter_jit(train)
    for i in range(2):
        member = jtu.tree_map(lambda x: x[i] if eqx.is_array(x) else x, ensemble)  # noqa: B023
        expected = train(keys[i])
        arrays = lambda tree: eqx.filter(tree, eqx.is_array)
        assert _close(arrays(member), arrays(expected))


def test_filter_eval_shape():
    model = eqx.filter_eval_shape(
        lambda: fq.cast(eqx.nn.MLP(3, 2, 40, 1, key=jax.random.key(0)), jnp.bfloat16)
    )
    optim = fq.adamw(1e-2)
    state = eqx.filter_eval_shape(optim.init, model)
    new, new_state = eqx.filter_eval_shape(
        optim.step, model, state, eqx.filter(model, eqx.is_array)
    )
    shapes = lambda tree: [
        (x.shape, x.dtype) for x in jtu.tree_leaves(tree) if hasattr(x, "shape")
    ]
    assert shapes((new, new_state)) == shapes((model, state))


def test_flax_train_state():
    params = weights(*_names)
    grads = weights(*_names, seed=1)
    optim = fq.adamw(1e-2)
    state = TrainState.create(apply_fn=lambda: None, params=params, tx=optim)
    new = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))(state, grads)
    updates, _ = optim.update(grads, optim.init(params), params)
    assert _close(new.params, optax.apply_updates(params, updates))
    assert int(new.opt_state.count) == 1


def test_nnx_optimizer():
    model = nnx.Linear(
        40, 5, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    before = jtu.tree_map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    optim = nnx.Optimizer(model, fq.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optim):
        loss = lambda model: jnp.sum(model(jnp.ones((1, 40), jnp.bfloat16)) ** 2)
        optim.update(model, nnx.grad(loss)(model))

    for _ in range(2):
        train_step(model, optim)
    after = nnx.to_pure_dict(nnx.state(model))
    assert after["kernel"].dtype == jnp.bfloat16
    assert not tree_identical(after["kernel"], before["kernel"])
    # Two steps of Adam along a gradient that keeps its signs: twice the learning rate.
    moved = np.abs(np.float64(after["kernel"]) - np.float64(before["kernel"]))
    assert 0.9 * 2e-2 <= np.median(moved) <= 1.1 * 2e-2
