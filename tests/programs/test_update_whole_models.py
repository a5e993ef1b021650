"""`update` of a whole model, also of what in it is not trained."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import pytest

import flashquinox as fq

from ..helpers import slow, tree_identical, weights


class Net(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    positions: jax.Array
    key: jax.Array
    frozen: jax.Array
    activation: object
    name: str
    flag: bool

    def __call__(self, x):
        return self.activation(self.linear(x) + self.frozen.astype(x.dtype))


def _net():
    return Net(
        eqx.nn.Linear(4, 32, key=jax.random.key(0), dtype=jnp.bfloat16),
        eqx.nn.Dropout(0.05),
        jnp.arange(5),
        jax.random.key(1),
        jnp.ones(32, jnp.float8_e4m3fn),
        jax.nn.relu,
        "a name",
        True,
    )


def _loss(net):
    return jnp.sum(net(jnp.ones(4, jnp.bfloat16)).astype(jnp.float32) ** 2)


def _grads(net):
    linear = eqx.filter_grad(lambda linear: _loss(eqx.tree_at(_at, net, linear)))
    nothing = jtu.tree_map(lambda _: None, net)
    return eqx.tree_at(_at, nothing, linear(net.linear), is_leaf=lambda x: x is None)


def _at(net):
    return net.linear


_alone, _clipped = lambda o: o, partial(optax.chain, optax.clip(1.0))


@pytest.mark.parametrize(
    "make, wrap",
    [
        (fq.adamw, _clipped),
        (fq.sgd, _alone),
        slow(fq.adamw, _alone),
        slow(fq.sgd, _clipped),
    ],
)
def test_untrained_leaves_have_no_update(make, wrap):
    net = _net()
    optim = wrap(make(1e-2))
    state = optim.init(net)
    new, traces = net, 0

    @eqx.filter_jit
    def train_step(net, state):
        nonlocal traces
        traces += 1
        updates, state = optim.update(_grads(net), state, net)
        assert len(jtu.tree_leaves(updates)) == len(jtu.tree_leaves(net.linear))
        return eqx.apply_updates(net, updates), state

    for _ in range(3):
        new, state = train_step(new, state)
    assert traces == 1
    data = lambda net: jax.random.key_data(net.key)
    assert tree_identical(data(new), data(net))
    rest = lambda net: eqx.tree_at(lambda net: (_at(net), net.key), net, (None, None))
    assert tree_identical(rest(new), rest(net))
    assert not tree_identical(new.linear, net.linear)


def test_gradients_of_integers():
    params = weights("matrix") | {"positions": jnp.arange(5)}
    loss = lambda params: jnp.sum(params["matrix"].astype(jnp.float32) ** 2)
    grads = jax.grad(loss, allow_int=True)(params)
    assert grads["positions"].dtype == jax.dtypes.float0
    optim = fq.adamw(1e-2)
    updates, state = optim.update(grads, optim.init(params), params)
    assert updates["positions"] is None
    new, _ = optim.step(params, optim.init(params), grads)
    applied = eqx.apply_updates(params, updates)
    assert tree_identical(applied["positions"], params["positions"])
    # A sum may be a unit in the last place away from what `step` gives.
    difference = jnp.abs(applied["matrix"] - new["matrix"])
    assert jnp.all(difference <= 2**-7 * jnp.abs(new["matrix"]))
    # Optax's function wants no parameter where there is no update.
    trained = eqx.filter(params, eqx.is_inexact_array)
    by_optax = optax.apply_updates(trained, updates)
    assert tree_identical(by_optax["matrix"], applied["matrix"])
    assert int(state.count) == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda o: optax.apply_if_finite(o, 2),
        lambda o: optax.conditionally_mask(o, lambda step: jnp.asarray(step) >= 0),
        lambda o: optax.chain(o, optax.scale(1.0)),
        lambda o: optax.MultiSteps(o, 1),
    ],
)
def test_updates_look_like_gradients(wrap):
    # Some wrappers choose between updates and what they make of gradients.
    is_trained = lambda x: eqx.is_inexact_array(x) and x.dtype == jnp.bfloat16
    params = eqx.filter(_net(), is_trained)
    optim = wrap(fq.lion(1e-2))
    grads = jtu.tree_map(jnp.ones_like, params)
    if not isinstance(optim, optax.MultiSteps):
        grads = eqx.tree_at(lambda net: net.linear.bias, grads, None)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optim.update)(grads, optim.init(params), params)
    assert jtu.tree_structure(updates) == jtu.tree_structure(grads)
    new = eqx.apply_updates(params, updates)
    assert jnp.any(new.linear.weight != params.linear.weight)
