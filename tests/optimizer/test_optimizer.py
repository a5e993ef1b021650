import math
import re

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq

from ..helpers import (
    array_of,
    assert_code_of,
    Case,
    CASES,
    exact_step,
    float64,
    HeavyBall,
    OPTIMIZERS,
    OURS,
    pairwise,
    parametrize_cases,
    SHAPES,
    slow,
    Storage,
    tree_identical,
    weights,
)


_few = ("matrix", "bias", "scalar")
_ours = OURS
_float32 = Storage(jnp.float32, None, "float32")


def _moments64(state) -> dict[str, dict[str, np.ndarray]]:
    decode = lambda x: float64(x.decode() if isinstance(x, fq.QuantMoment) else x)
    is_leaf = lambda x: isinstance(x, fq.QuantMoment)
    return {
        name: jtu.tree_map(decode, tree, is_leaf=is_leaf)
        for name, tree in state.moments.items()
    }


def _ulp(x: np.ndarray, dtype) -> np.ndarray:
    """The unit in the last place of numbers of this dtype."""
    info = jnp.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(x), float(info.tiny))))
    return 2.0 ** (exponent - info.nmant)


def _rounding(x: np.ndarray, storage: Storage) -> np.ndarray:
    """How far a stored master weight may lie from the exact one: a unit where it is
    rounded by a threshold, half of one of float32."""
    if storage.dtype == jnp.float32:
        return _ulp(x, jnp.float32) / 2
    narrow = _ulp(x, storage.dtype)
    if storage.master_weight_bits is None:
        return narrow
    # 2^-8 of the weight's unit for 24 bits; for 32, that of float32.
    fraction = 2**-8 if storage.master_weight_bits == 24 else 0
    return np.maximum(narrow * fraction, _ulp(x, jnp.float32) / 2)


#
# Steps
#


def _specs(tree):
    return jtu.tree_map(lambda x: (x.shape, x.dtype), tree)


_EVERY_KIND_OF_LEAF = [_ours, Storage(jnp.float16, 24, "flashoptim")]


@pytest.mark.product
@parametrize_cases()
def test_every_step_is_exact_but_for_one_rounding(case):
    """From the weights and moments as they are stored, a step in float64; what is
    stored next is that, rounded once. So no error is larger than the storage explains.
    Nothing changes its structure, so that all steps are one program.
    """
    every = case.name == "adamw" and case.storage in _EVERY_KIND_OF_LEAF
    names = ("matrix", "ragged", "scalar") if every else ("ragged",)
    params = case.weights(*names)
    optim = case.optimizer(0.02)
    state = optim.init(params)
    _assert_initial(case, params, state)
    expected = _specs(params), jtu.tree_structure(state), _specs(state)
    traces = 0

    @eqx.filter_jit
    def step(params, state, grads):
        nonlocal traces
        traces += 1
        return optim.step(params, state, grads)

    for count in range(4):
        grads = case.weights(*names, seed=1 + count)
        masters = jtu.tree_map(float64, fq.master_weights(params, state))
        exact, exact_moments = exact_step(
            case.reference(0.02),
            count,
            masters,
            _moments64(state),
            jtu.tree_map(float64, grads),
        )
        params, state = step(params, state, grads)
        assert (_specs(params), jtu.tree_structure(state), _specs(state)) == expected
        assert int(state.count) == 1 + count and traces == 1
        found = jtu.tree_map(float64, fq.master_weights(params, state))
        for name in names:
            moved = np.max(np.abs(exact[name] - masters[name]))
            # About ten roundings of float32, in the update and in the weight.
            arithmetic = 2.0**-20 * moved + 2.0**-22 * np.abs(exact[name])
            bound = _rounding(exact[name], case.storage) + arithmetic
            error = np.abs(found[name] - exact[name])
            # Lion takes the sign of what the roundings of float32 may bring to either
            # side of zero: of this few numbers, it is none.
            assert np.all(error <= bound), name
            for moment, tree in exact_moments.items():
                stored = state.moments[moment][name]
                if stored is None:
                    assert tree[name] is None
                    continue
                # Three roundings of numbers as large as the largest, which is that of
                # the gradient too. Squared: 2 g dg = 2 sqrt(nu) max(sqrt(nu)) 2^-22.
                largest = np.max(np.abs(tree[name]))
                if moment in ("nu", "n") or "adafactor" in case.name:
                    largest = tree[name] + np.sqrt(tree[name] * largest)
                atol = 2.0**-21 * largest
                if moment == "offset":
                    # In float64, Optax has a difference of weights there.
                    atol += 2.0**-50 * np.max(np.abs(exact[name]))
                if isinstance(stored, fq.QuantMoment):
                    base = exact_moments.get(stored.relative_to, {}).get(name)
                    assert_code_of(stored, tree[name], atol, base)
                else:
                    assert np.all(np.abs(float64(stored) - tree[name]) <= atol)


