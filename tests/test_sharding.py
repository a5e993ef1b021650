"""Weights and state that are divided among devices: eight of the CPU."""

import contextlib
import dataclasses
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

from .helpers import Case, Storage


_SHAPES = {
    "matrix": (256, 512),
    "stack": (4, 64, 128),
    "bias": (512,),
    "vector": (8192,),
    # Partial groups.
    "ragged": (256, 40),
    "scalar": (),
}
_FSDP = {
    "matrix": P("data"),
    "stack": P(None, "data"),
    "bias": P("data"),
    "vector": P("data"),
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
    "vector": P(("data", "model")),
    "ragged": P(("model", "data"), None),
}
_LAYERS = {"stack": P("data"), "vector": P("model")}
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


def _mesh(types: str, shape=(4, 2)):
    kinds = (_TYPES[types],) * len(shape)
    return jax.make_mesh(shape, ("data", "model"), axis_types=kinds)


def _shardings(mesh, specs):
    return {name: NamedSharding(mesh, specs.get(name, P())) for name in _SHAPES}


def _model(seed: int = 0, dtype=jnp.bfloat16, shapes=_SHAPES):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32).astype(dtype)
        for name, shape in shapes.items()
    }


def _on_one_device(tree):
    return jtu.tree_map(jnp.asarray, jax.device_get(tree))


def _train(optim, model, state, steps, shardings=None):
    step = jax.jit(optim.step, donate_argnums=(0, 1))
    for i in range(steps):
        grads = _model(i + 1)
        if shardings is not None:
            grads = jax.device_put(grads, shardings)
        model, state = step(model, state, grads)
    return model, state


