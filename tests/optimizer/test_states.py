"""States within the states of wrappers: functions that take a state find them there."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import pytest
from flax.training.train_state import TrainState

import flashquinox as fq
from flashquinox import exchange

from ..helpers import assert_raises, tree_identical, weights


_names = ("matrix", "bias")


class _Holder(eqx.Module):
    state: tuple
    name: str = eqx.field(static=True)


def _labels(params):
    return {name: name for name in params}


def _groups(optim):
    groups = {"matrix": fq.sgd(1e-2, momentum=0.9), "bias": optim}
    return optax.partition(groups, _labels)


_WRAPPERS = {
    "chain": lambda optim: optax.chain(optax.clip_by_global_norm(1.0), optim),
    "named_chain": lambda optim: optax.named_chain(
        ("a", optax.clip(1.0)), ("b", optim)
    ),
    "chain in chain": lambda optim: optax.chain(optax.chain(optim)),
    "MultiSteps": lambda optim: optax.MultiSteps(optim, 1),
    "accumulate": lambda optim: fq.accumulate(optim, 1),
    "apply_if_finite": lambda optim: optax.apply_if_finite(optim, 3),
    "masked": lambda optim: optax.masked(optim, {name: True for name in _names}),
    "multi_transform": lambda optim: optax.multi_transform(
        {"matrix": optim, "bias": optim}, _labels
    ),
    "partition": _groups,
    "partition in MultiSteps": lambda optim: optax.MultiSteps(_groups(optim), 1),
    "inject_hyperparams": lambda _: optax.inject_hyperparams(
        fq.adamw, hyperparam_dtype=jnp.float32
    )(learning_rate=1e-2),
    "conditionally_transform": lambda optim: optax.conditionally_transform(
        optim, lambda *_, **__: True
    ),
}
# Where a state may be that nothing of Optax has made.
_CONTAINERS = {
    "tuple": lambda state: (jnp.zeros(3), state),
    "dictionary": lambda state: {"optimizer": [state], "key": jax.random.key(0)},
    "module": lambda state: _Holder((state, None), "static"),
    "TrainState": lambda state: TrainState(
        step=0, apply_fn=len, params={}, tx=optax.identity(), opt_state=state
    ),
}


def _cases():
    """A model, and states with corrections that are not zero."""
    params = weights(*_names)
    for name, wrap in _WRAPPERS.items():
        yield name, params, _with_corrections(wrap(fq.adamw(1e-2)).init(params))
    state = _with_corrections(fq.adamw(1e-2).init(params))
    for name, contain in _CONTAINERS.items():
        yield name, params, contain(state)


def _with_corrections(state):
    def one(x):
        if not _is_ours(x):
            return x
        corrections = jtu.tree_map(lambda x: x + jnp.int8(3), x.corrections)
        return dataclasses.replace(x, corrections=corrections)

    return jtu.tree_map(one, state, is_leaf=_is_ours)


def _is_ours(x):
    return isinstance(x, fq.OptimizerState)


@pytest.fixture(scope="module")
def cases():
    with jax.numpy_dtype_promotion("standard"):
        return {name: (model, state) for name, model, state in _cases()}


_each = pytest.mark.parametrize("name", [*_WRAPPERS, *_CONTAINERS])


def _inner(state):
    return [x for x in jtu.tree_leaves(state, is_leaf=_is_ours) if _is_ours(x)]


def _corrections(state):
    """For each leaf of the model, from whichever state has it."""
    found = {}
    for one in _inner(state):
        for path, x in jtu.tree_leaves_with_path(one.corrections):
            assert path[0].key not in found
            found[path[0].key] = x
    return found


def _masters(model, corrections):
    return {
        name: fq.ECCWeight(x, corrections.get(name)).decode()
        for name, x in model.items()
    }


@_each
def test_master_weights(cases, name):
    model, state = cases[name]
    expected = _masters(model, _corrections(state))
    found = fq.master_weights(model, state)
    assert tree_identical(found, expected)
    # There is something in the corrections.
    assert not tree_identical(found, fq.cast(model, jnp.float32))
    if name == "partition":
        jitted = jax.jit(fq.master_weights)(model, state)
        assert tree_identical(jitted, expected)


@pytest.mark.product
@_each
def test_from_master_weights(cases, name):
    model, state = cases[name]
    masters = jtu.tree_map(lambda x: 1.001 * x, fq.master_weights(model, state))
    new, new_state = fq.from_master_weights(masters, model, state)
    assert jtu.tree_structure(new_state) == jtu.tree_structure(state)
    assert len(_inner(new_state)) == len(_inner(state))
    # Within half of 2^-8 of half a unit of bfloat16.
    found = fq.master_weights(new, new_state)
    for key, master in masters.items():
        assert jnp.all(jnp.abs(found[key] - master) <= 2**-16 * jnp.abs(master))
    # Nothing else has changed.
    for old, one in zip(_inner(state), _inner(new_state), strict=True):
        assert tree_identical(one.moments, old.moments)
        assert tree_identical(one.count, old.count)


@pytest.mark.product
@_each
def test_widths(cases, name):
    model, state = cases[name]
    masters = fq.master_weights(model, state)
    wide = fq.widen_corrections(model, state)
    assert {x.dtype for x in _corrections(wide).values()} == {jnp.dtype(jnp.int16)}
    assert tree_identical(fq.master_weights(model, wide), masters)
    assert tree_identical(_inner(fq.narrow_corrections(model, wide)), _inner(state))
    # By half a unit of 16 bits, and then not by half of one of 24.
    assert fq.check_numerics(model, state, 1e-3).ok
    report = fq.check_numerics(model, state, 1e-6)
    assert set(report.lost) == set(_names)
    fixed = fq.ensure_precision(model, state, 1e-6)
    assert tree_identical(_inner(fixed), _inner(wide))


@pytest.mark.parametrize("name", ["chain", "partition", "TrainState"])
def test_save_safetensors(cases, name, tmp_path):
    model, state = cases[name]
    path = tmp_path / "model.safetensors"
    exchange.save_safetensors(path, model, state)
    masters = fq.master_weights(model, state)
    assert tree_identical(exchange.load_safetensors(path, masters), masters)


def test_groups_of_which_one_is_not_ours():
    model = weights(*_names)
    groups = {"matrix": fq.adamw(1e-2), "bias": optax.sgd(1e-2)}
    state = _with_corrections(optax.partition(groups, _labels).init(model))
    masters = fq.master_weights(model, state)
    assert tree_identical(masters["bias"], model["bias"].astype(jnp.float32))
    bits = {x.path: x.bits for x in fq.check_numerics(model, state, 1e-2).leaves}
    # What is trained elsewhere, or frozen, takes no step of ours.
    assert bits == {"matrix": 24}
    wide = fq.widen_corrections(model, state)
    assert set(_corrections(wide)) == {"matrix"}
    with pytest.raises(
        ValueError, match=r"`widen_corrections`.*no correction.*\['bias'\]"
    ):
        fq.widen_corrections(model, state, "bias")


def test_schedules_of_groups_have_their_own_counts():
    params = weights(*_names)
    states = [
        fq.adamw(1e-2).init({"matrix": params["matrix"], "bias": None}),
        fq.adamw(1e-2).init({"matrix": None, "bias": params["bias"]}),
    ]
    states[1] = optax.tree.set(states[1], count=jnp.asarray(7, jnp.int32))
    report = fq.check_numerics(params, states, lambda count: 1e-3 * (1 + int(count)))
    steps = {x.path: x.step for x in report.leaves}
    assert steps == pytest.approx({"matrix": 1e-3, "bias": 8e-3})


@pytest.mark.parametrize(
    "function",
    [
        fq.master_weights,
        lambda model, state: fq.from_master_weights(model, model, state),
        fq.widen_corrections,
        fq.narrow_corrections,
        lambda model, state: fq.check_numerics(model, state, 1e-3),
        lambda model, state: fq.ensure_precision(model, state, 1e-3),
        lambda model, state: exchange.save_safetensors("unwritten", model, state),
    ],
)
def test_what_cannot_be_told_is_an_error(function):
    params = weights(*_names)
    optim = fq.adamw(1e-2)
    twice = optax.chain(optim, fq.sgd(1e-2)).init(params)
    with pytest.raises(ValueError, match=r"two .*OptimizerState.*\['(matrix|bias)'\]"):
        function(params, twice)
    none = optax.adamw(1e-2).init(params)
    with pytest.raises(TypeError, match=r"no `flashquinox.OptimizerState`.* a tuple"):
        function(params, none)
    other = optax.chain(optim).init(weights("matrix"))
    with pytest.raises(ValueError, match=r"`state\[0\].corrections` has nothing at"):
        function(params, other)


#
# Models that are cast after their state was made
#


@pytest.mark.parametrize("mixed", [False, True])
def test_weights_of_another_dtype_than_their_corrections(mixed):
    """An int8 beside a bfloat16 and one beside a float16 do not mean the same."""
    optim, start = fq.sgd(1e-2), weights("matrix", "bias", dtype=jnp.float32)
    model, state = fq.prepare(start, optim)
    if mixed:
        model = model | {"bias": model["bias"].astype(jnp.float16)}
        state = optim.init(model)
    model, state = optim.step(model, state, model)
    masters = fq.master_weights(model, state)
    cast = model | {"matrix": model["matrix"].astype(jnp.float16)}
    rest = masters | {"matrix": None}
    average = fq.ema(0.9)
    for call in (
        lambda: optim.step(cast, state, cast),
        lambda: jax.jit(optim.update)(cast, state, cast),
        lambda: fq.master_weights(cast, state),
        lambda: average.init(cast, state),
        lambda: average.update(average.init(model, state), cast, state),
        lambda: fq.widen_corrections(cast, state),
        lambda: fq.from_master_weights(rest, cast, state),
    ):
        assert_raises(ValueError, call, "['matrix']", "float16", "bfloat16", "masters")
    if not mixed:
        cast = fq.cast(model, jnp.float16)
    cast, state = fq.from_master_weights(masters, cast, state)
    found = fq.master_weights(cast, state)
    for name, master in masters.items():
        # 19 significant bits in place of 16.
        assert jnp.array_equal(found[name], master), name
    cast, state = optim.step(cast, state, cast)
    fq.master_weights(cast, state)


def test_states_without_a_record_of_dtypes():
    """As those that earlier versions pickled."""
    optim, model = fq.sgd(1e-2), weights("matrix")
    state = optim.init(model)
    names = "steps", "moments", "corrections", "shardings", "checksums"
    fields = {name: getattr(state, name) for name in names}
    old = object.__new__(fq.OptimizerState)
    old.__setstate__(fields)
    loop = lambda carry, _: (optim.step(*carry, model), None)
    found, _ = jax.lax.scan(loop, (model, old), length=2)
    expected, _ = jax.lax.scan(loop, (model, state), length=2)
    assert tree_identical(found[0], expected[0])
    _, again = fq.from_master_weights(fq.master_weights(*found), *found)
    assert jtu.tree_structure(again) == jtu.tree_structure(old)