def _assert_initial(case, params, state):
    assert int(state.count) == 0
    known = {*"mvng", "mu", "nu", "trace", "m1", "m2", "offset", "v_row", "v_col"}
    assert set(state.moments) <= known
    bits = case.storage.master_weight_bits
    dtypes = {leaf.dtype for leaf in jtu.tree_leaves(state.corrections)}
    expected = {24: {jnp.dtype(jnp.int8)}, 32: {jnp.dtype(jnp.int16)}, None: set()}
    assert dtypes == expected[bits]
    # A state of zeros: initialized, and the weights are their own masters.
    assert not any(np.any(x) for x in jtu.tree_leaves(state))
    masters = fq.master_weights(params, state)
    for name, x in params.items():
        assert masters[name].dtype == jnp.float32
        assert np.array_equal(float64(masters[name]), float64(x))


@pytest.mark.product
@parametrize_cases(
    lambda case: (
        case.storage in (_ours, _float32, Storage(jnp.bfloat16, 32, "float32"))
    ),
    # One of each class of rules; and what is kept in float32.
    quick=lambda case: (
        case.name in ("adamw", "lion", "sgd-momentum")
        if case.storage == _ours
        else (case.name, case.storage) == ("adamw", _float32)
    ),
)
def test_trajectory(case):
    """Many steps from the same weights, with the same gradients, against Optax."""
    params = case.weights("matrix")
    optim, reference = case.optimizer(0.01), case.reference(0.01)
    state = optim.init(params)
    exact = jtu.tree_map(float64, params)
    exact_moments = _moments64(state)
    first = exact["matrix"]
    step = eqx.filter_jit(optim.step)
    steps = 20
    for count in range(steps):
        grads = case.weights("matrix", seed=1 + count)
        exact, exact_moments = exact_step(
            reference, count, exact, exact_moments, jtu.tree_map(float64, grads)
        )
        params, state = step(params, state, grads)
    found = float64(fq.master_weights(params, state)["matrix"])
    error, path = found - exact["matrix"], exact["matrix"] - first
    if case.storage.moments == "float32":
        # A rounding of the weight per step, and some of the update.
        bound = steps * (_ulp(exact["matrix"], jnp.float32) + 2.0**-19 * 0.01)
        assert np.all(np.abs(error) <= bound)
    else:
        # Half a code of the first moment is below 0.8 % of the group's largest, uniform
        # in it, and 1 / sqrt(1 - 0.9^2) = 2.3 of them add up: below 1.1 %. Lion's sign
        # flips where the first moment (2.3 times as many add up) is within that of
        # zero: two in a hundred steps, by 2 where the path of n steps is sqrt(n) long.
        bound = 0.3 if case.name == "lion" else 0.03
        assert np.linalg.norm(error) <= bound * np.linalg.norm(path)


