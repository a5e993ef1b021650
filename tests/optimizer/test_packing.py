"""Small arrays of a state as parts of common ones: the same numbers in fewer arrays."""

import copy
import dataclasses
import functools as ft
import pickle

import equinox as eqx
import flax.serialization
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import flashquinox as fq
from flashquinox._optimizer.states import unpacked
from flashquinox.checkpoint import Checkpoints

from ..helpers import array_of, assert_raises, OPTIMIZERS, slow, tree_identical


# Two leaves of each kind that have partial groups, a scalar; and one that is not small.
_SHAPES = {
    "matrix": (12, 64),
    "ragged": (37, 5),
    "kernel": (8, 3, 3, 3),
    "vector": (40,),
    "bias": (7,),
    "scalar": (),
    "large": (64, 80),
}
_PACKED = fq.Storage(pack_below=4096)


def _arrays(seed, dtype=jnp.bfloat16, shapes=_SHAPES):
    rng = np.random.default_rng(seed)
    return {
        name: array_of(rng.standard_normal(shape), dtype)
        for name, shape in shapes.items()
    }


def _fields(state):
    """The trees of a state, which show each array by itself."""
    return state.steps, state.moments, state.corrections, state.checksums


def _count(state):
    return len(jtu.tree_leaves(state))


def _two(make, params, steps):
    """What steps give from states that are packed and that are not."""
    return [
        steps(optim, params, optim.init(params))
        for optim in (make(storage=_PACKED), make(storage=fq.Storage()))
    ]


def _trained(optim, params, state, count=2):
    step = jax.jit(optim.step)
    for seed in range(1, count + 1):
        grads = jtu.tree_map(
            lambda x, seed=seed: x * jnp.asarray(0.1 * seed, x.dtype), params
        )
        params, state = step(params, state, grads)
    return params, state


def _assert_same(found, expected):
    (model, state), (expected_model, expected_state) = found, expected
    assert tree_identical(model, expected_model)
    assert tree_identical(_fields(state), _fields(expected_state))
    assert _count(state) < _count(expected_state)


#
# Steps
#


@pytest.mark.parametrize(
    "name",
    [slow(name, unless=name in ("adamw", "lion")) for name in OPTIMIZERS],
)
def test_steps_give_the_same_bits(name):
    """Of all rules, for weights of two dtypes."""
    params = _arrays(0)
    params |= {f"wide {k}": x.astype(jnp.float32) for k, x in _arrays(1).items()}
    make = ft.partial(OPTIMIZERS[name].make, 1e-2)
    found, expected = _two(make, params, _trained)
    if name == "adafactor":
        # A product and a sum are one operation in one of the programs.
        for key in params:
            ours, theirs = (
                np.asarray(x[0][key], np.float32) for x in (found, expected)
            )
            np.testing.assert_array_max_ulp(ours, theirs, maxulp=1)
        found = expected[0], found[1]
    _assert_same(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        slow({"verify_weights": "error"}, id="checksums"),
        slow({"skip_nonfinite": True}, id="skip"),
        slow({"storage": {"moments": "learned"}}, id="learned"),
        slow({"storage": {"master_weight_bits": None}}, id="alone"),
    ],
)
def test_options(options):
    stored = options.get("storage", {})
    rest = {k: x for k, x in options.items() if k != "storage"}
    params = _arrays(0)

    def make(storage):
        storage = fq.Storage(pack_below=storage.pack_below, **stored)
        return fq.adamw(1e-2, storage=storage, **rest)

    _assert_same(*_two(make, params, _trained))


@pytest.mark.once
def test_updates_of_optax():
    def steps(optim, params, state):
        optim = optax.chain(optax.clip_by_global_norm(1.0), optim)
        state = optim.init(params)
        updates, state = jax.jit(optim.update)(_arrays(1), state, params)
        return optax.apply_updates(params, updates), state[1]

    _assert_same(*_two(ft.partial(fq.adamw, 1e-2), _arrays(0), steps))


