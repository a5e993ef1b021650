"""Gradient release: the ordinary step bit for bit, in less memory."""

import importlib
import inspect
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq

from ..helpers import array_of, assert_code_of, Case, EAGER, float64, slow, Storage


_LAYERS = 3
# What a model can do without.
_VECTORS = ("bias", "scale")
_WIDTH = 64
_ours = Storage(jnp.bfloat16, 24, "flashquinox")


#
# A model
#


def _model(dtype=jnp.bfloat16, layers: int = _LAYERS, odd: bool = False, without=()):
    model = _all_of_model(dtype, layers, odd)
    blocks = {k: x for k, x in model["blocks"].items() if k not in without}
    model["blocks"] = blocks
    return {k: x for k, x in model.items() if k not in without}


def _all_of_model(dtype, layers: int, odd: bool):
    rng = np.random.default_rng(0)
    array = lambda *shape: array_of(0.3 * rng.standard_normal(shape), dtype)
    # Of the prologue and the epilogue; of the epilogue.
    model: dict[str, Any] = {"token": array(96, _WIDTH), "bias": array(96)}
    model["blocks"] = {
        "weight": array(layers, _WIDTH, _WIDTH),
        "scale": 1 + jnp.abs(array(layers, _WIDTH)),
    }
    if not odd:
        return model
    # Of the prologue; of none.
    model |= {"position": array(16, _WIDTH), "unused": array(32), "empty": array(0)}
    model["blocks"] |= {
        # Its layers are no whole groups, which run through several of them.
        "pair": array(layers, 2),
        "number": array(layers),
        "shift": jnp.arange(layers),
        "activation": jnp.tanh,
        "nothing": None,
    }
    return model


def _prologue(model, batch, key):
    x = _take(model["token"], batch["tokens"])
    if "position" in model:
        x = x + model["position"]
    # What has no gradient goes along.
    return {"x": _dropout(x, key), "layer": jnp.zeros((), jnp.int32)}


def _block(block, x, batch, key):
    layer, x = x["layer"], x["x"]
    new = x @ _whole(block["weight"]).T
    if "pair" in block:
        new = block["activation"](new) * jnp.repeat(block["pair"], 32)[None]
        new = new * block["number"] + (block["shift"] + layer).astype(x.dtype)
    if "scale" in block:
        new = new * jnp.sqrt(_whole(block["scale"]))[None]
    new = new * batch["factor"]
    return {"x": x + _dropout(new, key), "layer": layer + 1}


def _epilogue(model, x, batch, key):
    logits = _dropout(x["x"], key) @ _whole(model["token"]).T
    if "bias" in model:
        logits = logits + _whole(model["bias"])[None]
    logits = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logits, batch["targets"][..., None], -1))


def _dropout(x, key):
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, jnp.zeros_like(x))


def _is_explicit(x) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _whole(weight):
    """On a mesh with explicit axes, gathered by hand, for activations to be divided."""
    return jax.sharding.reshard(weight, P()) if _is_explicit(weight) else weight


def _take(weight, rows):
    if not _is_explicit(weight):
        return weight[rows]
    return _whole(weight).at[rows].get(out_sharding=P(*jax.typeof(rows).sharding.spec))


# Without the type checker that the tests put around every function.
_unchecked = inspect.unwrap(fq.release_step)

_loss = fq.LayeredLoss(lambda model: model["blocks"], _prologue, _block, _epilogue)