@pytest.mark.parametrize("momentum,nesterov", [(0.9, False), (0.9, True)])
def test_dampening(momentum, nesterov):
    # The formula of `torch.optim.SGD`.
    optim = fq.sgd(
        0.1,
        momentum=momentum,
        nesterov=nesterov,
        dampening=0.3,
        storage=fq.Storage(master_weight_bits=None, moments="float32"),
    )
    w = {"matrix": weights("matrix", dtype=jnp.float32)["matrix"]}
    state = optim.init(w)
    expected, trace = float64(w["matrix"]), None
    for count in range(4):
        grads = weights("matrix", dtype=jnp.float32, seed=1 + count)
        w, state = optim.step(w, state, grads)
        g = float64(grads["matrix"])
        trace = g if trace is None else momentum * trace + 0.7 * g
        expected = expected - 0.1 * (g + momentum * trace if nesterov else trace)
    np.testing.assert_allclose(float64(w["matrix"]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.product
@pytest.mark.parametrize(
    "make, group_size, names",
    [
        (fq.lion, 16, list(SHAPES)),
        (fq.adamw, 128, ["matrix", "ragged"]),
        slow(fq.adamw, 16, list(SHAPES)),
    ],
)
def test_shapes_and_group_sizes(make, group_size, names):
    of_all = lambda number, dtype: {
        name: jnp.asarray(np.full(SHAPES[name], number, dtype)) for name in names
    }
    w, grads = of_all(1, jnp.bfloat16), of_all(0.5, jnp.float32)
    optim = make(0.1, weight_decay=0.0, storage=fq.Storage(group_size=group_size))
    new, state = jax.jit(optim.step)(w, optim.init(w), grads)
    assert _specs(new) == _specs(w)
    # The first step of Adam, or Lion, is the learning rate long: within a step of 24
    # bits.
    for name, master in fq.master_weights(new, state).items():
        assert np.all(np.abs(float64(master) - 0.9) <= 2**-16), name


def test_gradients_of_any_dtype():
    w = weights("matrix")
    grads = weights("matrix", seed=1)
    optim = fq.lion(1e-2)
    results = [
        optim.step(w, optim.init(w), {"matrix": grads["matrix"].astype(dtype)})
        for dtype in (jnp.bfloat16, jnp.float32)
    ]
    # The same numbers, the same result.
    assert tree_identical(*results)
    half = {"matrix": grads["matrix"].astype(jnp.float16)}
    _, state = optim.step(w, optim.init(w), half)
    assert state.moments["mu"]["matrix"].codes.dtype == jnp.int8


@pytest.mark.parametrize("make", [fq.adamw, fq.lion, fq.sgdw])
def test_gradients_are_not_copied(make):
    """No array of a step by plain XLA is the gradient in another dtype: whatever is
    made from the gradient is made from the moments or the weight as well."""
    w = {"matrix": jnp.ones((256, 512), jnp.bfloat16)}
    optim = make(1e-3, backend="xla")
    if make is fq.sgdw:
        optim = make(1e-3, momentum=0.9, backend="xla")
    lowered = jax.jit(optim.step).lower(w, optim.init(w), w)
    entry = lowered.compile().as_text().split("ENTRY")[1]
    # Of another shape, but the same array.
    for name, of in re.findall(r"%(\S+) = \S+ bitcast\(%(grads\S+)\)", entry):
        entry = re.sub(rf"%{re.escape(name)}(?=[,)\s])", f"%{of}", entry)
    reads = re.findall(r"%\S+ = f32\[([\d,]+)\]\S* \w+\(([^)]*)\)", entry)
    large = [
        re.findall(r"%(\S+?)[,\s]", operands + ",")
        for shape, operands in reads
        if math.prod(map(int, shape.split(","))) == w["matrix"].size
    ]
    assert any(name.startswith("grads") for operands in large for name in operands)
    for operands in large:
        assert not all(name.startswith("grads") for name in operands)


#
# `update`
#


# What differs from `step` is how a weight is stored.
_WIDTHS = [
    Storage(jnp.bfloat16, 32, "float32"),
    Storage(jnp.bfloat16, None, "flashoptim"),
    Storage(jnp.float16, 24, "flashoptim"),
    Storage(jnp.float16, 32, "flashquinox"),
    _float32,
]


@pytest.mark.product
@parametrize_cases(
    quick=lambda case: (
        case.name in ("adamw", "adam", "lion", "sgd", "sgdw")
        if case.storage == _ours
        else case.name == "lion" and case.storage in _WIDTHS
    )
)
def test_update_is_step(case):
    names = ("matrix", "bias") if case.name == "adamw" else ("bias",)
    params = case.weights(*names)
    # Steps as long as weights are large, so that not all differences are representable.
    optim = case.optimizer(0.3)
    state = optim.init(params)
    step, update = jax.jit(optim.step), jax.jit(optim.update)
    for count in range(2):
        grads = case.weights(*names, seed=1 + count)
        new, new_state = step(params, state, grads)
        updates, update_state = update(grads, state, params)
        assert tree_identical(update_state.moments, new_state.moments)
        assert tree_identical(update_state.count, new_state.count)
        applied = optax.apply_updates(params, updates)
        assert tree_identical(applied, eqx.apply_updates(params, updates))
        truth = fq.master_weights(new, new_state)
        held = fq.master_weights(applied, update_state)
        for name in names:
            assert updates[name].dtype == params[name].dtype
            difference = float64(new[name]) - float64(params[name])
            exact = difference == float64(updates[name])
            if case.storage.dtype != jnp.float32:
                # With the weights, the corrections.
                for x, y in ((new, applied), (truth, held)):
                    x, y = float64(x[name]), float64(y[name])
                    assert np.array_equal(x[exact], y[exact])
            # Where the difference is rounded, by half of its unit at most, the weight
            # that is held is off by that and by its own rounding, and the correction
            # takes away half a unit of the weight. So the master weight is within half
            # a unit of the update; of the weight, wherever it is larger than the
            # update.
            bound = _ulp(float64(updates[name]), case.storage.dtype) / 2
            if case.storage.master_weight_bits is None:
                bound = bound + _ulp(float64(applied[name]), case.storage.dtype) / 2
            slack = _rounding(float64(held[name]), case.storage)
            error = np.abs(float64(held[name]) - float64(truth[name]))
            assert np.all(error <= bound + slack)
        params, state = applied, update_state


def test_not_all_differences_are_representable():
    # What the test above needs in order to test something.
    params, grads = weights("matrix"), weights("matrix", seed=1)
    optim = fq.adamw(0.3)
    new, _ = optim.step(params, optim.init(params), grads)
    updates, _ = optim.update(grads, optim.init(params), params)
    difference = float64(new["matrix"]) - float64(params["matrix"])
    exact = difference == float64(updates["matrix"])
    assert 0.05 < np.mean(exact) < 0.95


def test_small_updates_are_not_lost():
    # 300 steps of a thousandth of a unit in the last place: bfloat16 alone would stay.
    w = jnp.ones((4, 32), jnp.bfloat16)
    grads = jnp.full((4, 32), 2.0**-7 / 1000, jnp.float32)
    optim = fq.sgd(1.0)

    def by_update(_, carry):
        params, state = carry
        updates, state = optim.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for take in (lambda _, carry: optim.step(*carry, grads), by_update):
        params, state = jax.jit(lambda x: lax.fori_loop(0, 300, take, x))(  # noqa: B023
            (w, optim.init(w))
        )
        # 24 bits hold 1 in steps of 2^-16; each step adds 2^-17, and rounds.
        assert not tree_identical(fq.master_weights(params, state), w)


#
# What is left alone
#


class _Model(eqx.Module):
    linear: eqx.nn.Linear
    table: jax.Array
    steps: jax.Array
    rate: float
    name: str = eqx.field(static=True)


def _model() -> _Model:
    linear = eqx.nn.Linear(40, 3, key=jax.random.key(0), dtype=jnp.bfloat16)
    return _Model(linear, jnp.ones((5, 64), jnp.bfloat16), jnp.arange(3), 0.5, "a name")


def _grads(model):
    """Of the sum of the squares of the matrix, and of the other two."""
    params = eqx.filter(model, eqx.is_inexact_array)
    ones = jtu.tree_map(lambda x: array_of(np.ones(x.shape), x.dtype), params)
    weight = np.asarray(model.linear.weight).astype(np.float32)
    return eqx.tree_at(
        lambda m: m.linear.weight, ones, array_of(2 * weight, jnp.bfloat16)
    )


def _state_at(state, where):
    return {name: where(tree) for name, tree in state.moments.items()} | {
        "correction": where(state.corrections)
    }


@pytest.mark.parametrize(
    "where",
    [
        lambda m: m.linear.bias,
        lambda m: m.linear,
        lambda m: m.table,
    ],
)
def test_none_gradients_freeze(where):
    model = _model()
    optim = fq.lion(1e-2, weight_decay=0.1)
    state = optim.init(model)
    model, state = optim.step(model, state, _grads(model))
    grads = eqx.tree_at(where, _grads(model), None)
    new, new_state = optim.step(model, state, grads)
    assert tree_identical(where(new), where(model))
    assert tree_identical(_state_at(new_state, where), _state_at(state, where))
    assert not tree_identical(new, model)
    # The rest is as if nothing had been frozen.
    full, _ = optim.step(model, state, _grads(model))
    assert tree_identical(eqx.tree_at(where, new, where(full)), full)
    # An update of -0 leaves everything as it is.
    updates, update_state = optim.update(grads, state, eqx.filter(model, eqx.is_array))
    assert tree_identical(update_state.moments, new_state.moments)
    assert tree_identical(where(update_state.corrections), where(state.corrections))
    zeros = jtu.tree_leaves(where(updates))
    assert all(np.all(x == 0) and np.all(np.signbit(x)) for x in zeros)


def test_other_leaves_are_left_alone():
    model = _model()
    optim = fq.lion(1e-2, weight_decay=0.1)
    state = optim.init(model)
    assert state.corrections.steps is None and state.corrections.rate is None
    assert state.moments["mu"].steps is None
    new, _ = optim.step(model, state, _grads(model))
    assert new.steps is model.steps
    assert new.rate == 0.5 and new.name == "a name"


def test_nothing_to_train():
    optim = fq.adamw(1e-2)
    for model in ({}, {"a": jnp.arange(3), "b": "c"}):
        state = optim.init(model)
        new, state = optim.step(model, state, jtu.tree_map(lambda _: None, model))
        assert tree_identical(new, model)
        assert int(state.count) == 1


def test_cast():
    model = _model()
    cast = fq.cast(model, jnp.float16)
    assert cast.table.dtype == jnp.float16 and cast.linear.weight.dtype == jnp.float16
    assert cast.steps is model.steps and cast.rate == 0.5
    assert tree_identical(fq.cast(cast, jnp.bfloat16), model)


#
# Special weights and gradients
#


def _specials(dtype) -> jax.Array:
    """A hundred subnormals, and the other values that are easily lost."""
    info = jnp.finfo(dtype)
    smallest_normal = 1 << info.nmant
    subnormals = np.unique(np.linspace(1, smallest_normal - 1, 100).astype(np.int64))
    positive = subnormals.astype(f"uint{info.bits}").view(dtype)
    other = np.array([0.0, np.inf, np.nan, 1, info.max, info.tiny], dtype)
    values = np.concatenate([positive, other])
    return jnp.asarray(np.concatenate([values, -values]))


@pytest.mark.product
@pytest.mark.parametrize(
    "make, dtype, bits",
    [
        *((fq.sgdw, jnp.bfloat16, bits) for bits in (None, 24, 32)),
        *((fq.sgdw, jnp.float16, bits) for bits in (None, 24)),
        (fq.lion, jnp.float16, 32),
        (fq.adamw, jnp.bfloat16, 24),
        (fq.adamw, jnp.float32, None),
    ],
)
def test_special_weights_survive(make, dtype, bits):
    optim = make(0.1, weight_decay=0.0, storage=fq.Storage(master_weight_bits=bits))
    w = _specials(dtype).reshape(2, -1)
    zeros = jnp.zeros_like(w)
    state = optim.init(w)
    new, new_state = optim.step(w, state, zeros)
    same = lambda x: np.asarray(x)[~np.isnan(w)].tobytes()
    assert same(new) == same(w)
    assert np.array_equal(np.isnan(new), np.isnan(w))
    assert tree_identical(new_state.corrections, state.corrections)
    updates, update_state = optim.update(zeros, state, w)
    zero = (np.asarray(updates) == 0) & np.signbit(updates)
    assert np.all(zero | np.isnan(w))
    assert tree_identical(update_state.corrections, state.corrections)


@pytest.mark.parametrize("make", [fq.lion, slow(fq.adamw)])
def test_skip_nonfinite(make):
    names = ("matrix", "bias")
    params = weights(*names)
    optim = make(1e-2, skip_nonfinite=True)
    step, update = jax.jit(optim.step), jax.jit(optim.update)
    good = weights(*names, seed=1)
    params, state = step(params, optim.init(params), good)
    for bad in (np.nan, -np.inf):
        grads = good | {"matrix": good["matrix"].at[1, 2].set(bad)}
        assert tree_identical(step(params, state, grads), (params, state))
        updates, new_state = update(grads, state, params)
        assert tree_identical(new_state, state)
        for x in jtu.tree_leaves(updates):
            assert np.all(x == 0) and np.all(np.signbit(x))
    # A good step is as without the option.
    plain = jax.jit(make(1e-2).step)(params, state, good)
    assert tree_identical(step(params, state, good), plain)


def test_damage_stays_in_its_leaf():
    names = ("matrix", "bias")
    params, good = weights(*names), weights(*names, seed=1)
    optim = fq.adamw(1e-2)
    state = optim.init(params)
    expected, expected_state = optim.step(params, state, good)
    without = lambda tree: {k: v for k, v in tree.items() if k != "matrix"}
    for bad in (np.nan, np.inf):
        grads = good | {"matrix": good["matrix"].at[1, 2].set(bad)}
        new, new_state = optim.step(params, state, grads)
        assert not np.isfinite(new["matrix"][1, 2])
        assert tree_identical(without(new), without(expected))
        for name, tree in new_state.moments.items():
            assert tree_identical(without(tree), without(expected_state.moments[name]))


#
# Arguments
#


@pytest.mark.product
@pytest.mark.parametrize(
    "name, form",
    [
        ("adamw", "tree"),
        slow("adam", "prefix"),
        ("lion", "callable"),
        # Whose decay is in the gradient.
        ("sgd-momentum", "prefix"),
        slow("sgdw", "tree"),
    ],
)
def test_mask(name, form):
    case = Case(name, _ours)
    layer = case.weights("matrix", "bias")
    params = {"first": layer, "second": layer}
    grads = jtu.tree_map(lambda x: jnp.flip(x), params)
    mask = {
        "tree": {
            "first": {"matrix": True, "bias": False},
            "second": dict.fromkeys(layer, False),
        },
        "prefix": {"first": {"matrix": True, "bias": False}, "second": False},
        "callable": lambda params: jtu.tree_map_with_path(
            lambda path, x: x.ndim > 1 and path[0].key == "first", params
        ),
    }[form]
    run = lambda **kwargs: (
        lambda optim: optim.step(params, optim.init(params), grads)[0]
    )(case.optimizer(0.1, **kwargs))
    found, all_decay, no_decay = run(mask=mask), run(), run(weight_decay=0.0)
    assert not tree_identical(all_decay["first"]["matrix"], no_decay["first"]["matrix"])
    assert tree_identical(found["first"]["matrix"], all_decay["first"]["matrix"])
    assert tree_identical(found["first"]["bias"], no_decay["first"]["bias"])
    assert tree_identical(found["second"], no_decay["second"])


def test_mask_of_an_equinox_model():
    model = _model()
    mask = lambda m: jtu.tree_map(lambda x: x.ndim > 1, m)
    optim = fq.adamw(0.1, weight_decay=0.5, mask=mask)
    zeros = jtu.tree_map(jnp.zeros_like, _grads(model))
    new, _ = optim.step(model, optim.init(model), zeros)
    assert tree_identical(new.linear.bias, model.linear.bias)
    assert not tree_identical(new.table, model.table)


def test_schedules_start_at_zero():
    w = jnp.zeros((2, 32), jnp.bfloat16)
    ones = jnp.ones_like(w)
    optim = fq.sgd(lambda count: jnp.asarray([0.0, 1.0, 4.0])[count])
    state = optim.init(w)
    for expected in (0, -1, -5):
        w, state = optim.step(w, state, ones)
        assert jnp.all(w == expected)

    w = ones
    optim = fq.sgdw(1.0, weight_decay=lambda count: jnp.asarray([0.0, 0.5])[count])
    state = optim.init(w)
    for expected in (1, 0.5):
        w, state = optim.step(w, state, jnp.zeros_like(w))
        assert jnp.all(w == expected)


def test_optax_schedules():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10)
    case = Case("adamw", _float32)
    w = case.weights("matrix")
    optim, reference = case.optimizer(schedule), case.reference(schedule)
    expected = w
    step, update = jax.jit(optim.step), jax.jit(reference.update)
    # Optax's own arithmetic promotes.
    with jax.numpy_dtype_promotion("standard"):
        state, reference_state = optim.init(w), reference.init(w)
        for count in range(6):
            grads = case.weights("matrix", seed=1 + count)
            w, state = step(w, state, grads)
            updates, reference_state = update(grads, reference_state, expected)
            expected = optax.apply_updates(expected, updates)
    # Optax computes `1 - 0.999^t` with an error of 2^-24 / 0.001 = 6e-5.
    np.testing.assert_allclose(w["matrix"], expected["matrix"], atol=6 * 1e-2 * 6e-5)


@pytest.mark.parametrize("make", [fq.adamw, fq.lion, fq.sgdw])
def test_independent_decay(make):
    # Decay times the learning rate over its peak, whatever the peak.
    schedule = lambda count: jnp.asarray([1e-4, 2e-4])[count]
    w = jnp.ones((2, 32), jnp.float32)
    zeros = jnp.zeros_like(w)
    optim = make(
        schedule,
        weight_decay=0.25,
        decay="independent",
        peak_learning_rate=2e-4,
        storage=fq.Storage(master_weight_bits=None),
    )
    state = optim.init(w)
    first, state = optim.step(w, state, zeros)
    second, _ = optim.step(first, state, zeros)
    np.testing.assert_allclose(first, 1 - 0.25 / 2, rtol=2**-22)
    np.testing.assert_allclose(second, (1 - 0.25 / 2) * 0.75, rtol=2**-22)
    # A constant is its own peak.
    constant = make(
        3e-4,
        weight_decay=0.25,
        decay="independent",
        storage=fq.Storage(master_weight_bits=None),
    )
    new, _ = constant.step(w, constant.init(w), zeros)
    np.testing.assert_allclose(new, 0.75, rtol=2**-22)


@pytest.mark.parametrize(
    "optim,expected",
    [
        (fq.adamw(1e-3), 5.125),
        (fq.adam(1e-3), 5.125),
        (fq.lion(1e-3), 4.0625),
        (fq.sgd(1e-3, momentum=0.9), 4.0625),
        (fq.sgd(1e-3), 3.0),
        (fq.sgd(1e-3, momentum=0.0), 3.0),
        (fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=32)), 6.125),
        (fq.adamw(1e-3, storage=fq.Storage(group_size=128)), 5.03125),
        (fq.adamw(1e-3, storage=fq.Storage(moments="flashoptim")), 5.125),
    ],
)
@pytest.mark.parametrize("shape", [(1024, 1024), (64, 128, 128)])
def test_bytes_per_parameter(optim, expected, shape):
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    state = eqx.filter_eval_shape(optim.init, w)
    at_rest = (w, state.moments, state.corrections)
    total = sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(at_rest))
    assert total / w.size == expected


