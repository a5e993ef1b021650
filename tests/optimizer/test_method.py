"""Optimizers as what `jax.jit` takes: functions, arguments, static arguments."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flashquinox as fq


_params = {"layer": {"w": jnp.ones((4, 32), jnp.bfloat16)}, "b": jnp.ones(8)}
_mask = {"layer": {"w": True}, "b": False}


class _Layer(eqx.Module):
    w: object

    def __call__(self):
        raise AssertionError("a mask, not to be called")


def _everywhere():
    sharding = NamedSharding(jax.make_mesh((1,), ("x",)), PartitionSpec())
    return {"layer": {"w": sharding}, "b": None}


_options = {
    "mask of dictionaries": lambda: {"mask": _mask},
    "mask of lists": lambda: {"mask": {"layer": {"w": True}, "b": [False]}},
    "learning rate in an array": lambda: {"learning_rate": jnp.asarray(1e-2)},
    "peak in an array": lambda: {
        "decay": "independent",
        "peak_learning_rate": jnp.asarray(1.0),
    },
    "shardings": lambda: {"shardings": _everywhere()},
}


def _make(bits="auto", **options):
    kwargs = {"learning_rate": 1e-2} | options
    storage = fq.Storage(moments="float32", master_weight_bits=bits)
    return fq.lion(weight_decay=0.1, storage=storage, **kwargs)


@pytest.mark.parametrize("name", _options)
def test_methods_are_functions_for_jit(name):
    options = _options[name]()
    params = _params
    if name == "mask of lists":
        params = params | {"b": [params["b"]]}
    optim = _make(**options)
    state = jax.jit(optim.init)(params)
    updates, state = jax.jit(optim.update)(params, state, params)
    new, _ = jax.jit(optim.step)(params, jax.jit(optim.init)(params), params)
    assert int(state.count) == 1
    applied = optax.apply_updates(params, updates)
    assert jnp.all(applied["layer"]["w"] == new["layer"]["w"])


def test_mask_that_is_a_module():
    """Which has a `__call__`, but is no function of the parameters."""
    params = {"layer": _Layer(jnp.ones((4, 32))), "b": jnp.ones(8)}
    optim = _make(
        bits=None,
        mask={"layer": _Layer(True), "b": False},
    )
    grads = jax.tree.map(jnp.zeros_like, params)
    state = jax.jit(optim.init)(params)
    new, _ = jax.jit(optim.step)(params, state, grads)
    assert jnp.all(new["layer"].w < 1) and jnp.all(new["b"] == 1)


@pytest.mark.parametrize("name", ["mask of dictionaries", "learning rate in an array"])
def test_an_optimizer_is_an_argument(name):
    """Of programs that are compiled once, also for another optimizer of the same
    structure."""
    traces = []

    @eqx.filter_jit
    def step(optim, params, state):
        traces.append(optim)
        return optim.step(params, state, params)

    for _ in range(2):
        optim = _make(**_options[name]())
        state = optim.init(_params)
        step(optim, _params, state)
        step(optim, _params, state)
    assert len(traces) == 1


def test_a_learning_rate_in_an_array_is_an_argument():
    step = eqx.filter_jit(lambda optim, *args: optim.step(*args))
    for rate in (0.5, 0.25):
        optim = fq.sgd(
            jnp.asarray(rate),
            storage=fq.Storage(moments="float32", master_weight_bits=None),
        )
        params = {"w": jnp.ones(8)}
        new, _ = step(optim, params, optim.init(params), params)
        assert jnp.all(new["w"] == 1 - rate)


def test_an_optimizer_is_a_static_argument():
    traces = []

    def init(optim, params):
        traces.append(optim)
        return optim.init(params)

    init = jax.jit(init, static_argnums=0)
    for _ in range(2):
        init(_make(mask=_mask), _params)
    assert len(traces) == 1
    init(_make(mask=_mask | {"b": True}), _params)
    init(_make(mask=_mask, learning_rate=1), _params)
    assert len(traces) == 3


def test_equal_methods_compute_the_same():
    array = jnp.asarray(1e-2)
    one = fq.adamw(array, mask=_mask)
    assert one.init == fq.adamw(array, mask=_mask).init
    assert hash(one.init) == hash(fq.adamw(array, mask=_mask).init)
    for other in (
        one.update,
        fq.adamw(jnp.asarray(1e-2), mask=_mask).init,
        fq.adamw(array, mask=_mask | {"b": True}).init,
        fq.adamw(array, mask=_mask, storage=fq.Storage(group_size=64)).init,
    ):
        assert one.init != other


def test_methods_of_a_traced_learning_rate():
    @jax.jit
    def run(rate):
        optim = _make(learning_rate=rate)
        state = jax.jit(optim.init)(_params)
        state = jax.jit(optim.init)(_params)
        return jax.jit(optim.step)(_params, state, _params)

    new, _ = run(jnp.asarray(0.5))
    assert jnp.all(new["b"] < 0.6)


@pytest.mark.parametrize("wrap", ["dictionary", "function"])
def test_labels_of_a_partition_in_jit(wrap):
    labels = {"layer": {"w": "matrix"}, "b": "rest"}
    optim = optax.partition(
        {
            "matrix": _make(mask={"layer": True, "b": None}),
            "rest": fq.sgd(1e-2, storage=fq.Storage(master_weight_bits=None)),
        },
        labels if wrap == "dictionary" else lambda _: labels,
    )
    state = jax.jit(optim.init)(_params)
    updates, _ = jax.jit(optim.update)(_params, state, _params)
    assert all(jnp.all(x < 0) for x in jax.tree.leaves(updates))
