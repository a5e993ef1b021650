"""Derivatives of training steps: learned learning rates, unrolled optimization."""

from functools import partial

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flashquinox as fq

from ..helpers import assert_raises, slow, weights


# Of functions of a learning rate and a decay: ours, and Optax's.
_PAIRS = {
    "adamw": (
        lambda lr, decay, **kw: fq.adamw(lr, weight_decay=decay, **kw),
        lambda lr, decay: optax.adamw(lr, weight_decay=decay),
    ),
    "adam": (
        lambda lr, decay, **kw: fq.adam(lr, eps=1e-3, weight_decay=decay, **kw),
        lambda lr, decay: optax.chain(
            optax.add_decayed_weights(decay), optax.adam(lr, eps=1e-3)
        ),
    ),
    "lion": (
        lambda lr, decay, **kw: fq.lion(lr, weight_decay=decay, **kw),
        lambda lr, decay: optax.lion(lr, weight_decay=decay),
    ),
    "sgd": (
        lambda lr, decay, **kw: fq.sgd(
            lr, momentum=0.9, nesterov=True, weight_decay=decay, **kw
        ),
        lambda lr, decay: optax.chain(
            optax.add_decayed_weights(decay),
            optax.sgd(lr, momentum=0.9, nesterov=True),
        ),
    ),
}
_start = partial(weights, "matrix", "bias", dtype=jnp.float32)
_exact = partial(jtu.tree_map, np.asarray)
# Most of the time goes to compilers.
_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def _promotion():
    # Optax's own arithmetic promotes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        yield


def _inner(params):
    return sum(jnp.sum(jnp.sin(x) ** 2) for x in params.values())


def _outer(params):
    return sum(jnp.sum((x - 0.1) ** 2) for x in params.values())


def _unrolled(make, steps=2, method="step"):
    """The loss after some steps, as a function of learning rate, decay and weights."""

    def run(rate, decay, params):
        optim = make(lambda count: rate / (1 + 0.5 * count), decay)
        state = optim.init(params)

        def one(carry, _):
            params, state = carry
            grads = jax.grad(_inner)(params)
            if method == "step":
                return optim.step(params, state, grads), None
            updates, state = optim.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = lax.scan(one, (params, state), None, length=steps)
        return _outer(params)

    return run


_at = jnp.float32(1e-2), jnp.float32(0.1)


def _assert_close(found, expected, rtol=1e-3):
    for x, y in zip(jtu.tree_leaves(found), jtu.tree_leaves(expected), strict=True):
        x, y = np.float64(x), np.float64(y)
        # In units of the largest: single derivatives may cancel.
        assert np.all(np.abs(x - y) <= rtol * np.max(np.abs(y), initial=1e-30))


@pytest.mark.product
@pytest.mark.parametrize(
    "name, backend, method",
    [
        ("adamw", "auto", "step"),
        slow("adamw", "gpu", "update"),
        ("adam", "tpu", "step"),
        ("lion", "xla", "update"),
        ("sgd", "gpu", "step"),
        slow("sgd", "xla", "update"),
    ],
)
def test_as_of_optax(name, backend, method):
    ours, reference = _PAIRS[name]
    make = partial(ours, storage=fq.Storage(moments="float32"), backend=backend)
    grad = partial(jax.grad, argnums=(0, 1, 2))
    found = _jit(grad(_unrolled(make, method=method)))(*_at, _start())
    expected = _jit(grad(_unrolled(reference, method="update")))(*_at, _start())
    _assert_close(found, expected)
    assert all(np.any(x != 0) for x in _exact(jtu.tree_leaves(found)))


def test_central_differences():
    make = partial(_PAIRS["adamw"][0], storage=fq.Storage(moments="float32"))
    with jax.enable_x64(True):
        params = jtu.tree_map(lambda x: jnp.asarray(np.float64(x)), _start())
        run = jax.jit(_unrolled(make))
        at = jnp.float64(1e-2), jnp.float64(0.1)
        found = jax.jit(jax.grad(_unrolled(make), argnums=(0, 1)))(*at, params)
        for i, x in enumerate(found):
            h = 1e-4 * at[i]
            ends = [
                run(*(a + s * h * (j == i) for j, a in enumerate(at)), params)
                for s in (1, -1)
            ]
            numeric = (ends[0] - ends[1]) / (2 * h)
            assert abs(float(x) / float(numeric) - 1) <= 1e-4


@pytest.mark.once
def test_forwards_and_eagerly_and_at_a_rate_of_zero():
    make, reference = _PAIRS["adamw"]
    params, grads = _start(), _start(seed=1)

    def after(make, method, rate):
        optim = make(rate, 0.1)
        if method == "step":
            return optim.step(params, optim.init(params), grads)[0]
        updates, _ = optim.update(grads, optim.init(params), params)
        return optax.apply_updates(params, updates)

    theirs = jax.jit(partial(jax.jvp, partial(after, reference, "update")))
    for method in ("step", "update"):
        ours = partial(
            after, partial(make, storage=fq.Storage(moments="float32")), method
        )
        for rate in (0.0, 1e-2):
            at = (jnp.float32(rate),), (jnp.float32(1.0),)
            _, found = jax.jvp(ours, *at)
            _, expected = theirs(*at)
            _assert_close(found, expected)
    many = jax.jit(jax.vmap(jax.grad(lambda rate: _outer(ours(rate)))))
    found = many(jnp.asarray([1e-3, 1e-2]))
    assert np.all(np.isfinite(found)) and found[0] != found[1]