#
# float64
#


@pytest.mark.product
@pytest.mark.parametrize(
    "name",
    [
        slow(name, unless=name in ("adamw", "lion", "sgd-momentum", "sgdw"))
        for name in OPTIMIZERS
    ],
)
def test_float64(name):
    case = Case(name, Storage(jnp.float64, None, "float32"))
    with jax.enable_x64(True):
        w = case.weights("matrix", "scalar")
        assert w["matrix"].dtype == jnp.float64
        optim = case.optimizer(0.01)
        state = optim.init(w)
        exact, moments = jtu.tree_map(float64, w), _moments64(state)
        for count in range(5):
            grads = case.weights("matrix", "scalar", seed=1 + count)
            exact, moments = exact_step(
                case.reference(0.01),
                count,
                exact,
                moments,
                jtu.tree_map(float64, grads),
            )
            w, state = optim.step(w, state, grads)
        dtypes = {x.dtype for x in jtu.tree_leaves((w, state.moments))}
        assert dtypes == {jnp.dtype(jnp.float64)}
        # 0.01, or a weight, times 2^-52, times the condition 1 / (1 - 0.999) of Optax's
        # bias correction. Optax's Adafactor has decay rates in float32: off by 2^-25,
        # so the root of a mean square by as much, in each of 5 steps of at most 3 %.
        atol = 5 * 0.03 * 2**-25 if name.startswith("adafactor") else 1e-13
        for key in w:
            np.testing.assert_allclose(w[key], exact[key], rtol=1e-12, atol=atol)


