"""Weights and state that are divided among devices: eight of the CPU."""

import contextlib
import dataclasses
import functools
import itertools
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq

from ..helpers import array_of, Case, slow, Storage


_SHAPES = {
    "matrix": (256, 512),
    "stack": (4, 64, 128),
    "bias": (512,),
    # Partial groups.
    "ragged": (256, 40),
    "scalar": (),
}
_FSDP = {
    "matrix": P("data"),
    "stack": P(None, "data"),
    "bias": P("data"),
    "ragged": P("data"),
}
_TENSOR = {
    "matrix": P(None, "model"),
    "stack": P(None, "model", None),
    "bias": P("model"),
}
_BOTH = {
    "matrix": P("data", "model"),
    "stack": P(None, "model", None),
    "bias": P(("model", "data")),
    "ragged": P(("model", "data"), None),
}
_LAYERS = {"stack": P("data")}
_LAYOUTS = {
    "fsdp": _FSDP,
    "tensor": _TENSOR,
    "2-D": _BOTH,
    "layers": _LAYERS,
    "replicated": {},
}
_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
_COLLECTIVES = re.compile(
    r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
)

_parametrize_types = pytest.mark.parametrize("types", _TYPES)
_ours = Storage(jnp.bfloat16, 24, "flashquinox")


def _parametrize_pairs(name, quick, values=None):
    """Over all pairs of a value and a type of axes; those that are not `quick`, by
    `-m slow`."""
    pairs = itertools.product(values or [value for value, _ in quick], _TYPES)
    cases = [slow(*pair, unless=pair in quick) for pair in pairs]
    return pytest.mark.parametrize(f"{name}, types", cases)


# Of one optimizer, and of two leaves: what is compiled for one test is there for the
# others. Lion, where the rule does not matter: it has one moment.
_optim = fq.lion(1e-2, weight_decay=0.1)
_step = jax.jit(_optim.step)
_PAIR = ("matrix", "bias")


def _mesh(types: str, shape=(4, 2)):
    kinds = (_TYPES[types],) * len(shape)
    return jax.make_mesh(shape, ("data", "model"), axis_types=kinds)


def _shardings(mesh, specs, names=tuple(_SHAPES)):
    return {name: NamedSharding(mesh, specs.get(name, P())) for name in names}


def _model(seed: int = 0, dtype=jnp.bfloat16, shapes=_SHAPES, names=None):
    rng = np.random.default_rng(seed)
    model = {
        name: array_of(0.1 * rng.standard_normal(shape), dtype)
        for name, shape in shapes.items()
    }
    return {name: model[name] for name in names or shapes}


def _put(tree, where):
    # By way of the host, nothing is compiled.
    return jax.device_put(jax.device_get(tree), where)


def _train(step, model, state, steps, shardings=None):
    for i in range(steps):
        dtype = next(iter(model.values())).dtype
        grads = _model(i + 1, dtype, names=model)
        if shardings is not None:
            grads = _put(grads, shardings)
        model, state = step(model, state, grads)
    return model, state


@functools.cache
def _on_one_device(steps, names):
    model = _model(names=names)
    return _train(_step, model, _optim.init(model), steps)


def _with_nan(grads):
    matrix = np.array(grads["matrix"])
    matrix[200, 3] = np.nan
    return grads | {"matrix": matrix}


