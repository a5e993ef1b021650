"""States mapped like their weights."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import flashquinox as fq

from ..helpers import tree_identical


_params = {"w": jnp.ones((64, 32), jnp.bfloat16), "b": jnp.ones(24)}
_specs = {"w": "spec of w", "b": "spec of b"}
_WRAPPERS = {
    "alone": lambda optim: optim,
    "chain": lambda optim: optax.chain(optax.clip_by_global_norm(1.0), optim),
    "steps": lambda optim: optax.MultiSteps(optim, 2),
    "accumulate": lambda optim: fq.accumulate(optim, 2),
    "masked": lambda optim: optax.masked(optim, {"w": True, "b": False}),
    "partition": lambda optim: optax.partition(
        {"matrix": optim, "rest": fq.sgd(1e-3)}, {"w": "matrix", "b": "rest"}
    ),
}


def _mapped(optim, state, **options):
    return fq.map_params(optim, lambda _, spec: spec, state, _specs, **options)


@pytest.mark.parametrize(
    "moments, wrap",
    [
        *(("flashquinox", wrap) for wrap in _WRAPPERS),
        *((moments, "alone") for moments in ("float32", "learned")),
    ],
)
def test_specs(moments, wrap):
    optim = _WRAPPERS[wrap](fq.adamw(1e-3, storage=fq.Storage(moments=moments)))
    state = optim.init(_params)
    other = lambda _: "no weight"
    mapped = _mapped(optim, state, transform_non_params=other)
    assert jtu.tree_structure(mapped) == jtu.tree_structure(state)
    for (path, spec), array in zip(
        jtu.tree_leaves_with_path(mapped), jtu.tree_leaves(state), strict=True
    ):
        names = jtu.keystr(path)
        owner = next((name for name in _specs if f"['{name}']" in names), None)
        if "parameter" in names:
            owner = None
        assert spec == ("no weight" if owner is None else _specs[owner]), names
        assert hasattr(array, "shape")
    kept = fq.map_params(optim, lambda x: x, state)
    assert tree_identical(kept, state)


def test_optax_itself():
    """With what it needs to be told: where a weight's part of the state begins."""
    optim = fq.adamw(1e-3)
    state = optim.init(_params)
    mapped = optax.tree.map_params(
        optim,
        lambda _, spec: spec,
        state,
        _specs,
        transform_non_params=lambda _: None,
        is_leaf=lambda x: x is None or isinstance(x, fq.QuantMoment),
    )
    assert jtu.tree_leaves(mapped) == ["spec of b", "spec of w"] * 3


def test_injected_hyperparameters():
    # Optax compares a tree of no weights, of which it takes any dtype.
    optim = optax.inject_hyperparams(fq.adamw, hyperparam_dtype=jnp.float32)(1e-3)
    state = optim.init(_params)
    mapped = _mapped(optim, state, transform_non_params=lambda _: None)
    assert jtu.tree_structure(mapped.inner_state.moments) == jtu.tree_structure(
        state.inner_state.moments
    )
    assert set(jtu.tree_leaves(mapped)) == set(_specs.values())


def test_state_goes_where_the_weights_are():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    shapes = {"w": (64, 64), "wide": (32, 256), "v": (48,), "stack": (2, 64, 32)}
    specs = {
        "w": P("data", "model"),
        "wide": P(None, ("data", "model")),
        "v": P("model"),
        "stack": P(None, "data"),
    }
    params = {name: jnp.ones(shape, jnp.bfloat16) for name, shape in shapes.items()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    optim = fq.adamw(1e-3)
    expected = optim.init(jax.device_put(params, shardings))
    everywhere = NamedSharding(mesh, P())
    # Of a state that knows its division, and of one that does not.
    for state in (expected, optim.init(params)):
        where = fq.map_params(
            optim,
            lambda _, sharding: sharding,
            state,
            shardings,
            transform_non_params=lambda _: everywhere,
        )
        moved = jax.device_put(state, where)
        for x, sharding in zip(
            jtu.tree_leaves(moved), jtu.tree_leaves(where), strict=True
        ):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
        assert where.corrections == shardings
        # So does Optax's own function, if it is told where a weight's part begins.
        whole = optax.tree.map_params(
            optim,
            lambda _, sharding: sharding,
            state,
            shardings,
            is_leaf=lambda x: isinstance(x, fq.QuantMoment),
        )
        assert whole.corrections == shardings
    assert where.shardings == () and moved.moments["mu"]["w"].codes.sharding.spec
    for x, y in zip(*map(jtu.tree_leaves, (moved, expected)), strict=True):
        if x.shape == y.shape:
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_specs_of_another_structure():
    optim = fq.adamw(1e-3)
    with pytest.raises(ValueError, match=r"'b'|keys"):
        fq.map_params(optim, lambda _, s: s, optim.init(_params), {"w": "spec"})