@pytest.mark.product
@pytest.mark.parametrize(
    "make, moments",
    [
        (fq.adamw, "flashquinox"),
        (fq.lion, "learned"),
        (fq.lion, "flashoptim"),
        *(slow(fq.adamw, name) for name in fq.MomentCodecs.names()),
    ],
)
def test_float64_beside_bfloat16(make, moments):
    with jax.enable_x64(True):
        w = weights("matrix", dtype=jnp.float64) | weights("ragged")
        optim = make(1e-2, storage=fq.Storage(moments=moments))
        state = optim.init(w)
        assert state.corrections["matrix"] is None
        grads = weights("matrix", "ragged", dtype=jnp.float32, seed=1)
        new, _ = optim.step(w, state, grads)
        assert new["matrix"].dtype == jnp.float64
        assert new["ragged"].dtype == jnp.bfloat16


#
# Checkpoints
#


_RESUMED = [
    case
    for case in CASES
    if case.name in ("adamw", "sgd-momentum") and case.dtype == jnp.bfloat16
]
_quick_to_resume = pairwise(_RESUMED, ("width", "width"), ("moments", "moments"))


@pytest.mark.product
@parametrize_cases(_RESUMED.__contains__, quick=_quick_to_resume.__contains__)
def test_resumes_bit_for_bit(case, tmp_path):
    names = ("matrix", "scalar")
    params = case.weights(*names)
    optim = case.optimizer(1e-2)
    step = eqx.filter_jit(optim.step)

    def run(params, state, counts):
        for count in counts:
            params, state = step(params, state, case.weights(*names, seed=1 + count))
        return params, state

    middle = run(params, optim.init(params), range(3))
    eqx.tree_serialise_leaves(tmp_path / "checkpoint.eqx", middle)
    like = eqx.filter_eval_shape(lambda: (params, optim.init(params)))
    loaded = eqx.tree_deserialise_leaves(tmp_path / "checkpoint.eqx", like)
    assert tree_identical(loaded, middle)
    assert tree_identical(run(*loaded, range(3, 6)), run(*middle, range(3, 6)))