def _batch(seed: int = 0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    numbers = lambda: jnp.asarray(rng.integers(0, 96, 16))
    factor = jnp.ones((), dtype)
    return {"tokens": numbers(), "targets": numbers(), "factor": factor}


def _steps(optim, loss=_loss, **options):
    """An ordinary step and one that releases gradients, compiled."""

    @eqx.filter_jit
    def ordinary(model, state, batch, key):
        value, grads = eqx.filter_value_and_grad(loss)(model, batch, key)
        return *optim.step(model, state, grads), value

    @eqx.filter_jit
    def release(model, state, batch, key):
        return fq.release_step(optim, loss, model, state, batch, key, **options)

    return ordinary, release


def _differences(found, expected) -> list[str]:
    """The leaves in which two trees differ, by a bit or by where they are."""
    assert jtu.tree_structure(found) == jtu.tree_structure(expected)
    different = []
    for (path, x), y in zip(
        jtu.tree_leaves_with_path(found), jtu.tree_leaves(expected), strict=True
    ):
        if not eqx.is_array(x):
            same = x is y
        else:
            same = x.dtype == y.dtype and x.shape == y.shape
            same = same and np.asarray(x).tobytes() == np.asarray(y).tobytes()
            same = same and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        if not same:
            different.append(jtu.keystr(path))
    return different


#
# The ordinary step bit for bit
#

# A product and a sum are one operation, rounded once, where the compiler likes to have
# it, which may be in one of two programs. So these tests are in a process of their own,
# for a processor that has none.


@pytest.fixture(scope="module")
def plain_processor():
    # Less time of LLVM, whose passes do no arithmetic of their own.
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX "
        "--xla_backend_optimization_level=0"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", flags.strip())
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            1, context, importlib.import_module, ("tests.conftest",)
        ) as pool:
            yield pool


# With the odd leaves, a mask and dropout, or with two leaves.
_CASES = [
    (Case("lion", _ours), True),
    (Case("adamw-nesterov", Storage(jnp.bfloat16, 24, "learned")), False),
    (Case("adam", Storage(jnp.float32, None, "float32")), False),
    (Case("sgd", Storage(jnp.bfloat16, 32, "flashquinox")), False),
    # Its moments are not in the order of their names.
    (Case("adan", _ours), False),
    (Case("sgdw", Storage(jnp.float16, 32, "flashoptim")), False),
]
_SLOW_CASES = [
    (Case("adamw", _ours), True),
    (Case("adamw", Storage(jnp.float16, 32, "flashoptim")), True),
    (Case("adamw", Storage(jnp.bfloat16, 24, "learned")), True),
    (Case("adamw-nesterov", Storage(jnp.float32, None, "flashquinox")), False),
    (Case("sgd-momentum", Storage(jnp.bfloat16, None, "flashoptim")), False),
    (Case("sgd-nesterov", Storage(jnp.bfloat16, 32, "float32")), False),
    (Case("sgdw", _ours), False),
]


def _case_id(value) -> str:
    return value.name if isinstance(value, Case) else "odd" if value else "plain"


@pytest.mark.product
@pytest.mark.parametrize(
    "case, odd",
    [*_CASES, *(slow(*x) for x in _SLOW_CASES)],
    ids=_case_id,
)
def test_is_the_ordinary_step(case, odd, plain_processor):
    assert plain_processor.submit(_train_both, case, odd).result() == []


def _train_both(case: Case, odd: bool) -> list[str]:
    """With a schedule, and a weight that both ends use."""
    options, stored = {}, {}
    if odd:
        options["mask"] = lambda model: jtu.tree_map(lambda x: x.ndim > 2, model)
    if case.storage.moments == "learned":
        stored["moments"] = EAGER
    schedule = optax.linear_schedule(1e-2, 1e-3, 3)
    optim = case.optimizer(schedule, stored, **options)
    model = _model(case.storage.dtype, odd=odd, without=["scale"] if odd else _VECTORS)
    results = []
    for step in _steps(optim):
        trained, state, values = model, optim.init(model), []
        # Codecs learn in the fifth step.
        for i in range(6):
            key = jax.random.key(i) if odd else None
            batch = _batch(i, case.storage.dtype)
            trained, state, value = step(trained, state, batch, key)
            values.append(value)
        results.append((trained, state, values))
    weights = fq.master_weights(*results[0][:2])["blocks"]["weight"]
    moved = np.asarray(weights != model["blocks"]["weight"].astype(weights.dtype))
    assert np.all(np.mean(moved, axis=(1, 2)) > 0.5)
    return _differences(*reversed(results))