@pytest.mark.once
def test_ensembles():
    def steps(optim, params, _):
        params = jtu.tree_map(lambda x: jnp.stack([x, 2 * x, -x]), params)
        return _trained(optim, params, jax.vmap(optim.init)(params), count=0)

    def trained(optim, params, state):
        params, state = steps(optim, params, state)
        return jax.jit(jax.vmap(optim.step))(params, state, params)

    _assert_same(*_two(ft.partial(fq.adamw, 1e-2), _arrays(0), trained))


def test_loops():
    """A carry of `jax.lax.scan`: the structure of a state does not change."""

    def steps(optim, params, state):
        body = lambda carry, grads: (optim.step(*carry, grads), None)
        grads = jtu.tree_map(lambda *xs: jnp.stack(xs), _arrays(1), _arrays(2))
        return jax.jit(lambda *carry: lax.scan(body, carry, grads)[0])(params, state)

    _assert_same(*_two(ft.partial(fq.lion, 1e-2), _arrays(0), steps))


@pytest.mark.once
def test_gradient_release():
    loss = fq.LayeredLoss(
        blocks=lambda model: model["blocks"],
        prologue=lambda model, batch, key: batch @ model["in"],
        block=lambda own, x, batch, key: x + jnp.tanh(x @ own["w"] + own["b"][None]),
        epilogue=lambda model, x, batch, key: jnp.mean(
            (x @ model["out"]).astype(jnp.float32) ** 2
        ),
    )
    shapes = {"in": (8, 32), "out": (32, 8)}
    params = _arrays(0, shapes=shapes)
    params["blocks"] = _arrays(1, shapes={"w": (3, 32, 32), "b": (3, 32)})
    batch = _arrays(2, shapes={"x": (4, 8)})["x"]

    def released(optim, params, state):
        *new, _ = jax.jit(ft.partial(fq.release_step, optim, loss))(
            params, state, batch
        )
        return new

    _assert_same(*_two(ft.partial(fq.adamw, 1e-2), params, released))


@pytest.mark.once
def test_accumulation():
    params = _arrays(0, shapes={"a": (8, 32), "b": (32, 8)})

    def accumulated(optim, params, _):
        optim = fq.accumulate(optim, 2)
        model, state = _trained(optim, params, optim.init(params))
        return model, state.inner_state

    _assert_same(*_two(ft.partial(fq.adamw, 1e-2), params, accumulated))


@pytest.mark.once
def test_leaves_without_gradients():
    def steps(optim, params, state):
        grads = _arrays(1) | {"ragged": None, "bias": None}
        return jax.jit(optim.step)(params, state, grads)

    _assert_same(*_two(ft.partial(fq.adamw, 1e-2), _arrays(0), steps))


#
# What is packed
#


def test_arrays():
    """Of leaves that are stored alike, one array of each kind."""
    params = _arrays(0)
    state = fq.adamw(1e-2, storage=_PACKED).init(params)
    names = [jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(state)]
    large = [x for x in names if "large" in x]
    # Codes and scales of two moments, and a correction.
    assert len(large) == 5
    # Likewise of all others with groups; of vectors, moments in float32.
    assert [x for x in names if x not in large] == [
        ".steps.count",
        *[f".packed[{i}]" for i in range(5 + 3)],
    ]
    sizes = {x.size for x in jtu.tree_leaves(state) if x.dtype == jnp.float32}
    assert sizes == {sum(params[x].size for x in ("vector", "bias", "scalar"))}
    assert fq.adamw(1e-2).init(params).packing is None


def test_kinds():
    """Groups that a kernel takes apart are apart."""
    shapes = {"a": (12, 64), "b": (24, 32), "c": (4096,), "d": (4100,)}
    params, storage = _arrays(0, shapes=shapes), fq.Storage(pack_below=2**14)
    rows = fq.lion(1e-2, storage=storage, backend="tpu").init(params)
    are_consecutive = {
        k: x.layout.is_consecutive for k, x in rows.moments["mu"].items()
    }
    assert are_consecutive == {"a": False, "b": False, "c": True, "d": True}
    assert _count(rows) == 1 + 2 * 3