def test_checkpoint_of_another_shape(tmp_path):
    optim = fq.adamw(1e-2)
    saved = weights("matrix")
    eqx.tree_serialise_leaves(tmp_path / "x.eqx", (saved, optim.init(saved)))
    for like in (
        {"matrix": jnp.zeros((4, 32), jnp.bfloat16)},
        {"matrix": jnp.zeros((4, 64), jnp.float32)},
    ):
        like = (
            like,
            fq.adamw(1e-2, storage=fq.Storage(master_weight_bits=None)).init(like),
        )
        with pytest.raises(Exception, match="matrix"):
            eqx.tree_deserialise_leaves(tmp_path / "x.eqx", like)
    # Of another group size, it is the scales that do not fit.
    like = (saved, fq.adamw(1e-2, storage=fq.Storage(group_size=16)).init(saved))
    with pytest.raises(Exception, match="scales"):
        eqx.tree_deserialise_leaves(tmp_path / "x.eqx", like)


#
# Compilation
#


# No output has the place of a gradient.
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(
    "name", [slow(x, unless=x in ("adamw", "lion", "sgd")) for x in OPTIMIZERS]
)
def test_donation(name):
    optim = Case(name, _ours).optimizer(1e-2)
    w = weights("matrix", "ragged")
    state = optim.init(w)

    @eqx.filter_jit(donate="all")
    def step(w, state, grads):
        return optim.step(w, state, grads)

    compiled = step.lower(w, state, weights("matrix", "ragged", seed=1)).compile()
    analysis = compiled.compiled.memory_analysis()
    kept = sum(x.nbytes for x in jtu.tree_leaves((w, state)))
    assert analysis.alias_size_in_bytes >= kept
    new, new_state = step(w, state, weights("matrix", "ragged", seed=1))
    assert all(x.is_deleted() for x in jtu.tree_leaves((w, state)))
    step(new, new_state, weights("matrix", "ragged", seed=2))


