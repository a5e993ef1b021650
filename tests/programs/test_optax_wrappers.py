"""The table of wrappers in the documentation: each class of them around an optimizer of
this library, for bfloat16 weights, beside Optax's optimizer in float32."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq


_RATE, _STEPS = 1e-4, 24


@pytest.fixture(autouse=True)
def _promotion():
    # Optax's own arithmetic promotes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        yield


def _array(seed, shape, low):
    x = jr.uniform(jr.key(seed), shape, minval=low, maxval=1.0)
    return x.astype(jnp.bfloat16).astype(jnp.float32)


# A unit of a bfloat16 weight is 40 times the step that these gradients lead to.
_PARAMS = {"w": _array(0, (4, 32), 0.5), "b": _array(1, (6,), 0.5)}
_GRADS = {"w": _array(2, (4, 32), -1.0), "b": _array(3, (6,), -1.0)}
_NARROW = fq.cast(_PARAMS, jnp.bfloat16)


def _loss(params):
    wide = fq.cast(params, jnp.float32)
    return sum(jnp.sum(wide[name] * _GRADS[name]) for name in _GRADS)


def _grad_fn(params, count):
    del count
    return jtu.tree_map(lambda x, g: g.astype(x.dtype), params, _GRADS)


def _train(optim, params, **extra):
    grads = _grad_fn(params, 0)

    # Most of the time goes to compilers.
    @eqx.filter_jit(compiler_options={"xla_backend_optimization_level": 0})
    def run(params):
        def body(carry, _):
            params, state = carry
            updates, state = optim.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optim.init(params)
        return jax.lax.scan(body, carry, None, length=_STEPS)[0]

    result = run(params)
    jax.effects_barrier()
    return result


_sgd = partial(
    fq.sgd, _RATE, storage=fq.Storage(master_weight_bits=32), verify_weights="error"
)


def _assert_close(masters, expected):
    """That weights moved alike: to some units in the last place of the bfloat16
    numbers in which the wrappers compute, of which the largest is 2^-8."""
    for name, start in _PARAMS.items():
        moved = np.asarray(expected[name] - start)
        found = np.asarray(masters[name] - start)
        assert np.max(np.abs(moved)) > 0
        error = np.max(np.abs(found - moved))
        assert error <= 4 * 2**-8 * np.max(np.abs(moved)), name


#
# What works
#


class _Wrapper(NamedTuple):
    wrap: Callable[[Any], Any]
    extra: Mapping[str, Any] = MappingProxyType({})


def _names(params):
    return {name: name for name in params}


def _all(value):
    return {name: value for name in _PARAMS}


_even = lambda step, *args, **kwargs: step % 2 == 0

_WORKS = {
    "chain": _Wrapper(
        lambda o: optax.chain(
            optax.clip_by_global_norm(3.0), o, optax.snapshot("u", lambda u: u)
        )
    ),
    "named_chain": _Wrapper(
        lambda o: optax.named_chain(
            ("a", optax.clip(0.5)), ("b", optax.with_extra_args_support(o))
        )
    ),
    "MultiSteps": _Wrapper(
        lambda o: optax.MultiSteps(o, 2, should_skip_update_fn=optax.skip_not_finite)
    ),
    "apply_if_finite": _Wrapper(lambda o: optax.apply_if_finite(o, 2)),
    "masked": _Wrapper(lambda o: optax.masked(o, _all(True))),
    "partition": _Wrapper(
        lambda o: optax.partition({name: o for name in _PARAMS}, _names)
    ),
    "selective_transform": _Wrapper(
        lambda o: optax.selective_transform(o, freeze_mask=_all(False))
    ),
    "conditionally_mask": _Wrapper(lambda o: optax.conditionally_mask(o, _even)),
    "flatten": _Wrapper(optax.flatten),
    "split_real_and_imaginary": _Wrapper(optax.contrib.split_real_and_imaginary),
    "sam, opaque": _Wrapper(
        lambda o: optax.contrib.sam(o, optax.sgd(0.01), 2, opaque_mode=True),
        {"grad_fn": _grad_fn},
    ),
    # What is before the optimizer.
    "gradients": _Wrapper(
        lambda o: optax.chain(
            optax.zero_nans(),
            optax.clip(0.8),
            optax.centralize(),
            optax.contrib.normalize(),
            optax.trace(0.5),
            optax.scale(2.0),
            o,
        )
    ),
    "more gradients": _Wrapper(
        lambda o: optax.chain(
            optax.clip_by_block_rms(1.0),
            optax.apply_every(2),
            optax.ema(0.5),
            optax.add_decayed_weights(0.1),
            optax.adaptive_grad_clip(0.5),
            optax.contrib.reduce_on_plateau(factor=0.5, patience=4),
            o,
        ),
        {"value": jnp.asarray(1.0)},
    ),
}


@pytest.mark.parametrize("name", _WORKS)
def test_works(name):
    wrap, extra = _WORKS[name]
    # Any change of an update after the optimizer would be an error.
    params, state = _train(wrap(_sgd()), _NARROW, **extra)
    expected, _ = _train(wrap(optax.sgd(_RATE)), _PARAMS, **extra)
    if name == "flatten":
        # Its state is one of a vector.
        vector, _ = jax.flatten_util.ravel_pytree(params)
        _, unravel = jax.flatten_util.ravel_pytree(expected)
        _assert_close(unravel(fq.master_weights(vector, state)), expected)
    else:
        _assert_close(fq.master_weights(params, state), expected)


#
# What does not work, and says so
#


_DOES_NOT_WORK = {
    "freeze": _Wrapper(lambda o: optax.chain(o, optax.freeze({"w": False, "b": True}))),
    "conditionally_transform": _Wrapper(
        lambda o: optax.conditionally_transform(o, _even)
    ),
    "apply_every": _Wrapper(lambda o: optax.chain(o, optax.apply_every(2))),
    "ema": _Wrapper(lambda o: optax.chain(o, optax.ema(0.5))),
    "add_noise": _Wrapper(
        lambda o: optax.chain(o, optax.add_noise(0.1, 0.1, jr.key(0)))
    ),
    "linesearch": _Wrapper(
        lambda o: optax.chain(o, optax.scale_by_backtracking_linesearch(3)),
        {"value": jnp.asarray(-1.0), "grad": _GRADS, "value_fn": _loss},
    ),
    "mechanize": _Wrapper(optax.contrib.mechanize),
    "sam": _Wrapper(lambda o: optax.contrib.sam(o, optax.sgd(5.0), 2)),
}


@pytest.mark.parametrize("name", _DOES_NOT_WORK)
def test_does_not_work_and_says_so(name):
    wrap, extra = _DOES_NOT_WORK[name]
    with pytest.warns(UserWarning, match="last in `optax.chain`"):
        _train(wrap(_sgd(verify_weights="warn")), _NARROW, **extra)


def test_weights_without_a_correction_can_be_wrapped():
    wrap, _ = _DOES_NOT_WORK["ema"]
    params, _ = _train(wrap(fq.sgd(_RATE, verify_weights="error")), _PARAMS)
    _assert_close(params, _train(wrap(optax.sgd(_RATE)), _PARAMS)[0])


def test_schedule_free_on_float32_weights():
    wrap = lambda o: optax.contrib.schedule_free(o, _RATE)
    evaluate = optax.contrib.schedule_free_eval_params
    params, state = _train(wrap(fq.sgd(_RATE)), _PARAMS)
    expected, expected_state = _train(wrap(optax.sgd(_RATE)), _PARAMS)
    _assert_close(evaluate(state, params), evaluate(expected_state, expected))


#
# Recipes
#


def test_plateau():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    optim = optax.inject_hyperparams(
        partial(
            fq.sgd, verify_weights="error", storage=fq.Storage(master_weight_bits=32)
        ),
        hyperparam_dtype=jnp.float32,
    )(learning_rate=_RATE)
    grads = _grad_fn(_NARROW, 0)

    @jax.jit
    def train_step(params, state, plateau_state, value):
        _, plateau_state = plateau.update({}, plateau_state, value=value)
        state.hyperparams["learning_rate"] = _RATE * plateau_state.scale
        updates, state = optim.update(grads, state, params)
        return optax.apply_updates(params, updates), state, plateau_state

    carry = _NARROW, optim.init(_NARROW), plateau.init(_NARROW)
    for _ in range(_STEPS):
        carry = train_step(*carry, jnp.asarray(1.0))
    params, state, plateau_state = carry
    assert float(plateau_state.scale) < 0.01
    reference = optax.chain(optax.sgd(_RATE), plateau)
    expected, _ = _train(reference, _PARAMS, value=jnp.asarray(1.0))
    _assert_close(fq.master_weights(params, state), expected)


def test_average_of_weights():
    optim = optax.chain(optax.clip(2.0), _sgd())
    grads = _grad_fn(_NARROW, 0)

    @jax.jit
    def train_step(params, state, average):
        updates, state = optim.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        masters = fq.master_weights(params, state)
        return params, state, optax.incremental_update(masters, average, 0.1)

    carry = _NARROW, optim.init(_NARROW), _PARAMS
    expected, average = _PARAMS, _PARAMS
    for _ in range(8):
        carry = train_step(*carry)
        expected = jtu.tree_map(lambda x, g: x - _RATE * g, expected, _GRADS)
        average = optax.incremental_update(expected, average, 0.1)
    _assert_close(carry[2], average)


def test_lookahead_of_master_weights():
    optim = _sgd()
    step = eqx.filter_jit(optim.step)
    grads = _grad_fn(_NARROW, 0)

    @eqx.filter_jit
    def synchronize(model, state, slow):
        slow = optax.incremental_update(fq.master_weights(model, state), slow, 0.5)
        return *fq.from_master_weights(slow, model, state), slow

    model, state, slow = _NARROW, optim.init(_NARROW), _PARAMS
    for count in range(1, 9):
        model, state = step(model, state, grads)
        if count % 4 == 0:
            model, state, slow = synchronize(model, state, slow)
    # Two rounds, each half of four steps.
    expected = jtu.tree_map(lambda x, g: x - 4 * _RATE * g, _PARAMS, _GRADS)
    _assert_close(slow, expected)
    _assert_close(fq.master_weights(model, state), expected)