def _assert_equal(found, expected):
    assert len(jtu.tree_leaves(found)) == len(jtu.tree_leaves(expected))
    for x, y in zip(jtu.tree_leaves(found), jtu.tree_leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(np.asarray(x), np.asarray(y))


#
# The same bits as on one device
#


_adamw = fq.adamw(1e-2, weight_decay=0.1)
_adamw_step = jax.jit(_adamw.step)
# Each leaf is divided in every way that there is for it.
_NAMES = {
    "fsdp": ("stack", "bias", "ragged", "scalar"),
    "2-D": ("matrix", "bias", "ragged"),
    "tensor": ("matrix", "bias"),
    "layers": ("stack",),
    "replicated": ("matrix", "scalar"),
}


@pytest.mark.product
@_parametrize_pairs(
    "layout",
    [
        ("fsdp", "auto"),
        ("tensor", "auto"),
        ("2-D", "explicit"),
        ("layers", "explicit"),
    ],
    _LAYOUTS,
)
def test_trains_as_on_one_device(layout, types):
    """No groups here lie in two parts, so that the state is that of one device too.

    Devices do not communicate, nor is there anything of the size of a leaf that is
    divided; and all is in place.
    """
    names = _NAMES[layout]
    shardings = _shardings(_mesh(types), _LAYOUTS[layout], names)
    first = _model(names=names)
    model = _put(first, shardings)
    state = _adamw.init(model)
    in_place = jax.jit(_adamw.step, donate_argnums=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = in_place.lower(model, state, model).compile()
        text = compiled.as_text() or ""
        assert not _COLLECTIVES.search(text)
        for name in names:
            if any(shardings[name].spec) and len(_SHAPES[name]) > 1:
                assert f"[{','.join(map(str, _SHAPES[name]))}]" not in text
        memory = compiled.memory_analysis()
        kept = sum(
            x.addressable_shards[0].data.nbytes for x in jtu.tree_leaves((model, state))
        )
        assert memory.alias_size_in_bytes >= kept
        # The backend of CPUs has temporaries of a chunk, and all that each device has
        # is one: with the arrays of small leaves one after another.
        parts = sum(x.addressable_shards[0].data.size for x in model.values())
        assert memory.temp_size_in_bytes <= 28 * parts
        found = _train(compiled, model, state, 3, shardings)
    _assert_equal(found, _train(_adamw_step, first, _adamw.init(first), 3))
    _is_divided(found, shardings)


def _is_divided(found, shardings):
    model, state = found
    for name, sharding in shardings.items():
        assert model[name].sharding.is_equivalent_to(sharding, model[name].ndim)
        correction = state.corrections[name]
        assert correction.sharding.is_equivalent_to(sharding, correction.ndim)
        for moments in state.moments.values():
            for x in jtu.tree_leaves(moments[name]):
                assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.product
@pytest.mark.parametrize(
    "case",
    [
        Case("lion", _ours),
        Case("sgd", _ours),
        Case("sgd-momentum", Storage(jnp.bfloat16, 32, "flashquinox")),
        Case("adam", Storage(jnp.float32, None, "float32")),
    ],
    ids=lambda case: case.name,
)
def test_optimizers(case):
    names = ("ragged",)
    shardings = _shardings(_mesh("auto"), _BOTH, names)
    optim = case.optimizer(1e-2)
    first = _model(dtype=case.storage.dtype, names=names)
    model = _put(first, shardings)
    step = jax.jit(optim.step)
    expected = _train(step, first, optim.init(first), 3)
    found = _train(step, model, optim.init(model), 3, shardings)
    _assert_equal(found, expected)


@pytest.mark.product
@pytest.mark.parametrize(
    "backend, make, types, layout",
    [
        ("tpu", fq.lion, "auto", "tensor"),
        ("gpu", fq.adamw, "explicit", "2-D"),
        slow("tpu", fq.adamw, "auto", "fsdp"),
        slow("tpu", fq.adamw, "auto", "tensor"),
        slow("gpu", fq.adamw, "auto", "fsdp"),
    ],
)
def test_kernels(backend, make, types, layout):
    """Interpreted, each device its own."""
    # One group in each lane of a part.
    shapes = {"matrix": (32, 256) if layout == "tensor" else (128, 128)}
    shardings = _shardings(_mesh(types), _LAYOUTS[layout], shapes)
    optim = make(1e-2, backend=backend)
    model, grads = _model(0, shapes=shapes), _model(1, shapes=shapes)
    step = jax.jit(optim.step)
    expected = step(model, optim.init(model), grads)
    model = _put(model, shardings)
    _assert_equal(step(model, optim.init(model), grads), expected)


#
# What is compiled
#


@pytest.mark.product
@pytest.mark.parametrize(
    "types, step",
    [
        ("auto", _optim.step),
        ("auto", _step),
        ("explicit", _step),
        slow("explicit", _optim.step),
    ],
    ids=["auto-eager", "auto-jit", "explicit-jit", "explicit-eager"],
)
def test_a_gradient_of_another_sharding(types, step):
    """It is moved, and nothing else."""
    names = ("matrix",)
    shardings = _shardings(_mesh(types), _FSDP, names)
    model = _put(_model(names=names), shardings)
    state = _optim.init(model)
    elsewhere = _shardings(_mesh(types), _TENSOR, names)
    grads = _put(_model(1, names=names), elsewhere)
    moved = _put(grads, shardings)
    found, expected = (step(model, state, x) for x in (grads, moved))
    _assert_equal(found, expected)


@_parametrize_types
def test_skip_nonfinite_is_one_collective(types):
    shardings = _shardings(_mesh(types), _FSDP, _PAIR)
    optim = fq.adamw(1e-2, weight_decay=0.1, skip_nonfinite=True)
    first = _model(names=_PAIR)
    model = _put(first, shardings)
    state = optim.init(model)
    step = jax.jit(optim.step).lower(model, state, model).compile()
    text = step.as_text() or ""
    # Of arrays, or of tuples of them.
    assert len(re.findall(r"[ )]all-reduce(?:-start)?\(", text)) == 1
    assert len(set(_COLLECTIVES.findall(text))) == 1
    grads = _model(1, names=_PAIR)
    unchanged = step(model, state, _put(_with_nan(grads), shardings))
    _assert_equal(unchanged, (model, state))
    found = step(model, state, _put(grads, shardings))
    _assert_equal(found, _adamw_step(first, _adamw.init(first), grads))


#
# Groups
#


@pytest.mark.parametrize(
    "shape, spec, axes, of_scales",
    [
        ((96, 64), P("data"), (-1,), P("data")),
        ((96, 64), P(None, "data"), (-2,), P(None, "data")),
        ((96, 64), P(), (-1,), P()),
        # Whole groups in the parts of merged axes, of which the first is divided.
        ((64, 128, 3, 3), P(None, "data"), (-3, -2, -1), P(None, "data")),
        ((64, 32, 3, 3), P("data"), (-3, -2, -1), P("data")),
        ((128, 3, 8), P("data"), (-3, -2, -1), P("data")),
        # None would be whole: partial ones in each part.
        ((8, 5, 9), P("data"), (-2, -1), P("data")),
        ((8, 9, 5), P(None, None, None), (-3, -2, -1), P()),
    ],
)
def test_groups_lie_along_axes_that_parts_hold_whole(shape, spec, axes, of_scales):
    model = {"weight": jnp.zeros(shape, jnp.bfloat16)}
    sharding = NamedSharding(_mesh("auto"), spec)
    moment = fq.adamw(1e-2).init(_put(model, sharding)).moments["mu"]["weight"]
    assert moment.axes == axes
    expected = NamedSharding(sharding.mesh, of_scales)
    assert moment.scales.sharding.is_equivalent_to(expected, moment.scales.ndim)


@_parametrize_pairs("moments", [("flashquinox", "auto"), ("flashoptim", "explicit")])
def test_groups_in_two_parts(moments, types):
    """No axes will do, or the codec flattens: it says so, and is right."""
    shapes = {"matrix": (96, 48)}
    sharding = NamedSharding(_mesh(types), P("data", "model"))
    make = fq.lion if moments == "flashquinox" else fq.adamw
    optim = make(1e-2, storage=fq.Storage(moments=moments))
    model, grads = _model(0, shapes=shapes), _model(1, shapes=shapes)
    step = jax.jit(optim.step)
    expected = step(model, optim.init(model), grads)
    model = _put(model, sharding)
    with pytest.warns(UserWarning, match=r"\['matrix'\].*gathers it"):
        state = optim.init(model)
    with pytest.warns(UserWarning, match=r"\['matrix'\].*gathers it"):
        found = step(model, state, _put(grads, sharding))
    _assert_equal(found, expected)
    assert found[0]["matrix"].sharding.is_equivalent_to(sharding, 2)


#
# Where the sharding is known from
#


@_parametrize_types
def test_init_in_jit_that_is_told(types):
    """With and without a mesh that is set."""
    mesh, names = _mesh(types), ("matrix",)
    shardings = _shardings(mesh, _FSDP, names)
    optim = fq.lion(1e-2, shardings=shardings)
    model = _put(_model(names=names), shardings)
    expected = optim.init(model)
    _is_divided((model, expected), shardings)
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with context:
            state = jax.jit(optim.init)(model)
            _assert_equal(state, expected)
            _is_divided((model, state), shardings)
            jax.jit(optim.step).lower(model, state, model)


@_parametrize_types
def test_state_that_is_nowhere(types):
    """It goes where the weights are, if that is known."""
    names = ("matrix",)
    shardings = _shardings(_mesh(types), _FSDP, names)
    first, second = (_model(i, names=names) for i in (1, 2))
    model = _model(names=names)
    model, state = _optim.step(model, _optim.init(model), first)
    # Compiled as a whole, scalars of the step may be rounded differently.
    expected, of_compiled = (x(model, state, second) for x in (_optim.step, _step))
    model, grads = _put((model, second), (shardings, shardings))
    found = _optim.step(model, state, grads)
    _assert_equal(found, expected)
    _is_divided(found, shardings)
    if types == "explicit":
        for where in (lambda x: x, jax.device_get):
            _assert_equal(_step(model, where(state), grads), of_compiled)


_UNKNOWN = (
    r"`lion\(\.\.\.\)\.{}`.*\['bias'\]` and \d more is on the mesh.*`shardings=\.\.\.`"
)


def test_init_in_jit():
    shardings = _shardings(_mesh("auto"), _FSDP)
    model = _put(_model(), shardings)
    with pytest.warns(UserWarning, match=_UNKNOWN.format("init")) as warned:
        state = jax.jit(_optim.init)(model)
    assert len(warned) == 1
    assert state.shardings == ()
    _assert_equal(state, _optim.init(_model()))
    told = fq.lion(1e-2, shardings=shardings)
    state = jax.jit(told.init)(model)
    _assert_equal(state, _optim.init(model))
    _is_divided((model, state), shardings)
    with jax.set_mesh(_mesh("explicit")):
        shardings = _shardings(_mesh("explicit"), _FSDP)
        model = _put(_model(), shardings)
        make = jax.jit(lambda model: (model, _optim.init(model)))
        _is_divided(make(model), shardings)


@pytest.mark.parametrize(
    "layout, backend, names",
    [
        ("replicated", "auto", _PAIR),
        ("2-D", "auto", ("stack", "bias")),
        ("2-D", "gpu", _PAIR),
    ],
)
def test_state_that_knows_nothing(layout, backend, names):
    """XLA divides the step: without kernels, with the same results, and without
    collectives where parts hold whole groups."""
    shardings = _shardings(_mesh("auto"), _LAYOUTS[layout], names)
    optim = fq.lion(1e-2, weight_decay=0.1, backend=backend)
    model, grads = (_model(i, names=names) for i in (0, 1))
    model, grads = _put((model, grads), (shardings, shardings))
    unknowing = dataclasses.replace(optim.init(model), shardings=())
    with pytest.warns(UserWarning, match=_UNKNOWN.format("step")) as warned:
        compiled = jax.jit(optim.step).lower(model, unknowing, grads).compile()
    assert len(warned) == 1
    text = compiled.as_text() or ""
    assert not _COLLECTIVES.search(text)
    found = compiled(model, unknowing, grads)
    _assert_equal(found, _on_one_device(1, names))
    _is_divided(found, shardings)


def test_state_that_knew_nothing():
    """Outside of `jit`, all is seen."""
    names = ("matrix",)
    shardings = _shardings(_mesh("auto"), _BOTH, names)
    model = _put(_model(names=names), shardings)
    made = _optim.init(model)
    _, state = _optim.step(model, dataclasses.replace(made, shardings=()), model)
    assert state.shardings == made.shardings


def test_mesh_of_both_types():
    """What is known in part is refused."""
    types = AxisType.Auto, AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    model = {"w": _put(jnp.zeros((64, 64)), NamedSharding(mesh, P("data")))}
    optim = fq.adamw(1e-2)
    with pytest.raises(
        ValueError, match=r"\.init`.*\['w'\].*`Explicit` divide it, mod"
    ):
        jax.jit(optim.init)(model)
    state = optim.init(model)
    jax.jit(optim.step)(model, state, model)


def test_states_of_other_divisions():
    """Differ in what they know of it, and so in their structure: a state takes that on
    with the field."""
    shardings = _shardings(_mesh("auto"), _FSDP, _PAIR)
    here = _optim.init(_model(names=_PAIR))
    there = _optim.init(jax.device_put(_model(names=_PAIR), shardings))
    assert jtu.tree_structure(here) != jtu.tree_structure(there)
    here = dataclasses.replace(here, shardings=there.shardings)
    moved = jtu.tree_map(lambda x, like: jax.device_put(x, like.sharding), here, there)
    _assert_equal(moved, there)
    where = jtu.tree_map(lambda x: x.sharding, there)
    _is_divided((jax.device_put(_model(names=_PAIR), shardings), moved), shardings)
    _assert_equal(jax.device_put(here, where), there)


@pytest.mark.once
def test_filter_shard_after_init():
    """Model and state go to every device together, as in Equinox's example of data
    parallelism."""
    mesh = _mesh("auto")
    everywhere = NamedSharding(mesh, P())
    optim = fq.sgd(1e-2, momentum=0.9)
    shapes = {"matrix": (64, 40), "bias": (5,)}
    model, grads = _model(shapes=shapes), _model(1, shapes=shapes)
    state = optim.init(model)

    def step(model, state, grads):
        model, state = eqx.filter_shard((model, state), everywhere)
        updates, state = optim.update(grads, state, model)
        model = eqx.apply_updates(model, updates)
        return eqx.filter_shard((model, state), everywhere)

    compiled = jax.jit(step)
    expected = compiled(model, state, grads)
    model, state, grads = eqx.filter_shard((model, state, grads), everywhere)
    with pytest.warns(UserWarning, match=r"update`.*\['bias'\]` and 1 more is on"):
        found = compiled(model, state, grads)
    _assert_equal(found, expected)
    eager = step(model, state, grads)
    assert len(eager[1].shardings) == 2
    for x in jtu.tree_leaves((found, eager)):
        assert x.sharding.is_equivalent_to(everywhere, x.ndim)


def test_another_mesh_than_the_states():
    shardings = _shardings(_mesh("auto"), _FSDP, _PAIR)
    state = _optim.init(_put(_model(names=_PAIR), shardings))
    shardings = _shardings(_mesh("auto", (2, 4)), _FSDP, _PAIR)
    model = _put(_model(names=_PAIR), shardings)
    with pytest.raises(ValueError, match=r"data=2, model=4.*data=4, model=2"):
        jax.jit(_optim.step)(model, state, model)
    with pytest.raises(ValueError, match=r"state at.*device_put"):
        _optim.step(model, state, model)


def test_wrong_shardings():
    mesh = _mesh("auto")
    model = _put(_model(), _shardings(mesh, _FSDP))
    with pytest.raises(TypeError, match=r"shardings=.*NamedSharding.*\['matrix'\]"):
        fq.adamw(1e-2, shardings={"matrix": P("data")})
    other = fq.adamw(1e-2, shardings=_shardings(mesh, _TENSOR))
    with pytest.raises(ValueError, match=r"sharded by.*'data'.*`shardings` has"):
        other.init(model)
    elsewhere = fq.adamw(1e-2, shardings=_shardings(_mesh("auto", (2, 4)), _FSDP))
    with pytest.raises(ValueError, match=r"on the mesh \(data=4.*\(data=2"):
        elsewhere.init(model)
    uneven = fq.adamw(1e-2, shardings=NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="6 is no multiple of 4"):
        jax.eval_shape(uneven.init, {"weight": jnp.zeros((6, 32), jnp.bfloat16)})
    with pytest.raises(ValueError, match="which has 0 axes"):
        uneven.init({"weight": jnp.zeros((), jnp.bfloat16)})


def test_one_device_in_a_process_with_many():
    """Asks for nothing."""
    model = _put(_model(names=("matrix",)), jax.devices()[3])
    state = jax.jit(_optim.init)(model)
    assert state.shardings == ()
    new, state = _step(model, state, model)
    assert new["matrix"].devices() == {jax.devices()[3]}


@_parametrize_types
@pytest.mark.parametrize("optim", [_optim, slow(fq.muon(1e-2))])
def test_a_mesh_of_one_device(optim, types):
    """Types on `Explicit` axes name these there too."""
    mesh = jax.make_mesh(
        (1,), ("data",), devices=jax.devices()[:1], axis_types=(_TYPES[types],)
    )
    shardings = _shardings(mesh, _FSDP, _PAIR)
    model, grads = (_model(seed, names=_PAIR) for seed in range(2))
    step = _step if optim is _optim else jax.jit(optim.step)
    expected = step(model, optim.init(model), grads)
    model, grads = _put(model, shardings), _put(grads, shardings)
    found = step(model, optim.init(model), grads)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert bool(np.all(np.asarray(x) == np.asarray(y)))
    for name, sharding in shardings.items():
        if types == "explicit":
            assert found[0][name].sharding.is_equivalent_to(sharding, model[name].ndim)


def test_some_leaves_nowhere_in_particular():
    """Arrays that were not put anywhere go wherever the program goes."""
    shardings = _shardings(_mesh("auto"), _FSDP)
    model = _model(names=_PAIR)
    model["matrix"] = _put(model["matrix"], shardings["matrix"])
    found = _train(_step, model, _optim.init(model), 1)
    _assert_equal(found, _on_one_device(1, _PAIR))


def test_numpy_and_back():
    shardings = _shardings(_mesh("auto"), _FSDP, _PAIR)
    model = _put(_model(names=_PAIR), shardings)
    state = _optim.init(model)
    where = jtu.tree_map(lambda x: x.sharding, state)
    model, state = jax.device_get(_train(_step, model, state, 2, shardings))
    model, state = _put(model, shardings), _put(state, where)
    for i in (2, 3):
        grads = _put(_model(i + 1, names=_PAIR), shardings)
        model, state = _step(model, state, grads)
    _assert_equal((model, state), _on_one_device(4, _PAIR))


#
# With the rest of JAX and Optax
#


def test_by_hand():
    """In a `shard_map` of the caller's, over all axes of the mesh or over some."""
    mesh = _mesh("auto")
    names = ("matrix",)
    model, grads = (_model(i, names=names) for i in (0, 1))
    expected = _step(model, _optim.init(model), grads)
    for spec, axes, by_hand in (
        (P("data", "model"), {"data", "model"}, P("data", "model")),
        (P("data", "model"), {"data"}, P("data")),
    ):
        sharding = NamedSharding(mesh, spec)
        placed = _put(model, sharding)
        state = _optim.init(placed)
        specs = jtu.tree_map(lambda x, s=by_hand: s if x.ndim else P(), (placed, state))
        step = jax.shard_map(
            _optim.step,
            mesh=mesh,
            in_specs=(*specs, by_hand),
            out_specs=specs,
            axis_names=axes,
            check_vma=False,
        )
        found = jax.jit(step)(placed, state, _put(grads, sharding))
        _assert_equal(found, expected)
        assert found[0]["matrix"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["lamb", "max_norm", "copies", "elementwise"])
def test_by_hand_of_whole_weights(name, check_vma):
    """In a `shard_map` of the caller's, norms would be those of parts. Copies of whole
    weights are no parts. Without types that say so, the state knows."""
    mesh, names = _mesh("auto"), ("matrix",)
    optim = fq.lamb(1e-2) if name in ("lamb", "copies") else _optim
    kwargs = {"max_norm": 1.0} if name == "max_norm" else {}
    spec = P() if name == "copies" else P("data")
    model, grads = (
        _put(_model(i, names=names), NamedSharding(mesh, spec)) for i in (0, 1)
    )
    state = optim.init(model)
    specs = jtu.tree_map(lambda x: spec if x.ndim else P(), (model, state))
    step = jax.shard_map(
        lambda *args: optim.step(*args, **kwargs),
        mesh=mesh,
        in_specs=(*specs, spec),
        out_specs=specs,
        check_vma=check_vma,
    )
    trace = lambda: jax.eval_shape(step, model, state, grads)
    if name in ("copies", "elementwise"):
        trace()
        return
    with pytest.warns(UserWarning, match="wrong for parts") as caught:
        trace()
    (message,) = {str(warning.message) for warning in caught}
    assert (
        "(...).step`: in a `shard_map`, the weight at `['matrix']` differs" in message
    )
    assert "along the mesh axes data." in message


@_parametrize_types
def test_filter_jit_and_scan(types):
    shardings = _shardings(_mesh(types), _BOTH, _PAIR)
    model = _put(_model(names=_PAIR), shardings)
    state = _optim.init(model)
    grads = [_put(_model(i + 1, names=_PAIR), shardings) for i in range(3)]

    @eqx.filter_jit(donate="all")
    def train(model, state):
        stacked = jtu.tree_map(lambda *x: jnp.stack(x), *grads)
        step = lambda carry, grad: (_optim.step(*carry, grad), None)
        return jax.lax.scan(step, (model, state), stacked)[0]

    _assert_equal(train(model, state), _on_one_device(3, _PAIR))


@pytest.mark.product
@_parametrize_pairs("wrap", [("nothing", "auto"), ("MultiSteps", "explicit")])
def test_updates(wrap, types):
    """Bit for bit: these compute nothing over all devices."""
    mesh, names = _mesh(types), ("matrix",)
    shardings = _shardings(mesh, _BOTH, names)
    optim = fq.adamw(1e-2) if wrap == "nothing" else fq.sgd(1e-2, momentum=0.9)
    if wrap == "MultiSteps":
        optim = optax.MultiSteps(optim, every_k_schedule=2)

    @jax.jit
    def step(model, state, grads):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optim.update(grads, state, model)
            return optax.apply_updates(model, updates), state

    def train(model, state, where):
        for i in range(4):
            grads = _put(_model(i + 1, names=names), where)
            model, state = step(model, state, grads)
        return model, state

    model = _model(names=names)
    expected = train(model, optim.init(model), None)
    model = _put(model, shardings)
    with jax.set_mesh(mesh):
        _assert_equal(train(model, optim.init(model), shardings), expected)


@pytest.mark.parametrize("types", ["auto", slow("explicit")])
def test_optax(types):
    """Clipping by the global norm and accumulation of gradients."""
    mesh, names = _mesh(types), ("matrix",)
    shardings = _shardings(mesh, _FSDP, names)
    ours = fq.sgd(1e-2, momentum=0.9)
    chain = optax.chain(optax.clip_by_global_norm(1.0), ours)
    optim = optax.MultiSteps(chain, every_k_schedule=2)
    model = _put(_model(names=names), shardings)

    @jax.jit
    def step(model, state, grads):
        # Optax promotes.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optim.update(grads, state, model)
            return optax.apply_updates(model, updates), state

    with jax.set_mesh(mesh):
        state = optim.init(model)
        for i in range(4):
            grads = _put(_model(i + 1, names=names), shardings)
            model, state = step(model, state, grads)
    expected, state = _model(names=names), optim.init(_model(names=names))
    for i in range(4):
        expected, state = step(expected, state, _model(i + 1, names=names))
    for name, weight in model.items():
        assert weight.sharding.is_equivalent_to(shardings[name], weight.ndim)
        # Sums of squares in another order: a unit of bfloat16, seldom.
        found, wanted = (np.asarray(x, np.float32) for x in (weight, expected[name]))
        assert np.allclose(found, wanted, rtol=2**-7, atol=1e-5)
        assert np.mean(found != wanted) <= 0.01


def test_serialisation(tmp_path):
    """Equinox's, into a state made on the mesh."""
    shardings = _shardings(_mesh("auto"), _FSDP, _PAIR)
    like = _put(_model(names=_PAIR), shardings)
    like = like, _optim.init(like)
    model, state = _train(_step, *like, 2, shardings)
    eqx.tree_serialise_leaves(tmp_path / "checkpoint.eqx", (model, state))
    read = eqx.tree_deserialise_leaves(tmp_path / "checkpoint.eqx", like)
    _assert_equal(read, (model, state))


@_parametrize_types
def test_decode_and_master_weights(types):
    mesh, names = _mesh(types), ("matrix", "ragged")
    shardings = _shardings(mesh, _BOTH, names)
    expected = _on_one_device(1, names)
    model = _put(expected[0], shardings)
    like = _optim.init(model)
    where = jtu.tree_map(lambda x: x.sharding, like)
    state = dataclasses.replace(expected[1], shardings=like.shardings)
    found = model, _put(state, where)
    masters = jax.jit(fq.master_weights)
    _assert_equal(masters(*found), masters(*expected))
    decode = jax.jit(lambda moments: {name: moments[name].decode() for name in names})
    decoded, expected = (decode(x[1].moments["mu"]) for x in (found, expected))
    _assert_equal(decoded, expected)
    with jax.set_mesh(mesh):
        _assert_equal(decode(found[1].moments["mu"]), expected)
        if types == "explicit":
            matrix = found[1].moments["mu"]["matrix"]
            _assert_equal(matrix.decode(), expected["matrix"])