@pytest.mark.parametrize("name", [slow("adamw"), "lion", slow("sgdw")])
def test_second_update_does_not_recompile(name):
    """Nor with a schedule. For `step`, see above."""
    optim = Case(name, _ours).optimizer(
        lambda count: 1e-2 / (1 + count.astype(jnp.float32))
    )
    w = weights("matrix", "scalar")
    traces = 0

    @eqx.filter_jit
    def step(w, state, grads):
        nonlocal traces
        traces += 1
        updates, state = optim.update(grads, state, w)
        return eqx.apply_updates(w, updates), state

    state = optim.init(w)
    for count in range(3):
        w, state = step(w, state, weights("matrix", "scalar", seed=1 + count))
    assert traces == 1


def test_jit_of_init():
    w = weights(*_few)
    optim = fq.adamw(1e-2)
    assert tree_identical(jax.jit(optim.init)(w), optim.init(w))


#
# A rule of one's own
#


@pytest.mark.parametrize("momentum", [0.9, jnp.asarray(0.9, jnp.float32)])
def test_rule_of_a_user(momentum):
    names = ("matrix", "scalar")
    params = weights(*names)
    ours = fq.sgd(0.1, momentum=0.9, storage=fq.Storage(moments="float32"))
    theirs = fq.optimizer(
        HeavyBall(momentum), 0.1, storage=fq.Storage(moments="float32")
    )
    state, their_state = ours.init(params), theirs.init(params)
    their_params = params
    for count in range(4):
        grads = weights(*names, seed=1 + count)
        params, state = ours.step(params, state, grads)
        their_params, their_state = theirs.step(their_params, their_state, grads)
    for name in names:
        # Up to contractions of multiplications and additions, the same arithmetic: one
        # step of 24 bits at most.
        x = float64(fq.master_weights(params, state)[name])
        y = float64(fq.master_weights(their_params, their_state)[name])
        assert np.all(np.abs(x - y) <= 2 * _rounding(x, _ours))