@pytest.mark.product
@pytest.mark.parametrize("types", ["Auto", "Explicit"])
def test_on_many_devices(types, plain_processor):
    assert plain_processor.submit(_train_both_on_many, types).result() == []


def _train_both_on_many(types: str) -> list[str]:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType[types],))
    rows: dict[str, Any] = {"token": P("data")}
    rows["blocks"] = {"weight": P(None, "data"), "scale": P()}
    where = jtu.tree_map(lambda spec: NamedSharding(mesh, spec), rows)
    model = jax.device_put(_model(without=["bias"]), where)
    batch = _batch()
    divided = {name: P("data") if x.ndim else P() for name, x in batch.items()}
    batch = jax.device_put(
        batch, jtu.tree_map(lambda spec: NamedSharding(mesh, spec), divided)
    )
    optim = fq.lion(1e-2, skip_nonfinite=True)
    state = optim.init(model)
    results = []
    with jax.set_mesh(mesh):
        for step in _steps(optim, max_norm=1e9):
            trained = model, state, None
            for _ in range(2):
                trained = step(*trained[:2], batch, None)
            results.append(trained)
    release, ordinary = reversed(results)
    places = lambda tree: jtu.tree_map(lambda x: x.sharding, tree)
    before = jtu.tree_leaves(places((model, state)))
    for x, sharding in zip(jtu.tree_leaves(release[:2]), before, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    return _differences(release, ordinary)


@pytest.mark.once
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_kernels(backend, plain_processor):
    """Interpreted."""
    assert plain_processor.submit(_step_of_kernels, backend).result() == []


def _step_of_kernels(backend: str) -> list[str]:
    optim = fq.lion(1e-2, backend=backend)
    # For TPUs, the groups of vectors run along 32 layers, if they can.
    model = _model(layers=32, without=["bias"])
    state = optim.init(model)
    axes = (-2,) if backend == "tpu" else (-1,)
    assert state.moments["mu"]["blocks"]["scale"].axes == axes
    batch = _batch() | {"factor": jnp.asarray(0.01, jnp.bfloat16)}
    ordinary, release = (step(model, state, batch, None) for step in _steps(optim))
    return _differences(release, ordinary)


#
# Parts of a model
#


@pytest.mark.once
def test_skip_nonfinite(plain_processor):
    assert plain_processor.submit(_steps_that_are_not_finite).result() == ([], [])
    assert plain_processor.submit(_step_that_learns).result() == []


def _steps_that_are_not_finite() -> tuple[list[str], list[str]]:
    """An infinite gradient in one layer: that one stays as it is, and nothing else.
    What waits for all layers is finite here. And where the loss is not, it is as if
    there had been no step."""
    model = _model(odd=True, without=["bias", "position", "unused", "empty"])
    # The derivative of the square root.
    model["blocks"]["scale"] = model["blocks"]["scale"].at[1, 5].set(0)
    ordinary, _ = _steps(fq.lion(1e-2))
    optim = fq.lion(1e-2, skip_nonfinite=True)
    state = optim.init(model)
    _, release = _steps(optim)
    trained, expected = (
        step(model, state, _batch(), None)[:2] for step in (release, ordinary)
    )
    assert trained[1].count == 1

    def one(path, new, old):
        keys = [getattr(key, "key", None) for key in path]
        if {"weight", "scale", "number"} & set(keys):
            return new.at[1].set(old[1])
        return new

    wanted = jtu.tree_map_with_path(one, expected, (model, state))
    batch = _batch() | {"factor": jnp.asarray(jnp.nan, jnp.bfloat16)}
    *unchanged, value = release(model, state, batch, None)
    assert jnp.isnan(value)
    return (
        _differences(trained, wanted),
        _differences(tuple(unchanged), (model, state)),
    )


def _step_that_learns() -> list[str]:
    """What a layer that is left as it is has stored is in the new codes, too."""
    optim = fq.lion(1e-2, storage=fq.Storage(moments=EAGER), skip_nonfinite=True)
    model = _model(without=["bias"])
    state = optim.init(model)
    _, release = _steps(optim)
    for i in range(4):
        model, state, _ = release(model, state, _batch(i), None)
    # Of a layer, the norm of its weights is infinite now, but that is no part of it.
    model["blocks"]["scale"] = model["blocks"]["scale"].at[1, 5].set(0)
    _, new, _ = release(model, state, _batch(4), None)
    for moments, new_moments in zip(
        state.moments.values(), new.moments.values(), strict=True
    ):
        old, moment = moments["blocks"]["weight"], new_moments["blocks"]["weight"]
        assert moment.parameter != old.parameter
        layer = lambda x: fq.QuantMoment(
            x.codes[1], x.scales[1], x.axes, x.group_size, x.codec, x.parameter
        )
        exact = float64(layer(old).decode())
        assert_code_of(layer(moment), exact, atol=2.0**-22 * np.abs(exact))
    return []


@pytest.mark.once
def test_max_norm():
    """Of each part, and of no other: what only the epilogue reads, the layers, and the
    rest."""
    # The first momentum is the gradient.
    optim = fq.sgd(
        1.0,
        momentum=0.9,
        storage=fq.Storage(master_weight_bits=None, moments="float32"),
    )
    model, batch = _model(jnp.float32), _batch(dtype=jnp.float32)

    def gradient(**options):
        _, release = _steps(optim, **options)
        _, state, _ = release(model, optim.init(model), batch, None)
        return jtu.tree_map(float64, state.moments["trace"])

    grads = gradient()
    blocks = grads["blocks"]
    norm = lambda *xs: np.sqrt(sum(np.sum(np.square(x)) for x in xs))
    norms = {
        "token": norm(grads["token"]),
        "bias": norm(grads["bias"]),
        "blocks": np.array([norm(*(x[i] for x in blocks.values())) for i in range(3)]),
    }
    # Some parts are below, some above.
    most = float(np.median(norms["blocks"]))
    factors = jtu.tree_map(lambda norm: np.minimum(1, most / norm), norms)
    assert factors["token"] < 1 and np.sum(factors["blocks"] < 1) == 1
    clipped = gradient(max_norm=most)
    # A sum of that many squares, in any order, and half of its error for the root; then
    # the root, the factor and the product.
    size = max(model["token"].size, model["blocks"]["weight"][0].size + _WIDTH)
    error = (size / 2 + 4) * 2.0**-24

    def check(found, grad, factor):
        expected = np.reshape(factor, (-1, *[1] * (grad.ndim - 1))) * grad
        assert np.all(np.abs(found - expected) <= error * np.abs(expected))

    factors["blocks"] = dict.fromkeys(blocks, factors["blocks"])
    jtu.tree_map(check, clipped, grads, factors)


@pytest.mark.once
def test_max_norm_of_gradients_of_any_size():
    """Also where their squares are infinite in float32, or zero."""
    optim = fq.sgd(
        1.0,
        momentum=0.9,
        storage=fq.Storage(master_weight_bits=None, moments="float32"),
    )
    epilogue = lambda model, x, batch, key: (
        batch["unit"] * _epilogue(model, x, batch, key)
    )
    loss = fq.LayeredLoss(_loss.blocks, _prologue, _block, epilogue)
    model = _model(jnp.float32, without=["scale"])
    state = optim.init(model)

    @eqx.filter_jit
    def release(batch, most):
        return fq.release_step(optim, loss, model, state, batch, max_norm=most)

    for exponent in (0, 100, -100):
        unit = jnp.asarray(2.0**exponent, jnp.float32)
        most = unit / 256
        batch = _batch(dtype=jnp.float32) | {"unit": unit}
        _, clipped, _ = release(batch, most)
        grads = jtu.tree_map(float64, clipped.moments["trace"])
        parts = [[grads["token"]], [grads["bias"]]]
        parts += [[x[i] for x in grads["blocks"].values()] for i in range(_LAYERS)]
        for part in parts:
            norm = np.sqrt(sum(np.sum(np.square(x)) for x in part))
            assert norm / float(most) == pytest.approx(1, rel=1e-3), exponent


@pytest.mark.once
def test_clipping_hides_nothing_that_is_not_finite():
    optim = fq.lion(1e-2, skip_nonfinite=True)
    model = _model(without=_VECTORS)
    state = optim.init(model)
    _, release = _steps(optim, max_norm=1.0)
    for factor in (np.nan, np.inf):
        batch = _batch() | {"factor": jnp.asarray(factor, jnp.bfloat16)}
        *trained, _ = release(model, state, batch, None)
        assert _differences(tuple(trained), (model, state)) == [], factor


#
# Groups of weights
#


def _label(path, x):
    name = path[-1].key
    return "frozen" if name == "bias" else "vector" if x.ndim < 3 else "matrix"


def _labels(params):
    return jtu.tree_map_with_path(_label, params)


def _group(tree, labels, label):
    """What `optax.partition` passes on to one of its optimizers."""
    return jtu.tree_map(
        lambda name, x: x if name == label else optax.MaskedNode(), labels, tree
    )


def _ordinary_groups(optim, model, state, batch):
    """A step of each group by its own optimizer."""
    value, grads = eqx.filter_value_and_grad(_loss)(model, batch, None)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    labels = _labels(params)
    inner, new = dict(state.inner_states), params
    for label, one in optim.items():
        own = (_group(params, labels, label), inner[label].inner_state)
        trained, own = one.step(*own, _group(grads, labels, label))
        inner[label] = inner[label]._replace(inner_state=own)
        new = jtu.tree_map(
            lambda x, y: x if isinstance(y, optax.MaskedNode) else y, new, trained
        )
    return eqx.combine(new, rest), state._replace(inner_states=inner), value


@pytest.mark.once
def test_groups(plain_processor):
    assert plain_processor.submit(_train_groups).result() == []


def _train_groups() -> list[str]:
    optim = {
        "matrix": fq.lion(1e-2),
        "vector": fq.sgd(
            optax.linear_schedule(1e-2, 0, 9), 0.9, nesterov=True, skip_nonfinite=True
        ),
    }
    partition = optax.partition(optim | {"frozen": optax.set_to_zero()}, _labels)
    model = first = _model(odd=True, without=["position", "unused", "number", "pair"])
    state = partition.init(eqx.filter(model, eqx.is_inexact_array))
    ordinary = eqx.filter_jit(_ordinary_groups)
    release = eqx.filter_jit(fq.release_step)
    different = []
    for seed in range(2):
        batch = _batch(seed)
        expected = ordinary(optim, model, state, batch)
        model, state, value = release(optim, _loss, model, state, batch)
        different += _differences((model, state, value), expected)
    assert _differences(model["bias"], first["bias"]) == []
    assert _differences(model["token"], first["token"]) != []
    # Only the group that asked for it is left as it is.
    bad = _batch() | {"factor": jnp.asarray(jnp.nan, jnp.bfloat16)}
    new, state, _ = release(optim, _loss, model, state, bad)
    assert _differences(new["token"], model["token"]) == []
    weight = lambda model: model["blocks"]["weight"]
    assert _differences(weight(new), weight(model)) != []
    return different


@pytest.mark.parametrize(
    "optim, wrap, error, match",
    [
        (
            {"a": fq.lion(1e-2), "b": optax.sgd(1e-2)},
            lambda optim: optax.partition(optim, lambda x: "a"),
            TypeError,
            r"`optim\['b'\]` is no `flashquinox.Optimizer`",
        ),
        (
            {"a": fq.lion(1e-2)},
            lambda optim: optim["a"],
            TypeError,
            r"state of `optax.partition`; got a OptimizerState",
        ),
        (
            {"a": fq.lion(1e-2)},
            lambda optim: optax.partition({"b": fq.lion(1e-2)}, lambda x: "b"),
            ValueError,
            r"the labels \['a'\].* for \['b'\]",
        ),
    ],
)
def test_groups_that_do_not_fit(optim, wrap, error, match):
    model = _model()
    state = wrap(optim).init(model)
    with pytest.raises(error, match=match):
        _unchecked(optim, _loss, model, state, _batch())


#
# Wrong arguments
#


def _wrong_loss(**parts):
    known = {
        "blocks": _loss.blocks,
        "prologue": _prologue,
        "block": _block,
        "epilogue": _epilogue,
    }
    return fq.LayeredLoss(**(known | parts))


_WRONG_LOSSES = [
    (lambda model, batch, key: 0.0, TypeError, "the loss is no `flashquinox.Layered"),
    (_wrong_loss(blocks=lambda model: {}), ValueError, "has no leaves"),
    (
        _wrong_loss(blocks=lambda model: [model["activation"]]),
        ValueError,
        "there are no arrays in the blocks",
    ),
    (_wrong_loss(blocks=lambda model: None), ValueError, "has None at .* no part"),
    (
        _wrong_loss(blocks=lambda model: [model["bias"], model["bias"]]),
        ValueError,
        r"has `.*bias.*` twice, once at `",
    ),
    (
        _wrong_loss(blocks=lambda model: {"x": jnp.ones(3)}),
        ValueError,
        r"has Array.* at `.*x.*`, which is no part",
    ),
    (
        _wrong_loss(blocks=lambda model: [model["blocks"], model["bias"]]),
        ValueError,
        "the first axis of every array in the blocks",
    ),
    (
        _wrong_loss(block=lambda block, x, batch, key: x["x"]),
        ValueError,
        "Return a tree of the structure of `x`",
    ),
    (
        _wrong_loss(
            block=lambda block, x, batch, key: x | {"x": x["x"].astype(jnp.float32)}
        ),
        ValueError,
        "`block` got bfloat16",
    ),
    (
        _wrong_loss(epilogue=lambda model, x, batch, key: x["x"]),
        TypeError,
        "Return the loss: a floating-point scalar",
    ),
]


@pytest.mark.parametrize(
    "number", range(len(_WRONG_LOSSES)), ids=lambda i: _WRONG_LOSSES[i][2][:30]
)
def test_wrong_losses(number):
    loss, kind, message = _WRONG_LOSSES[number]
    optim, model = fq.adamw(1e-2), _model() | {"activation": jnp.tanh}
    with pytest.raises(
        kind, match=rf"`(release_step|LayeredLoss\(blocks=...\))`.*{message}"
    ):
        _unchecked(optim, loss, model, optim.init(model), _batch())
    if isinstance(loss, fq.LayeredLoss):
        with pytest.raises(kind, match=message):
            loss(model, _batch())


@pytest.mark.parametrize(
    "wrapped",
    [
        optax.chain(optax.clip_by_global_norm(1.0), fq.adamw(1e-2)),
        optax.MultiSteps(fq.adamw(1e-2), 4),
        fq.accumulate(fq.adamw(1e-2), 4),
    ],
    ids=["clipping", "accumulation", "accumulate"],
)
def test_what_needs_all_gradients_is_refused(wrapped):
    model = _model()
    state = wrapped.init(eqx.filter(model, eqx.is_array))
    message = "needs the gradients of all layers at once"
    with pytest.raises(TypeError, match=message):
        _unchecked(wrapped, _loss, model, state, _batch())


def test_wrong_norm():
    optim, model = fq.adamw(1e-2), _model()
    with pytest.raises(ValueError, match=r"`release_step\(max_norm=...\)`"):
        state = optim.init(model)
        fq.release_step(optim, _loss, model, state, _batch(), max_norm=-1.0)


def test_divided_layers_are_refused():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    model = jax.device_put(_model(layers=4, without=_VECTORS), NamedSharding(mesh, P()))
    where = NamedSharding(mesh, P("data"))
    weight = jax.device_put(model["blocks"]["weight"], where)
    model["blocks"]["weight"] = weight
    optim = fq.sgd(1e-2)
    state = optim.init(model)
    with pytest.raises(
        ValueError, match=r"weight.*its layers lie on different devices"
    ):
        fq.release_step(optim, _loss, model, state, _batch())
