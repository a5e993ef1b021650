"""Every misuse raises, naming the call, the leaf, what came, and the remedy."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq

from ..helpers import assert_raises, tree_identical, weights


pytestmark = pytest.mark.usefixtures("without_typechecker")


def _model(dtype=jnp.bfloat16):
    return {
        "layers": [
            weights("matrix", "bias", dtype=dtype),
            weights("ragged", dtype=dtype),
        ],
        "steps": jnp.arange(3),
    }


def _grads(model):
    grad = lambda x: jnp.ones_like(x) if eqx.is_inexact_array(x) else None
    return jtu.tree_map(grad, model)


_at_matrix = lambda tree: tree["layers"][0]["matrix"]
_path = "['layers'][0]['matrix']"


def _replace(tree, value, where=_at_matrix):
    return eqx.tree_at(where, tree, value, is_leaf=lambda x: x is None)


def _without_bias(tree):
    first = {"matrix": _at_matrix(tree)}
    return tree | {"layers": [first, tree["layers"][1]]}


#
# Arguments
#


_everywhere = ["adamw", "adam", "lion", "sgd", "sgdw"]
_ranges = [
    (name, argument, value)
    for name in _everywhere
    for argument, value in [
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("weight_decay", -0.1),
    ]
]
_ranges += [
    (name, argument, value)
    for name in ("adamw", "adam", "lion")
    for argument, value in [("b1", 1.0), ("b1", -0.1), ("b2", 1.0), ("b2", 1.5)]
]
_ranges += [(name, "eps", -1e-8) for name in ("adamw", "adam")]
_ranges += [("adan", "b3", 1.0), ("adan", "eps_root", -0.5)]
_ranges += [
    (name, "momentum", value) for name in ("sgd", "sgdw") for value in (1.0, -0.5)
]
_ranges += [("sgd", "dampening", 1.0), ("sgdw", "dampening", -0.1)]


@pytest.mark.parametrize("name,argument,value", _ranges)
@pytest.mark.parametrize("array", [False, True])
def test_range(name, argument, value, array):
    kwargs = {"learning_rate": 1e-3}
    if argument == "dampening":
        kwargs["momentum"] = 0.9
    kwargs[argument] = jnp.asarray(value, jnp.float32) if array else value
    assert_raises(
        ValueError,
        lambda: getattr(fq, name)(**kwargs),
        f"`{name}({argument}=...)`",
        "must be at least",
        "got -9.9" if argument == "eps" and array else f"got {value:g}"[:8],
    )


@pytest.mark.parametrize("value", ["0.1", None, True, 1j, [0.1], jnp.ones(2)])
def test_no_number(value):
    message = ("`adamw(learning_rate=...)`", "number", "got")
    assert_raises(TypeError, lambda: fq.adamw(value), *message)
    message = ("`lion(b1=...)`", "number", "got")
    assert_raises(TypeError, lambda: fq.lion(1e-3, b1=value), *message)
    message = ("`sgd(weight_decay=...)`", "number", "got")
    assert_raises(TypeError, lambda: fq.sgd(1e-3, weight_decay=value), *message)


@pytest.mark.parametrize("value", [16, 8, 24.5, "24", 0, np.uint8(31)])
def test_master_weight_bits(value):
    assert_raises(
        ValueError,
        lambda: fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=value)),
        "`Storage(master_weight_bits=...)`",
        "24, 32 or None",
        str(value),
    )


@pytest.mark.parametrize("value", [0, 8, 24, 33, 144, "32", 32.5])
def test_group_size(value):
    assert_raises(
        ValueError,
        lambda: fq.lion(1e-3, storage=fq.Storage(group_size=value)),
        "`Storage(group_size=...)`",
        "multiple of 16 from 16 to 128",
        str(value),
    )


@pytest.mark.parametrize("value", ["int8", "flashquinox2", None, jnp.float32])
def test_unknown_codec(value):
    assert_raises(
        ValueError,
        lambda: fq.sgd(1e-3, momentum=0.9, storage=fq.Storage(moments=value)),
        "`Storage(moments=...)`",
        "'flashquinox', 'flashoptim', 'float32'",
        repr(value),
    )


@pytest.mark.parametrize("name", ["sgd", "sgdw"])
@pytest.mark.parametrize("momentum", [None, 0.0])
def test_without_momentum(name, momentum):
    make = getattr(fq, name)
    for argument in ("nesterov=True", "dampening=0.5"):
        key, value = argument.split("=")
        kwargs = {"momentum": momentum, key: eval(value)}
        assert_raises(
            ValueError,
            lambda kwargs=kwargs: make(1e-3, **kwargs),
            f"`{name}({argument})`",
            "momentum=0.9",
        )


@pytest.mark.parametrize("name", ["adamw", "lion", "sgdw"])
def test_peak_learning_rate(name):
    make = getattr(fq, name)
    schedule = optax.constant_schedule(1e-3)
    assert_raises(
        ValueError,
        lambda: make(schedule, decay="independent"),
        f"`{name}(decay='independent')`",
        "`peak_learning_rate=...`",
    )
    argument = f"`{name}(peak_learning_rate=...)`"
    assert_raises(
        ValueError,
        lambda: make(1e-3, peak_learning_rate=1e-3),
        argument,
        "decay='independent'",
    )
    for value in (0.0, -1.0):
        assert_raises(
            ValueError,
            lambda value=value: make(
                schedule, decay="independent", peak_learning_rate=value
            ),
            argument,
        )


@pytest.mark.parametrize("rule", [None, fq.Adam, "adam", optax.adam(1e-3)])
def test_no_rule(rule):
    assert_raises(
        TypeError,
        lambda: fq.optimizer(rule, 1e-3),
        "`optimizer(rule=...)`",
        "AbstractRule",
    )


#
# The model
#


def test_master_weights_without_effect():
    for bits in (24, 32):
        optim = fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=bits))
        for init in (optim.init, jax.jit(optim.init)):
            assert_raises(
                ValueError,
                lambda init=init: init({"a": jnp.ones(3), "b": jnp.ones(2)}),
                f"`adamw(...).init`: `Storage(master_weight_bits={bits})`",
                "no effect",
                "['a']",
                "float32",
                "flashquinox.prepare(model, optim)",
                "master_weight_bits=None",
            )
    # One leaf on which it has an effect is enough.
    fq.adamw(1e-3).init({"a": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16)})


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.float8_e4m3fn])
def test_weights_of_other_dtypes(dtype):
    model = _replace(_model(), jnp.zeros((4, 64), dtype))
    optim = fq.adamw(1e-3)
    # They may be there, but not have a gradient.
    state = optim.init(model)
    grads = _grads(_model())
    for method, call in (
        ("step", lambda: optim.step(model, state, grads)),
        ("update", lambda: optim.update(grads, state, model)),
    ):
        parts = (_path, jnp.dtype(dtype).name, "bfloat16")
        assert_raises(TypeError, call, f"`adamw(...).{method}`", *parts)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64, bool])
def test_cast_to_no_float(dtype):
    assert_raises(
        TypeError,
        lambda: fq.cast(_model(), dtype),
        "`cast(model, dtype)`",
        "floating-point",
    )


#
# Gradients, state, masks: `step` and `update`
#


_optim = fq.adamw(1e-3)


@functools.cache
def _bad_grads():
    model = _model()
    grads = _grads(model)
    missing = "has nothing at"
    return {
        "none": (TypeError, None, ["`grads` is None"]),
        "structure": (
            ValueError,
            {"other": grads},
            ["`grads`", missing, "['layers'][0]['bias']"],
        ),
        "missing leaf": (
            ValueError,
            _without_bias(grads),
            ["`grads`", missing, "['layers'][0]['bias']", "None", "eqx.filter_grad"],
        ),
        "extra leaf": (
            ValueError,
            grads | {"more": jnp.ones(3)},
            ["`grads`", "['more']", "the model has none"],
        ),
        "shape": (
            ValueError,
            _replace(grads, jnp.ones((4, 32))),
            [_path, "(4, 32)", "(4, 64)"],
        ),
        "transposed": (
            ValueError,
            _replace(grads, jnp.ones((64, 4))),
            [_path, "(64, 4)", "(4, 64)"],
        ),
        "integer": (
            TypeError,
            _replace(grads, jnp.ones((4, 64), jnp.int32)),
            [_path, "int32", "bfloat16, float16, float32"],
        ),
        "boolean": (
            TypeError,
            _replace(grads, jnp.ones((4, 64), bool)),
            [_path, "bool", "bfloat16, float16, float32"],
        ),
        "complex": (
            TypeError,
            _replace(grads, jnp.ones((4, 64), jnp.complex64)),
            [_path, "complex64", "bfloat16, float16, float32"],
        ),
        "number": (TypeError, _replace(grads, 0.5), [_path, "0.5", "None"]),
        "string": (TypeError, _replace(grads, "a"), [_path, "'a'", "None"]),
    }


@functools.cache
def _bad_states():
    model = _model()
    state = _optim.init(model)
    small = _replace(model, jnp.ones((4, 32), jnp.bfloat16))
    full = fq.cast(model, jnp.float32)
    made = lambda optim, model=model: optim.init(model)
    again = "`init`"
    mu = lambda state: _at_matrix(state.moments["mu"])
    return {
        "none": (TypeError, None, ["NoneType", again]),
        "the model": (TypeError, model, ["dict", again]),
        "of Optax": (TypeError, optax.adam(1e-3).init(full), ["tuple", again]),
        "of another rule": (
            ValueError,
            made(fq.lion(1e-3)),
            ["another optimizer", "['mu']", "['mu', 'nu']", again],
        ),
        "of no moments": (ValueError, made(fq.sgd(1e-3)), ["another optimizer", "[]"]),
        "of no bits": (
            ValueError,
            made(fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=None))),
            [
                "master_weight_bits=None",
                "master_weight_bits=24",
                "['layers'][0]",
                again,
            ],
        ),
        "of float32 weights": (
            ValueError,
            made(fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=None)), full),
            ["master_weight_bits=None", "master_weight_bits=24", "bfloat16", again],
        ),
        "of another codec": (
            ValueError,
            made(fq.adamw(1e-3, storage=fq.Storage(moments="float32"))),
            ["FullPrecision", "LinearCodec", _path, "moments=", again],
        ),
        "of another group size": (
            ValueError,
            made(fq.adamw(1e-3, storage=fq.Storage(group_size=64))),
            ["group_size=64", "group_size=32", _path, again],
        ),
        "of another model": (
            ValueError,
            made(_optim, {"other": model["layers"][1]["ragged"]}),
            ["has nothing at", "['layers'][0]['bias']", again],
        ),
        "of a larger model": (
            ValueError,
            made(_optim, model | {"more": jnp.ones((4, 32), jnp.bfloat16)}),
            ["['more']", "the model has none", again],
        ),
        "of another shape": (
            ValueError,
            made(_optim, small),
            [_path, "(4, 32)", "(4, 64)"],
        ),
        "of other scales": (
            ValueError,
            eqx.tree_at(lambda s: mu(s).scales, state, jnp.zeros((4, 3), jnp.int16)),
            [_path, "scales", "(4, 3)", "(4, 2)", again],
        ),
        "of another correction": (
            ValueError,
            eqx.tree_at(
                lambda s: _at_matrix(s.corrections), state, jnp.zeros((4, 32), jnp.int8)
            ),
            [_path, "correction", "(4, 32)", "(4, 64)"],
        ),
    }


def _assert_step_raises(error, optim, model, state, grads, parts):
    """By `step` and by `update`, eagerly and traced; and nothing is donated."""
    before = jtu.tree_map(
        lambda x: np.array(x) if eqx.is_array(x) else x, (model, state)
    )
    step, update = optim.step, optim.update
    jitted = eqx.filter_jit(step, donate="all")
    for method, call in (
        ("step", lambda: step(model, state, grads)),
        ("step", lambda: jitted(model, state, grads)),
        ("update", lambda: update(grads, state, model)),
    ):
        assert_raises(error, call, f"`adamw(...).{method}`", *parts)
    after = jtu.tree_map(
        lambda x: np.array(x) if eqx.is_array(x) else x, (model, state)
    )
    assert tree_identical(after, before)


@pytest.mark.parametrize("case", _bad_grads())
def test_gradients(case):
    error, grads, parts = _bad_grads()[case]
    model = _model()
    _assert_step_raises(error, _optim, model, _optim.init(model), grads, parts)


@pytest.mark.parametrize("case", _bad_states())
def test_states(case):
    error, state, parts = _bad_states()[case]
    model = _model()
    _assert_step_raises(error, _optim, model, state, _grads(model), parts)


def test_leaf_that_became_an_array():
    model = _model()
    state = _optim.init(_replace(model, None))
    parts = [_path, "no floating-point array", "`init`"]
    _assert_step_raises(ValueError, _optim, model, state, _grads(model), parts)


@pytest.mark.parametrize(
    "mask,parts",
    [
        ({"other": True}, ["`mask`", "has nothing at", "prefix"]),
        ({"layers": True, "steps": False, "more": True}, ["`mask`", "['more']"]),
        ({"layers": 0.5, "steps": False}, ["`mask`", "['layers'][0]", "0.5"]),
        (
            lambda model: {"layers": "yes", "steps": None},
            ["`mask`", "'yes'", "True or False"],
        ),
    ],
)
def test_masks(mask, parts):
    model = _model()
    optim = fq.adamw(1e-3, mask=mask)
    error = TypeError if "True" in parts[-1] or "0.5" in parts else ValueError
    assert_raises(error, lambda: optim.init(model), "`adamw(...).init`", *parts)
    state = fq.adamw(1e-3).init(model)
    _assert_step_raises(error, optim, model, state, _grads(model), parts)


def test_update_without_params():
    model = _model()
    state = _optim.init(model)
    for call in (
        lambda: _optim.update(_grads(model), state),
        lambda: _optim.update(_grads(model), state, None),
        lambda: jax.jit(lambda g: _optim.update(g, state))(_grads(model)),
    ):
        assert_raises(
            ValueError, call, "`adamw(...).update(grads, state, params)`", "third"
        )


def test_arguments_in_another_order():
    model = _model()
    state, grads = _optim.init(model), _grads(model)
    for call in (
        lambda: _optim.step(model, grads, state),
        lambda: _optim.update(model, grads, state),
    ):
        assert_raises(
            TypeError, call, "OptimizerState", "the model comes before the state"
        )


def test_master_weights_of_another_state():
    model = _model()
    with_bits = {"layers": model["layers"], "steps": None}
    assert_raises(
        TypeError,
        lambda: fq.master_weights(model, model),
        "`master_weights`",
        "OptimizerState",
    )
    state = _optim.init(_replace(with_bits, jnp.ones((4, 32), jnp.bfloat16)))
    assert_raises(
        ValueError,
        lambda: fq.master_weights(with_bits, state),
        "`master_weights`",
        _path,
        "(4, 32)",
        "(4, 64)",
    )
    other = _optim.init({"other": jnp.ones((4, 32), jnp.bfloat16)})
    assert_raises(
        ValueError,
        lambda: fq.master_weights(model, other),
        "`master_weights`",
        "has nothing",
    )


def test_messages_name_the_path_of_a_module():
    model = fq.cast(eqx.nn.MLP(3, 2, 40, 1, key=jax.random.key(0)), jnp.bfloat16)
    grads = _grads(eqx.filter(model, eqx.is_array))
    where = lambda m: m.layers[1].weight
    grads = eqx.tree_at(where, grads, jnp.ones((2, 3), jnp.bfloat16))
    state = _optim.init(model)
    assert_raises(
        ValueError,
        lambda: _optim.step(model, state, grads),
        "`.layers[1].weight`",
        "(2, 3)",
        "(2, 40)",
    )


def test_inject_hyperparams_of_storage():
    inject = optax.inject_hyperparams(fq.adamw, hyperparam_dtype=jnp.float32)
    storage = fq.Storage(group_size=64, master_weight_bits=32)
    optim = inject(learning_rate=1e-3, storage=storage)
    state = jax.jit(optim.init)(_model())
    assert set(state.hyperparams) == {"learning_rate"}
    assert _at_matrix(state.inner_state.moments["mu"]).group_size == 64
    assert _at_matrix(state.inner_state.corrections).dtype == jnp.int16