def test_elements_without_gradients():
    # Of these, Optax gives NaN: a root has no derivative at zero.
    params = {"w": jnp.ones(8)}
    optim = fq.adamw(1e-2, storage=fq.Storage(moments="float32"))

    def loss(scale):
        grads = {"w": scale * jnp.asarray([0.0, 1.0] * 4)}
        return _outer(optim.step(params, optim.init(params), grads)[0])

    assert np.isfinite(jax.jit(jax.grad(loss))(jnp.float32(1.0)))


def test_steps_that_are_not_taken():
    params = {"w": jnp.ones(8)}
    optim = fq.adamw(1e-2, storage=fq.Storage(moments="float32"), skip_nonfinite=True)

    def loss(params, bad):
        grads = {"w": params["w"].at[0].set(bad)}
        return jnp.sum(optim.step(params, optim.init(params), grads)[0]["w"] ** 2)

    grad = jax.jit(jax.grad(loss))
    assert np.array_equal(grad(params, jnp.nan)["w"], 2 * params["w"])
    assert not np.array_equal(grad(params, 1.0)["w"], 2 * params["w"])


def test_clipping():
    params = _start()

    def run(rate, scale, clipped):
        grads = jtu.tree_map(lambda x: scale * x * x, params)
        if clipped == "optax":
            optim = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))
            updates, _ = optim.update(grads, optim.init(params), params)
            return _outer(optax.apply_updates(params, updates))
        optim = fq.sgd(rate)
        return _outer(optim.step(params, optim.init(params), grads, max_norm=1.0)[0])

    grad = jax.jit(jax.grad(run, argnums=(0, 1)), static_argnums=2)
    at = jnp.float32(0.1), jnp.float32(1.0)
    _assert_close(grad(*at, "ours")[0], grad(*at, "optax")[0])


def test_on_a_mesh():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {"matrix": _start()["matrix"]}
    divided = jax.device_put(params, {"matrix": sharding})
    make = partial(_PAIRS["adamw"][0], storage=fq.Storage(moments="float32"))

    def loss(rate, params, state):
        new, _ = make(rate, 0.1).step(params, state, jax.grad(_inner)(params))
        return _outer(new)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    found, expected = (
        grad(_at[0], p, make(1e-2, 0.1).init(p)) for p in (divided, params)
    )
    _assert_close(found, expected)


#
# Where it has no meaning
#

_CODED = {
    "bfloat16": (jnp.bfloat16, fq.Storage(), ["bfloat16 with a correction", "8 bits"]),
    "no correction": (
        jnp.bfloat16,
        fq.Storage(master_weight_bits=None, moments="float32"),
        ["bfloat16, to which"],
    ),
    "moments": (jnp.float32, fq.Storage(), ["moment 'mu'", "8 bits"]),
    "learned": (jnp.float32, fq.Storage(moments="learned"), ["8 bits"]),
}


@pytest.mark.product
@pytest.mark.parametrize("name", _CODED)
def test_codes_have_no_derivatives(name, without_typechecker):
    dtype, storage, parts = _CODED[name]
    make = fq.lion if name == "learned" else fq.adamw
    params = weights("matrix", dtype=dtype)
    state = make(1e-2, storage=storage).init(params)

    def new(rate):
        optim = make(rate, storage=storage)
        params_, state_ = optim.step(params, state, params)
        return jnp.sum(params_["matrix"].astype(jnp.float32)), state_

    rate = jnp.float32(1e-2)
    says = (
        f"`{make.__name__}(...).step`",
        "`['matrix']`",
        "moments=",
        "stop_gradient",
        *parts,
    )
    for derivative in (
        jax.grad(lambda rate: new(rate)[0]),
        _jit(jax.grad(lambda rate: new(rate)[0])),
        lambda rate: jax.jvp(lambda rate: new(rate)[0], (rate,), (rate,)),
    ):
        assert_raises(TypeError, lambda d=derivative: d(rate), *says)
    # Values are there, and so are derivatives of anything else.
    found, aux = _jit(jax.grad(lambda rate: (rate**2, new(rate)), has_aux=True))(rate)
    assert np.isclose(found, 2 * rate)
    assert np.array_equal(aux[0], _jit(new)(rate)[0])
    stopped = _jit(jax.grad(lambda rate: rate + lax.stop_gradient(new(rate)[0])))
    assert stopped(rate) == 1


def test_small_vectors_have_derivatives():
    # They are not stored in codes, whatever is beside them.
    params = _start()

    def bias(rate):
        optim = fq.adamw(rate)
        return jnp.sum(optim.step(params, optim.init(params), params)[0]["bias"])

    assert jax.jit(jax.grad(bias))(jnp.float32(1e-2)) != 0