def test_shapes_and_dtypes():
    """Of a state without values."""
    optim, params = fq.adamw(1e-2, storage=_PACKED), _arrays(0)
    state = optim.init(params)
    structs = jax.eval_shape(optim.init, params)
    assert jtu.tree_structure(structs) == jtu.tree_structure(state)
    shapes = lambda tree: jtu.tree_map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(structs.moments) == shapes(state.moments)


def test_nothing_to_pack():
    """One leaf of each kind, or none that is small: a state like any other."""
    params = _arrays(0, shapes={"matrix": (12, 64), "vector": (40,)})
    for below in (4096, 4):
        optim = fq.adamw(1e-2, storage=fq.Storage(pack_below=below))
        assert tree_identical(optim.init(params), fq.adamw(1e-2).init(params))


@pytest.mark.parametrize("kind", [AxisType.Auto, slow(AxisType.Explicit)])
def test_meshes(kind):
    """What is divided stays by itself; what is everywhere is packed."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    specs = {"matrix": ("data",), "kernel": ("data",), "vector": ("data",)}
    there = {x: NamedSharding(mesh, PartitionSpec(*specs.get(x, ()))) for x in _SHAPES}
    params = jax.device_put(_arrays(0), there)
    found, expected = _two(ft.partial(fq.adamw, 1e-2), params, _trained)
    _assert_same(found, expected)
    for name in specs:
        for new, old in zip(found, expected, strict=True):
            tree = new if new is found[0] else new.corrections
            other = old if old is expected[0] else old.corrections
            assert tree[name].sharding == other[name].sharding
    assert not found[1].corrections["matrix"].sharding.is_fully_replicated


@pytest.mark.once
def test_host_memory():
    """A state there is not packed. One that is moved there stays there."""
    params = _arrays(0)
    optim = fq.adamw(1e-2, storage=_PACKED)
    away = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    state = optim.init(params)
    expected = _trained(optim, params, state)
    model, state = _trained(optim, params, jax.device_put(state, away))
    assert {x.sharding.memory_kind for x in jtu.tree_leaves(state)} == {"pinned_host"}
    here = jax.device_put(state, SingleDeviceSharding(jax.devices()[0]))
    assert tree_identical((model, here), expected)
    there = fq.adamw(1e-2, storage=_PACKED, state_memory="pinned_host")
    model = {f"{name}{i}": jnp.ones((512, 64)) for i in range(2) for name in "ab"}
    assert there.init(model).packing is None


@pytest.mark.once
def test_flax_nnx():
    """Each array of a state is in a `Variable` of its own there, and so is not
    packed."""
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1))
    )
    optim = fq.adamw(1e-2, storage=_PACKED)
    optimizer = nnx.Optimizer(model, optim, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 4)))))(model)
    for _ in range(2):
        optimizer.update(model, grads)
    assert optimizer.opt_state.packing is None


#
# Functions of states
#


@pytest.mark.once
def test_functions_of_states():
    params = _arrays(0)

    def steps(optim, params, state):
        params, state = _trained(optim, params, state)
        masters = fq.master_weights(params, state)
        doubled = jtu.tree_map(lambda x: 2 * x, masters)
        params, state = fq.from_master_weights(doubled, params, state)
        state = fq.map_moments(lambda x: x * 0.5, state, names="mu")
        return params, state

    _assert_same(*_two(ft.partial(fq.adamw, 1e-2), params, steps))


def test_map_params():
    params = _arrays(0)
    optim = fq.adamw(1e-2, storage=_PACKED)
    state = optim.init(params)
    ones = fq.map_params(optim, jnp.ones_like, state)
    assert jtu.tree_structure(ones) == jtu.tree_structure(state)
    assert all(np.all(x == 1) for x in jtu.tree_leaves(ones)[1:])
    # One value for all is that of the common array.
    flags = fq.map_params(
        optim, lambda _: True, state, transform_non_params=lambda _: False
    )
    assert jtu.tree_structure(flags) == jtu.tree_structure(state)
    assert jtu.tree_leaves(flags) == [False] + [True] * (_count(state) - 1)
    names = jtu.tree_map(lambda x: str(x.dtype), state)
    assert names.corrections["bias"] == "int8"


def test_copies():
    optim, params = fq.adamw(1e-2, storage=_PACKED), _arrays(0)
    count = lambda x: jnp.arange(x.size).reshape(x.shape).astype(x.dtype)
    state = jtu.tree_map(count, optim.init(params))
    for other in (
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        dataclasses.replace(state, corrections=state.corrections),
        jax.jit(lambda x: x)(state),
    ):
        assert tree_identical(other, state)
    # Other moments may be of other kinds.
    moments = {**state.moments, "mu": fq.lion(1e-2).init(params).moments["mu"]}
    other = dataclasses.replace(state, moments=moments)
    assert tree_identical(_fields(other)[1], moments)
    assert _count(other) < _count(fq.adamw(1e-2).init(params))


@pytest.mark.once
def test_checkpoints(tmp_path):
    """Those of states that are packed, and of those that are not, are the same."""
    params = _arrays(0)
    make = ft.partial(fq.adamw, 1e-2)
    (model, packed), (_, plain) = _two(make, params, _trained)
    with Checkpoints(tmp_path) as checkpoints:
        for step, state in enumerate((packed, plain)):
            checkpoints.save(step, model, state)
        for step in (0, 1):
            for state in (packed, plain):
                empty = jtu.tree_map(jnp.zeros_like, (model, state))
                found = checkpoints.restore(*empty, step=step)
                assert tree_identical(found, (model, state))
                like = jax.eval_shape(lambda *x: x, model, state)
                assert tree_identical(checkpoints.restore(*like, step=step), found)


def test_serialization(tmp_path):
    params = _arrays(0)
    make = ft.partial(fq.adamw, 1e-2)
    (_, packed), (_, plain) = _two(make, params, _trained)
    # Of Equinox: the arrays as they are.
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", packed)
    empty = jtu.tree_map(jnp.zeros_like, packed)
    assert tree_identical(
        eqx.tree_deserialise_leaves(tmp_path / "state.eqx", empty), packed
    )
    # Of Flax: by their names.
    stored = flax.serialization.to_bytes(plain)
    assert flax.serialization.to_bytes(packed) == stored
    assert tree_identical(flax.serialization.from_bytes(empty, stored), packed)


#
# Errors
#


def test_errors():
    for value in (-1, True):
        assert_raises(
            ValueError, lambda value=value: fq.Storage(pack_below=value), "pack_below"
        )
    assert repr(_PACKED) == "Storage(pack_below=4096)"
    # A leaf is called by its name, and what was donated is said to be.
    optim, params = fq.adamw(1e-2, storage=_PACKED), _arrays(0)
    state = optim.init(params)
    other = _arrays(0, shapes=_SHAPES | {"ragged": (37, 6)})
    assert_raises(
        ValueError, lambda: optim.step(other, state, other), "ragged", "(37, 5)"
    )
    jtu.tree_leaves(state)[-1].delete()
    assert_raises(
        RuntimeError, lambda: optim.step(params, state, params), "state", "donated"
    )


#
# What a review found
#


def test_a_state_that_programs_close_over():
    """Each opens it in its own trace."""
    optim, params = fq.adamw(1e-2, storage=_PACKED), _arrays(0)
    state = jax.jit(lambda x: x)(optim.init(params))
    expected = _trained(optim, params, optim.init(params), count=1)
    jax.eval_shape(lambda params: optim.step(params, state, params), params)
    jax.jit(lambda: fq.master_weights(params, state))()
    lax.cond(True, lambda: optim.step(params, state, params), lambda: (params, state))
    assert tree_identical(_trained(optim, params, state, count=1), expected)


def test_parts_keep_their_dtypes():
    optim, params = fq.adamw(1e-2, storage=_PACKED), _arrays(0)
    state = optim.init(params)
    wide = state.corrections | {"matrix": state.corrections["matrix"].astype(jnp.int16)}
    other = dataclasses.replace(state, corrections=wide)
    assert tree_identical(other.corrections, wide)
    assert tree_identical(other.moments, state.moments)


def test_functions_of_common_arrays():
    """Whatever they make of them: a state can be looked at and copied."""
    optim, params = fq.adamw(1e-2, storage=_PACKED), _arrays(0)
    state = optim.init(params)
    for function in (
        jnp.sum,
        lambda x: x[..., None],
        lambda _: None,
        lambda x: x.shape,
    ):
        other = jtu.tree_map(function, state)
        assert repr(other)
        assert jtu.tree_structure(copy.deepcopy(other)) == jtu.tree_structure(other)


def test_masks(tmp_path):
    """A file does not say how leaves are trained: it is read with another mask too."""
    params = _arrays(0, shapes={name: (12, 64) for name in "abcd"})

    def steps(optim, params, _):
        masked = lambda names: optim(mask={name: name in names for name in params})
        file = tmp_path / "state.eqx"
        _, state = _trained(old := masked("ab"), params, old.init(params))
        eqx.tree_serialise_leaves(file, state)
        new = masked("ac")
        state = eqx.tree_deserialise_leaves(file, new.init(params))
        return _trained(new, params, state)

    make = ft.partial(ft.partial, fq.adamw, 1e-2, weight_decay=0.1)
    packed, alone = make(storage=_PACKED), make(storage=fq.Storage())
    _assert_same(steps(packed, params, None), steps(alone, params, None))


def test_modules_are_copied():
    """Structures of Equinox's modules, which compare some things by identity."""
    model = eqx.nn.MLP(4, 4, 4, 2, key=jax.random.key(0))
    optim = fq.adamw(1e-2, storage=_PACKED)
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert tree_identical(other, state)
        assert tree_identical(other.moments, state.moments)