def _assert_equal(found, expected):
    assert len(jtu.tree_leaves(found)) == len(jtu.tree_leaves(expected))
    for x, y in zip(jtu.tree_leaves(found), jtu.tree_leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(np.asarray(x), np.asarray(y))


#
# The same bits as on one device
#


@_parametrize_types
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_trains_as_on_one_device(layout, types):
    """No groups here lie in two parts, so that the state is that of one device too."""
    shardings = _shardings(_mesh(types), _LAYOUTS[layout])
    optim = fq.adamw(1e-2, weight_decay=0.1)
    model = jax.device_put(_model(), shardings)
    state = optim.init(model)
    expected = _train(optim, _model(), optim.init(_model()), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = _train(optim, model, state, 20, shardings)
    _assert_equal(found, expected)
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
    shardings = _shardings(_mesh("auto"), _BOTH)
    optim = case.optimizer(1e-2)
    first = _model(dtype=case.storage.dtype)
    model = jax.device_put(first, shardings)
    state = optim.init(model)
    expected = _train(optim, _model(dtype=case.storage.dtype), optim.init(first), 3)
    _assert_equal(_train(optim, model, state, 3, shardings), expected)


@pytest.mark.parametrize(
    "backend, types, layout",
    [("tpu", "auto", "fsdp"), ("gpu", "auto", "fsdp"), ("gpu", "explicit", "2-D")],
)
def test_kernels(backend, types, layout):
    """Interpreted, each device its own."""
    names = ("matrix", "bias")
    shapes = {"matrix": (128, 256), "bias": (512,)}
    shardings = _shardings(_mesh(types), _LAYOUTS[layout])
    shardings = {name: shardings[name] for name in names}
    optim = fq.adamw(1e-2, backend=backend)
    model, grads = _model(0, shapes=shapes), _model(1, shapes=shapes)
    step = jax.jit(optim.step)
    expected = step(model, optim.init(model), grads)
    model = jax.device_put(model, shardings)
    _assert_equal(step(model, optim.init(model), grads), expected)


#
# What is compiled
#


@_parametrize_types
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_devices_do_not_communicate(layout, types):
    """Nor is there anything of the size of a leaf that is divided; and all is in
    place."""
    shardings = _shardings(_mesh(types), _LAYOUTS[layout])
    optim = fq.adamw(1e-2)
    model = jax.device_put(_model(), shardings)
    state = optim.init(model)
    step = jax.jit(optim.step, donate_argnums=(0, 1))
    compiled = step.lower(model, state, model).compile()
    text = compiled.as_text() or ""
    assert not _COLLECTIVES.search(text)
    for name in ("matrix", "stack", "ragged"):
        if any(shardings[name].spec):
            assert f"[{','.join(map(str, _SHAPES[name]))}]" not in text
    memory = compiled.memory_analysis()
    kept = sum(
        x.addressable_shards[0].data.nbytes for x in jtu.tree_leaves((model, state))
    )
    assert memory.alias_size_in_bytes >= kept
    # The backend of CPUs has temporaries of what each device has.
    parts = sum(x.addressable_shards[0].data.size for x in model.values())
    assert memory.temp_size_in_bytes <= 20 * parts


def test_a_gradient_of_another_sharding():
    """It is moved, and nothing else."""
    for types in _TYPES:
        shardings = _shardings(_mesh(types), _FSDP)
        optim = fq.adamw(1e-2)
        model = jax.device_put(_model(), shardings)
        state = optim.init(model)
        grads = jax.device_put(_model(1), _shardings(_mesh(types), _TENSOR))
        moved = jax.device_put(grads, shardings)
        for step in (optim.step, jax.jit(optim.step)):
            found, expected = (step(model, state, x) for x in (grads, moved))
            _assert_equal(found, expected)


@_parametrize_types
def test_skip_nonfinite_is_one_collective(types):
    shardings = _shardings(_mesh(types), _FSDP)
    optim = fq.adamw(1e-2, skip_nonfinite=True)
    model = jax.device_put(_model(), shardings)
    state = optim.init(model)
    step = jax.jit(optim.step)
    text = step.lower(model, state, model).compile().as_text()
    # Of arrays, or of tuples of them.
    assert len(re.findall(r"[ )]all-reduce(?:-start)?\(", text)) == 1
    assert len(set(_COLLECTIVES.findall(text))) == 1
    grads = _model(1)
    grads["matrix"] = grads["matrix"].at[200, 3].set(jnp.nan)
    unchanged = step(model, state, jax.device_put(grads, shardings))
    _assert_equal(unchanged, (model, state))
    _assert_equal(
        step(model, state, jax.device_put(_model(1), shardings)),
        jax.jit(fq.adamw(1e-2).step)(model, state, _model(1)),
    )


#
# Groups
#


def test_groups_lie_along_an_axis_that_parts_hold_whole():
    model = {"wide": jnp.zeros((96, 64), jnp.bfloat16)}
    for spec, axis in ((P("data"), -1), (P(None, "data"), -2), (P(), -1)):
        sharding = NamedSharding(_mesh("auto"), spec)
        state = fq.adamw(1e-2).init(jax.device_put(model, sharding))
        assert state.moments["mu"]["wide"].axis == axis


@_parametrize_types
@pytest.mark.parametrize("moments", ["flashquinox", "flashoptim"])
def test_groups_in_two_parts(moments, types):
    """No axis will do, or the codec flattens: it says so, and is right."""
    shapes = {"matrix": (96, 48)}
    sharding = NamedSharding(_mesh(types), P("data", "model"))
    optim = fq.adamw(1e-2, moments=moments)
    model, grads = _model(0, shapes=shapes), _model(1, shapes=shapes)
    step = jax.jit(optim.step)
    expected = step(model, optim.init(model), grads)
    model = jax.device_put(model, sharding)
    with pytest.warns(UserWarning, match=r"\['matrix'\].*gathers it"):
        state = optim.init(model)
    with pytest.warns(UserWarning, match=r"\['matrix'\].*gathers it"):
        found = step(model, state, jax.device_put(grads, sharding))
    _assert_equal(found, expected)
    assert found[0]["matrix"].sharding.is_equivalent_to(sharding, 2)


#
# Where the sharding is known from
#


@_parametrize_types
def test_init_in_jit_that_is_told(types):
    """With and without a mesh that is set."""
    mesh = _mesh(types)
    shardings = _shardings(mesh, _FSDP)
    optim = fq.adamw(1e-2, shardings=shardings)
    model = jax.device_put(_model(), shardings)
    expected = optim.init(model)
    _is_divided((model, expected), shardings)
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with context:
            state = jax.jit(optim.init)(model)
            _assert_equal(state, expected)
            _is_divided((model, state), shardings)
            jax.jit(optim.step)(model, state, model)


@_parametrize_types
def test_state_that_is_nowhere(types):
    """It goes where the weights are, if that is known."""
    shardings = _shardings(_mesh(types), _FSDP)
    optim = fq.adamw(1e-2)
    model, state = optim.step(_model(), optim.init(_model()), _model(1))
    # Compiled as a whole, scalars of the step may be rounded differently.
    compiled = jax.jit(optim.step)
    expected, of_compiled = (x(model, state, _model(2)) for x in (optim.step, compiled))
    model = jax.device_put(model, shardings)
    grads = jax.device_put(_model(2), shardings)
    found = optim.step(model, state, grads)
    _assert_equal(found, expected)
    _is_divided(found, shardings)
    if types == "explicit":
        for where in (lambda x: x, jax.device_get):
            _assert_equal(compiled(model, where(state), grads), of_compiled)


_UNKNOWN = (
    r"`adamw\(\.\.\.\)\.{}`.*\['bias'\]` and \d more is on the mesh.*`shardings=\.\.\.`"
)


def test_init_in_jit():
    shardings = _shardings(_mesh("auto"), _FSDP)
    optim = fq.adamw(1e-2)
    model = jax.device_put(_model(), shardings)
    with pytest.warns(UserWarning, match=_UNKNOWN.format("init")) as warned:
        state = jax.jit(optim.init)(model)
    assert len(warned) == 1
    assert state.shardings == ()
    _assert_equal(state, optim.init(_model()))
    told = fq.adamw(1e-2, shardings=shardings)
    state = jax.jit(told.init)(model)
    _assert_equal(state, optim.init(model))
    _is_divided((model, state), shardings)
    with jax.set_mesh(_mesh("explicit")):
        shardings = _shardings(_mesh("explicit"), _FSDP)
        model = jax.device_put(_model(), shardings)
        make = jax.jit(lambda model: (model, optim.init(model)))
        _is_divided(make(model), shardings)


@pytest.mark.parametrize(
    "layout, backend", [("replicated", "auto"), ("2-D", "auto"), ("2-D", "gpu")]
)
def test_state_that_knows_nothing(layout, backend):
    """XLA divides the step: without kernels, with the same results, and without
    collectives where parts hold whole groups."""
    shardings = _shardings(_mesh("auto"), _LAYOUTS[layout])
    optim = fq.adamw(1e-2, backend=backend)
    names = ("matrix", "stack", "bias")
    model, grads = ({name: _model(i)[name] for name in names} for i in (0, 1))
    shardings = {name: shardings[name] for name in names}
    state = optim.init(model)
    expected = jax.jit(fq.adamw(1e-2).step)(model, state, grads)
    model, grads = jax.device_put((model, grads), (shardings, shardings))
    made = optim.init(model)
    unknowing = dataclasses.replace(made, shardings=())
    with pytest.warns(UserWarning, match=_UNKNOWN.format("step")) as warned:
        compiled = jax.jit(optim.step).lower(model, unknowing, grads).compile()
    assert len(warned) == 1
    text = compiled.as_text() or ""
    assert not _COLLECTIVES.search(text)
    found = compiled(model, unknowing, grads)
    _assert_equal(found, expected)
    _is_divided(found, shardings)
    # Outside, all is seen.
    _, state = optim.step(model, unknowing, grads)
    assert state.shardings == made.shardings


def test_mesh_of_both_types():
    """What is known in part is refused."""
    types = AxisType.Auto, AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    model = {"w": jax.device_put(jnp.zeros((64, 64)), NamedSharding(mesh, P("data")))}
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
    shardings = _shardings(_mesh("auto"), _FSDP)
    optim = fq.adamw(1e-2)
    here = optim.init(_model())
    there = optim.init(jax.device_put(_model(), shardings))
    assert jtu.tree_structure(here) != jtu.tree_structure(there)
    here = dataclasses.replace(here, shardings=there.shardings)
    moved = jtu.tree_map(lambda x, like: jax.device_put(x, like.sharding), here, there)
    _assert_equal(moved, there)
    where = jtu.tree_map(lambda x: x.sharding, there)
    _is_divided((jax.device_put(_model(), shardings), moved), shardings)
    _assert_equal(jax.device_put(here, where), there)


@pytest.mark.parametrize("compiled", [True, False])
def test_filter_shard_after_init(compiled):
    """Model and state go to every device together, as in Equinox's example of data
    parallelism."""
    mesh = _mesh("auto")
    everywhere = NamedSharding(mesh, P())
    optim = fq.adamw(1e-2)
    shapes = {"matrix": (64, 40), "bias": (5,)}
    model, grads = _model(shapes=shapes), _model(1, shapes=shapes)
    state = optim.init(model)

    def step(model, state, grads):
        model, state = eqx.filter_shard((model, state), everywhere)
        updates, state = optim.update(grads, state, model)
        model = eqx.apply_updates(model, updates)
        return eqx.filter_shard((model, state), everywhere)

    expected = jax.jit(step)(model, state, grads)
    model, state, grads = eqx.filter_shard((model, state, grads), everywhere)
    if compiled:
        with pytest.warns(UserWarning, match=r"update`.*\['bias'\]` and 1 more is on"):
            found = jax.jit(step)(model, state, grads)
        _assert_equal(found, expected)
    else:
        found = step(model, state, grads)
        assert len(found[1].shardings) == 2
    for x in jtu.tree_leaves(found):
        assert x.sharding.is_equivalent_to(everywhere, x.ndim)


def test_another_mesh_than_the_states():
    optim = fq.adamw(1e-2)
    state = optim.init(jax.device_put(_model(), _shardings(_mesh("auto"), _FSDP)))
    shardings = _shardings(_mesh("auto", (2, 4)), _FSDP)
    model = jax.device_put(_model(), shardings)
    with pytest.raises(ValueError, match=r"data=2, model=4.*data=4, model=2"):
        jax.jit(optim.step)(model, state, model)
    with pytest.raises(ValueError, match=r"state at.*device_put"):
        optim.step(model, state, model)


def test_wrong_shardings():
    mesh = _mesh("auto")
    model = jax.device_put(_model(), _shardings(mesh, _FSDP))
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
    optim = fq.adamw(1e-2)
    model = jax.device_put(_model(), jax.devices()[3])
    state = jax.jit(optim.init)(model)
    assert state.shardings == ()
    new, state = jax.jit(optim.step)(model, state, model)
    assert new["matrix"].devices() == {jax.devices()[3]}


def test_some_leaves_nowhere_in_particular():
    """Arrays that were not put anywhere go wherever the program goes."""
    shardings = _shardings(_mesh("auto"), _FSDP)
    optim = fq.adamw(1e-2)
    model = _model()
    expected = _train(optim, _model(), optim.init(model), 3)
    model["matrix"] = jax.device_put(model["matrix"], shardings["matrix"])
    model, state = _train(optim, model, optim.init(model), 3)
    _assert_equal((model, state), expected)


def test_numpy_and_back():
    shardings = _shardings(_mesh("auto"), _FSDP)
    optim = fq.adamw(1e-2)
    model = jax.device_put(_model(), shardings)
    state = optim.init(model)
    expected = _train(optim, _model(), optim.init(_model()), 4)
    model, state = jax.device_get(_train(optim, model, state, 2, shardings))
    where = jtu.tree_map(
        lambda x: x.sharding,
        (model0 := optim.init(jax.device_put(_model(), shardings))),
    )
    del model0
    model, state = jax.device_put(model, shardings), jax.device_put(state, where)
    step = jax.jit(optim.step)
    for i in (2, 3):
        model, state = step(model, state, jax.device_put(_model(i + 1), shardings))
    _assert_equal((model, state), expected)


#
# With the rest of JAX and Optax
#


def test_by_hand():
    """In a `shard_map` of the caller's, over all axes of the mesh or over some."""
    mesh = _mesh("auto")
    shapes = {"matrix": (256, 512)}
    optim = fq.adamw(1e-2)
    model, grads = _model(0, shapes=shapes), _model(1, shapes=shapes)
    expected = jax.jit(optim.step)(model, optim.init(model), grads)
    for spec, axes, by_hand in (
        (P("data", "model"), {"data", "model"}, P("data", "model")),
        (P("data", "model"), {"data"}, P("data")),
    ):
        sharding = NamedSharding(mesh, spec)
        placed = jax.device_put(model, sharding)
        state = optim.init(placed)
        specs = jtu.tree_map(lambda x, s=by_hand: s if x.ndim else P(), (placed, state))
        step = jax.shard_map(
            optim.step,
            mesh=mesh,
            in_specs=(*specs, by_hand),
            out_specs=specs,
            axis_names=axes,
            check_vma=False,
        )
        found = jax.jit(step)(placed, state, jax.device_put(grads, sharding))
        _assert_equal(found, expected)
        assert found[0]["matrix"].sharding.is_equivalent_to(sharding, 2)


@_parametrize_types
def test_filter_jit_and_scan(types):
    shardings = _shardings(_mesh(types), _BOTH)
    optim = fq.adamw(1e-2)
    model = jax.device_put(_model(), shardings)
    state = optim.init(model)
    grads = [jax.device_put(_model(i + 1), shardings) for i in range(3)]
    expected = _train(optim, _model(), optim.init(_model()), 3)

    @eqx.filter_jit(donate="all")
    def train(model, state):
        stacked = jtu.tree_map(lambda *x: jnp.stack(x), *grads)
        step = lambda carry, grad: (optim.step(*carry, grad), None)
        return jax.lax.scan(step, (model, state), stacked)[0]

    _assert_equal(train(model, state), expected)


@_parametrize_types
@pytest.mark.parametrize("wrap", ["nothing", "MultiSteps"])
def test_updates(wrap, types):
    """Bit for bit: these compute nothing over all devices."""
    mesh = _mesh(types)
    shardings = _shardings(mesh, _BOTH)
    optim = fq.adamw(1e-2)
    if wrap == "MultiSteps":
        optim = optax.MultiSteps(optim, every_k_schedule=2)

    @jax.jit
    def step(model, state, grads):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optim.update(grads, state, model)
            return optax.apply_updates(model, updates), state

    def train(model, state, where):
        for i in range(4):
            grads = jax.device_put(_model(i + 1), where)
            model, state = step(model, state, grads)
        return model, state

    expected = train(_model(), optim.init(_model()), None)
    model = jax.device_put(_model(), shardings)
    with jax.set_mesh(mesh):
        _assert_equal(train(model, optim.init(model), shardings), expected)


@_parametrize_types
def test_optax(types):
    """Clipping by the global norm and accumulation of gradients."""
    mesh = _mesh(types)
    shardings = _shardings(mesh, _FSDP)
    chain = optax.chain(optax.clip_by_global_norm(1.0), fq.adamw(1e-2))
    optim = optax.MultiSteps(chain, every_k_schedule=2)
    model = jax.device_put(_model(), shardings)

    @jax.jit
    def step(model, state, grads):
        # Optax promotes.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optim.update(grads, state, model)
            return optax.apply_updates(model, updates), state

    with jax.set_mesh(mesh):
        state = optim.init(model)
        for i in range(4):
            grads = jax.device_put(_model(i + 1), shardings)
            model, state = step(model, state, grads)
    expected, state = _model(), optim.init(_model())
    for i in range(4):
        expected, state = step(expected, state, _model(i + 1))
    for name, weight in model.items():
        assert weight.sharding.is_equivalent_to(shardings[name], weight.ndim)
        # Sums of squares in another order: a unit of bfloat16, seldom.
        found, wanted = (np.asarray(x, np.float32) for x in (weight, expected[name]))
        assert np.allclose(found, wanted, rtol=2**-7, atol=1e-5)
        assert np.mean(found != wanted) <= 0.01


def test_serialisation(tmp_path):
    """Equinox's, into a state made on the mesh."""
    shardings = _shardings(_mesh("auto"), _FSDP)
    optim = fq.adamw(1e-2)
    like = jax.device_put(_model(), shardings)
    like = like, optim.init(like)
    model, state = _train(optim, *jtu.tree_map(jnp.copy, like), 2, shardings)
    eqx.tree_serialise_leaves(tmp_path / "checkpoint.eqx", (model, state))
    read = eqx.tree_deserialise_leaves(tmp_path / "checkpoint.eqx", like)
    _assert_equal(read, (model, state))


def test_decode_and_master_weights():
    for types in _TYPES:
        mesh = _mesh(types)
        shardings = _shardings(mesh, _BOTH)
        optim = fq.adamw(1e-2)
        expected = optim.step(_model(), optim.init(_model()), _model(1))
        model = jax.device_put(_model(), shardings)
        found = optim.step(
            model, optim.init(model), jax.device_put(_model(1), shardings)
        )
        _assert_equal(fq.master_weights(*found), fq.master_weights(*expected))
        with jax.set_mesh(mesh):
            for name in ("matrix", "stack", "ragged"):
                moments = (x[1].moments["nu"][name] for x in (found, expected))
                _assert_equal(*(x.decode() for x in moments))