def test_rule_of_a_user_gets_everything():
    model = _model()
    optim = fq.optimizer(
        HeavyBall(),
        optax.constant_schedule(0.1),
        weight_decay=0.1,
        mask=lambda m: jtu.tree_map(lambda x: x.ndim > 1, m),
        skip_nonfinite=True,
    )
    state = optim.init(model)
    assert state.moments["trace"].table.codes.dtype == jnp.int8
    model, state = eqx.filter_jit(optim.step, donate="all")(model, state, _grads(model))
    assert jnp.all(model.table != 1)


def test_dither_rotates_from_step_to_step():
    """Without gradients, a second moment shrinks by 0.1 % a step, less than its codes
    are apart: a threshold that stays where it is would stop it, or let it fall at each
    step.
    """
    w = {name: jnp.zeros((64, 32), jnp.bfloat16) for name in "ab"}
    rng = np.random.default_rng(0)
    grads = {
        name: array_of(np.exp(rng.normal(0, 1, (64, 32))), jnp.bfloat16) for name in w
    }
    optim = fq.adamw(0.0, b2=0.999)

    @jax.jit
    def run(state, grads, steps):
        step = lambda _, state: optim.step(w, state, grads)[1]
        return lax.fori_loop(0, steps, step, state)

    state = run(optim.init(w), grads, 1)
    steps = 1000
    later = run(state, jtu.tree_map(np.zeros_like, grads), steps)
    for name in w:
        before, after = (s.moments["nu"][name].decode() for s in (state, later))
        ratio = float(jnp.sum(after) / jnp.sum(before)) / 0.999**steps
        # The largest step is 2^-4 between powers of two, and 1 / (2 ln 2) of that on
        # average. The threshold rounds down as often as it should, give or take less
        # than two times for the mean of many elements. And each time by a logarithm of
        # code + code^2 / 2: for a moment that falls to 1 / e, half a code more.
        code = 2**-4 / (2 * np.log(2))
        assert abs(ratio - 1) <= 2.5 * code