def test_members_of_an_ensemble_that_is_packed_again():
    params = jtu.tree_map(lambda x: jnp.stack([x, -x]), _arrays(0))
    optim = fq.adamw(1e-2, storage=_PACKED)
    state = jax.vmap(optim.init)(params)
    fewer = dataclasses.replace(state, corrections=state.corrections | {"matrix": None})
    assert fewer.packing is not None
    again = dataclasses.replace(fewer, corrections=state.corrections)
    assert tree_identical(_fields(again), _fields(state))
    assert {x.shape[0] for x in jtu.tree_leaves(fewer)} == {2}


def test_divisions_that_an_optimizer_was_told():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    there = {name: NamedSharding(mesh, PartitionSpec()) for name in "abcd"}
    there["c"] = there["d"] = NamedSharding(mesh, PartitionSpec("data"))
    params = _arrays(0, shapes={name: (64, 64) for name in "abcd"})
    params = jax.device_put(params, there)
    optim = fq.adamw(1e-2, storage=fq.Storage(pack_below=2**16), shardings=there)
    state = optim.init(params)
    assert _count(state) == 1 + 3 * 5
    structs = jax.eval_shape(optim.init, params)
    assert jtu.tree_structure(structs) == jtu.tree_structure(state)


def test_divided_afterwards():
    """By `map_params`, leaf by leaf: leaves that are divided are packed no more."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    there = {name: everywhere for name in _SHAPES}
    there["matrix"] = NamedSharding(mesh, PartitionSpec("data"))
    optim, params = fq.adamw(1e-2, storage=_PACKED), _arrays(0)
    state = optim.init(params)
    moved = fq.map_params(
        optim,
        jax.device_put,
        state,
        there,
        transform_non_params=lambda x: jax.device_put(x, everywhere),
    )
    assert moved.corrections["matrix"].sharding.spec == PartitionSpec("data")
    assert tree_identical(_fields(moved), _fields(state))
    # Shardings themselves are those of leaves, and no state of common arrays.
    wanted = fq.map_params(optim, lambda _, sharding: sharding, state, there)
    assert wanted.corrections["matrix"] == there["matrix"]


def test_divisions_that_are_not_known():
    """Within a compiled program, on a mesh with automatic axes."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    by_rows = NamedSharding(mesh, PartitionSpec("data"))
    shapes = {name: (64, 64) for name in "abcd"}
    params = jax.device_put(_arrays(0, shapes=shapes), by_rows)
    optim = fq.adamw(1e-2, storage=_PACKED)
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="not known"):
        state = jax.jit(optim.init)(params)
    alone = optim.init(params)
    assert alone.packing is None
    assert jtu.tree_structure(_fields(state)) == jtu.tree_structure(_fields(alone))
    assert state.packing is None


