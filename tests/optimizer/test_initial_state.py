"""What `init` takes: programs that read a state come after it."""

import itertools

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flashquinox as fq

from ..helpers import array_of, COMPILED, slow, tree_identical


_OTHERS = itertools.count(1009)


def _params(rows, sharding=None):
    """Of shapes that no other test has."""
    shapes = {"matrix": (4 * rows, 37), "vector": (4 * rows,), "tensor": (4, rows, 39)}
    put = lambda x: x if sharding is None else jax.device_put(x, sharding)
    return {
        name: put(array_of(np.ones(shape, np.float32), jnp.bfloat16))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("kind", [None, AxisType.Auto, slow(AxisType.Explicit)])
@pytest.mark.parametrize(
    "storage",
    [
        fq.Storage(),
        fq.Storage(moments="learned"),
        fq.Storage(pack_below=2**16),
    ],
)
def test_compiles_nothing(storage, kind):
    sharding = None
    if kind is not None:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
    optim = fq.adamw(1e-3, storage=storage)
    optim.init(_params(11, sharding))
    params = _params(13, sharding)
    COMPILED.clear()
    state = optim.init(params)
    jax.block_until_ready(jtu.tree_leaves((state.moments, state.corrections)))
    assert not COMPILED
    # It is seen where there is something.
    jnp.zeros((13, next(_OTHERS))).block_until_ready()
    assert COMPILED
    # Within a program, it is the same.
    made = jax.jit(optim.init)(params) if kind is None else state
    assert tree_identical(
        (made.count, made.moments, made.corrections),
        (state.count, state.moments, state.corrections),
    )


@pytest.mark.parametrize("kind", [None, AxisType.Auto])
def test_large_arrays(kind, monkeypatch):
    """The device makes those itself, to the same ends."""
    sharding = None
    if kind is not None:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
    params, optim = _params(12, sharding), fq.adamw(1e-3)
    state = optim.init(params)
    monkeypatch.setattr("flashquinox._common.eager._MOST_BYTES", 0)
    other = optim.init(params)
    assert tree_identical(other, state)
    for x, y in zip(jtu.tree_leaves(other), jtu.tree_leaves(state), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert x.committed == y.committed


def test_arrays_are_given_away():
    """A first step updates the state, as all others do."""
    params, optim = _params(14), fq.adamw(1e-3)
    state = optim.init(params)
    jax.jit(optim.step, donate_argnums=(0, 1))(params, state, _params(14))
    assert all(x.is_deleted() for x in jtu.tree_leaves(state))
