"""Gradient release with its state in host memory: the same bits, and what lets XLA copy
layers while others are computed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq
from flashquinox._optimizer import state_memory
from flashquinox._release.host_layers import first_gradient, halves, second_half

from ..helpers import slow
from .test_release import _batch, _loss, _model


AWAY = "pinned_host"


@pytest.fixture(autouse=True)
def _small_leaves(monkeypatch):
    monkeypatch.setattr(state_memory, "_SMALL", 2**5)


def _kinds(tree):
    arrays = jtu.tree_leaves(eqx.filter(tree, eqx.is_array))
    return [x.sharding.memory_kind for x in arrays]


def _train(make, model, batch, keys, **options):
    """For each memory, what two steps make of a model."""
    found = []
    for memory in ("device", AWAY):
        optim = make(state_memory=memory)
        state = optim.init(model)

        @eqx.filter_jit(donate="none")
        def step(model, state, key, optim=optim):
            return fq.release_step(optim, _loss, model, state, batch, key, **options)

        new, kinds, value = (model, state), _kinds(state), None
        assert (AWAY in kinds) == (memory == AWAY)
        for key in keys:
            *new, value = step(*new, key)
        assert _kinds(new[1]) == kinds
        found.append((new, value))
    return found


def _assert_same(here, away):
    pairs = map(
        jtu.tree_leaves,
        (eqx.filter(here, eqx.is_array), eqx.filter(away, eqx.is_array)),
    )
    for x, y in zip(*pairs, strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        assert x.sharding.is_equivalent_to(
            y.sharding.with_memory_kind(x.sharding.memory_kind), x.ndim
        )


@pytest.mark.once
@pytest.mark.parametrize(
    "layers, odd, options, max_norm",
    [
        # Layers whose groups they share wait; keys, integers and functions go along.
        (3, True, {}, None),
        slow(1, False, {}, None),
        slow(2, False, {"skip_nonfinite": True}, 0.1),
    ],
)
def test_same_bits(layers, odd, options, max_norm):
    make = lambda **kwargs: fq.lion(1e-2, weight_decay=0.1, **options, **kwargs)
    model = _model(layers=layers, odd=odd)
    keys = [jax.random.key(0)] if odd else [None, None]
    _assert_same(*_train(make, model, _batch(), keys, max_norm=max_norm))


@pytest.mark.once
@pytest.mark.parametrize("types", ["Explicit", slow("Auto")])
def test_on_many_devices(types):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType[types],))
    model = _model(without=["bias"])
    specs = {"token": P("data"), "blocks": {"weight": P(None, "data"), "scale": P()}}
    place = lambda tree, specs: jax.device_put(
        tree, jtu.tree_map(lambda spec: NamedSharding(mesh, spec), specs)
    )
    batch = _batch()
    divided = {name: P("data") if x.ndim else P() for name, x in batch.items()}
    with jax.set_mesh(mesh):
        model, batch = place(model, specs), place(batch, divided)
        make = lambda **kwargs: fq.lion(1e-2, **kwargs)
        _assert_same(*_train(make, model, batch, [None]))


@pytest.mark.parametrize("jit", [False, True])
def test_first_gradient(jit):
    """Of the weight that is multiplied last, through casts and transpositions, and not
    of one that is only added."""

    def block(weights, x):
        y = jnp.tanh(x @ weights[3].astype(jnp.float32).T)
        y = (y * weights[2][None]) @ weights[1]
        return x + y + weights[0][None], None

    shapes = {3: (8, 4), 2: (8,), 1: (8, 4), 0: (4,)}
    weights = {i: jnp.ones(shape) for i, shape in shapes.items()}
    x = jnp.ones((2, 4))
    call = jax.jit(block) if jit else block
    assert first_gradient(jax.checkpoint(call), weights, x) == 1
    # A normalization at the end.
    last = lambda weights, x: (call(weights, x)[0] * weights[0][None], None)
    assert first_gradient(last, weights, x) == 0
    assert first_gradient(lambda w, x: (x + w[0], None), {0: x}, x) == 0


def test_halves():
    """Each array is in one half, and they differ by one array at most."""
    sizes = {5: [7, 100, 3], 2: [60, 30], 9: [1]}
    stacks = {i: [jnp.zeros(n, jnp.int8) for n in own] for i, own in sizes.items()}
    are_second = second_half(stacks)
    first, second = halves(stacks, are_second)
    shapes = lambda tree: jtu.tree_map(jnp.shape, tree)
    assert shapes(eqx.combine(first, second)) == shapes(stacks)
    held = [sum(x.nbytes for x in jtu.tree_leaves(half)) for half in (first, second)]
    assert held == [101, 100]
    part = halves({2: stacks[2]}, are_second)
    assert [len(jtu.tree_leaves(half)) for half in part] == [0, 2]


def test_copies_go_both_ways():
    """While a layer is computed, some arrays of host memory are read and others are
    written; after its first gradient, the other way around."""
    optim, model = fq.lion(1e-2, state_memory=AWAY), _model(without=["bias"])
    state = optim.init(model)
    release = lambda *args: fq.release_step(optim, _loss, *args)[:2]
    jaxpr = jax.make_jaxpr(release)(model, state, _batch()).jaxpr
    loop = [x for x in jaxpr.eqns if x.primitive.name == "scan"][-1]
    operations = loop.params["jaxpr"].jaxpr.eqns
    names = [x.primitive.name for x in operations]
    # The loss has one block, whose gradients are one operation.
    end = max(i for i, name in enumerate(names) if name == "remat2")
    host = jax.memory.Space.Host
    copies = {}
    for part, some in enumerate((operations[:end], operations[end:])):
        for operation in some:
            if "dynamic" in str(operation.params.get("name")):
                array = operation.invars[0]
                if array.aval.memory_space == host:
                    kind = "update" in operation.params["name"]
                    copies.setdefault((part, kind), []).append(array.aval.str_short())
    reads, writes = ([copies[part, kind] for part in (0, 1)] for kind in (False, True))
    assert sorted(reads[0]) == sorted(writes[1])
    assert sorted(reads[1]) == sorted(writes[0])


def test_ensembles_are_refused():
    optim, model = fq.sgd(1e-2, state_memory=AWAY), _model(without=["bias"])
    stack = lambda tree: jtu.tree_map(lambda x: jnp.stack([x, x]), tree)
    model, state = stack(model), eqx.filter_vmap(optim.init)(stack(model))
    release = lambda *args: fq.release_step(optim, _loss, *args, _batch())
    with pytest.raises(NotImplementedError, match="under `vmap`"):
        jax.eval_shape(jax.vmap(release), model, state)


@pytest.mark.parametrize("backend", ["gpu", "xla"])
def test_counts_keep_copies_out_of_graphs(backend):
    """Where kernels are for GPUs, the count of steps goes to host memory and back in
    each turn, beside what is copied there; nowhere else."""
    optim = fq.lion(1e-2, backend=backend, state_memory=AWAY)
    model = _model(without=["bias"])
    state = optim.init(model)
    release = lambda *args: fq.release_step(optim, _loss, *args)[:2]
    jaxpr = str(jax.make_jaxpr(release)(model, state, _batch()))
    assert (
        jaxpr.count("i32<host>[]") > 0
        if backend == "gpu"
        else "i32<host>[]" not in jaxpr
    )