def test_shapes_and_dtypes_know_where_they_are():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = fq.adamw(1e-2, storage=_PACKED).init(_arrays(0))
    structs = jtu.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state
    )
    for x in jtu.tree_leaves(_fields(structs)):
        assert x.sharding == everywhere
    apart, packed = unpacked(structs)
    assert tree_identical(packed(apart), structs)


@pytest.mark.parametrize("kind", [AxisType.Auto, slow(AxisType.Explicit)])
def test_members_on_several_devices(kind):
    """An ensemble whose members are divided stays packed: all of a member is on one
    device."""
    mesh = jax.make_mesh((4,), ("members",), axis_types=(kind,))
    params = jtu.tree_map(lambda x: jnp.stack([x, -x, x, -x]), _arrays(0))
    optim = fq.adamw(1e-2, storage=_PACKED)
    there = NamedSharding(mesh, PartitionSpec("members"))
    state = jax.device_put(jax.vmap(optim.init)(params), there)
    structure = jtu.tree_structure(state)
    for new in (
        dataclasses.replace(state, steps=state.steps),
        fq.map_params(optim, lambda x: x, state),
        jax.jit(lambda x: dataclasses.replace(x, steps=x.steps))(state),
    ):
        assert jtu.tree_structure(new) == structure
        assert tree_identical(_fields(new), _fields(state))
        for x in jtu.tree_leaves(new):
            assert x.sharding.is_equivalent_to(there, x.ndim)


@pytest.mark.once
def test_donated_members(tmp_path):
    """A state that was donated says so of each array, and a checkpoint is restored to
    one like it."""
    mesh = jax.make_mesh((4,), ("members",), axis_types=(AxisType.Auto,))
    there = NamedSharding(mesh, PartitionSpec("members"))
    optim = fq.adamw(1e-2, storage=_PACKED)
    one = _arrays(0)
    several = jtu.tree_map(lambda x: jnp.stack([x, -x, x, -x]), one)
    for name, model, state in (
        ("one", one, optim.init(one)),
        ("several", *jax.device_put((several, jax.vmap(optim.init)(several)), there)),
    ):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(0, model, state)
            # Whose trees nobody has asked for.
            gone = jtu.tree_map(lambda x: jax.device_put(x, may_alias=False), state)
            for x in jtu.tree_leaves(gone):
                x.delete()
            assert all(x.is_deleted() for x in jtu.tree_leaves(gone.moments))
            shapes = lambda tree: jtu.tree_map(lambda y: (y.shape, y.sharding), tree)
            assert shapes(gone.moments) == shapes(state.moments)
            again = dataclasses.replace(gone, steps=gone.steps)
            assert jtu.tree_structure(again) == jtu.tree_structure(state)
            with pytest.raises(TypeError, match="donated"):
                checkpoints.save(1, model, gone)
            _, restored = checkpoints.restore(model, gone)[:2]
        assert tree_identical(restored, state)


@pytest.mark.usefixtures("without_typechecker")
def test_numpy_keeps_its_dtypes():
    state = fq.adamw(1e-2, storage=_PACKED).init(_arrays(0))
    wide = jtu.tree_map(lambda x: np.asarray(x, np.float64), state)
    again = dataclasses.replace(wide, steps=wide.steps)
    for x in jtu.tree_leaves((wide.moments, wide.corrections, again)):
        assert type(x) is np.ndarray and x.dtype == np.float64
    assert tree_identical(again, wide)


def test_small_is_a_member():
    """Not all members: an ensemble that is packed again has the leaves together that
    one of its members has."""
    params = jtu.tree_map(lambda x: jnp.stack([x] * 100), _arrays(0))
    state = jax.vmap(fq.adamw(1e-2, storage=_PACKED).init)(params)
    alone = {k: x for k, x in state.corrections.items() if k != "vector"}
    fewer = dataclasses.replace(state, corrections=alone | {"vector": None})
    again = dataclasses.replace(fewer, corrections=state.corrections)
    assert jtu.tree_structure(again) == jtu.tree_structure(state)
