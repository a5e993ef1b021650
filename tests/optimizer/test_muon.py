"""Muon: matrices by a rule that needs whole leaves, all else by Adam, in one state."""

import collections
import functools as ft
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import flashquinox as fq
from flashquinox._model.trees import flatten
from flashquinox._optimizer.dimension_numbers import ByDimensionNumbers
from flashquinox._optimizer.optimizer import settings_of
from flashquinox._rules.newton_schulz import named_coefficients, orthogonalized
from flashquinox.checkpoint import Checkpoints

from ..helpers import assert_raises, float64, RESIDUAL_LOSS, slow, tree_identical
from ..kernels import arrays


# Two of a stack; fused axes of outputs; a matrix for each of three heads; a vector.
_SHAPES = {"a": (64, 32), "b": (64, 32), "fused": (32, 3, 32), "heads": (3, 32, 48)}
_SHAPES |= {"vector": (32,)}
_NUMBERS = {
    "a": MuonDimensionNumbers(),
    "b": MuonDimensionNumbers(),
    "fused": MuonDimensionNumbers(0, (1, 2)),
    "heads": MuonDimensionNumbers(1, 2),
    "vector": None,
}
_make = ft.partial(fq.muon, weight_dimension_numbers=_NUMBERS)


def _tree(seed: int, dtype=jnp.float32):
    return jtu.tree_map(lambda x: x.astype(dtype), arrays(_SHAPES, jnp.float32, seed))


@pytest.mark.parametrize(
    "name, steps, low, high",
    [("quintic", 5, 0.5, 1.3), ("polar_express", 8, 0.98, 1.02)],
)
def test_singular_values_become_one(name, steps, low, high):
    """In float32; of a matrix whose singular values are from 0.01 to 1."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 16)))[0] for n in (24, 40))
    matrix = jnp.asarray((u * np.geomspace(0.01, 1, 16)) @ v.T, jnp.float32)
    coefficients = named_coefficients(name, steps)
    for x in (matrix, matrix.T):
        found = orthogonalized(x[None], coefficients, 1e-8)[0]
        values = np.linalg.svd(found, compute_uv=False)[:16]
        assert low < values.min() and values.max() < high


@pytest.mark.parametrize("rms, nesterov", [(None, True), (0.2, False)])
def test_is_that_of_optax(rms, nesterov):
    """Of weights in float64, products are in float64, and nothing is rounded."""
    with jax.enable_x64(True):
        numbers = {"muon_weight_dimension_numbers": _NUMBERS}
        arguments = {
            "nesterov": nesterov,
            "consistent_rms": rms,
            "weight_decay": 0.1,
            "adam_learning_rate": 0.01,
        }
        storage = fq.Storage(master_weight_bits=None, moments="float32")
        ours = _make(0.02, storage=storage, **arguments)
        theirs = optax.contrib.muon(0.02, **numbers, **arguments)
        w = expected = _tree(0, jnp.float64)
        state, their_state = ours.init(w), theirs.init(expected)
        step, update = jax.jit(ours.step), jax.jit(theirs.update)
        for seed in range(1, 4):
            grads = _tree(seed, jnp.float64)
            w, state = step(w, state, grads)
            with jax.numpy_dtype_promotion("standard"):
                with jax.numpy_rank_promotion("allow"):
                    updates, their_state = update(grads, their_state, expected)
            expected = optax.apply_updates(expected, updates)
            for name in _SHAPES:
                # Optax's coefficients are float32.
                np.testing.assert_allclose(w[name], expected[name], atol=1e-6)


def test_products_are_in_bfloat16():
    """Each of 15 products rounds both of its factors, by at most 2^-9 in norm, and what
    comes of it: 15 * 3 * 2^-9 in all."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 48, 64)), jnp.float32)
    coefficients = named_coefficients("quintic", 5)
    exact = float64(orthogonalized(x, coefficients, 1e-8))
    found = orthogonalized(x.astype(jnp.bfloat16), coefficients, 1e-8)
    assert found.dtype == jnp.bfloat16
    error = np.linalg.norm(float64(found) - exact) / np.linalg.norm(exact)
    assert 2.0**-9 < error < 15 * 3 * 2.0**-9


def test_state_has_what_each_leaf_needs():
    model, state = fq.prepare(_tree(0), _make(1e-2))
    assert set(state.moments) == {"momentum", "mu", "nu"}
    for name in _SHAPES:
        is_vector = name == "vector"
        assert (state.moments["momentum"][name] is None) == is_vector
        assert (state.moments["nu"][name] is None) != is_vector
    stored = [state.moments["momentum"]["a"], state.corrections["a"], model["a"]]
    total = sum(x.nbytes for x in jtu.tree_leaves(stored))
    assert total / model["a"].size == 4.0625
    plan = fq.memory_plan(model, _make(1e-2))
    held = sum(x.nbytes for x in jtu.tree_leaves((model, state)))
    assert (plan.step.total or 0) - (plan.step.gradients or 0) == held


def _steps(optim, model, grads, method="step"):
    state = optim.init(model)
    for grad in grads:
        if method == "step":
            model, state = jax.jit(optim.step)(model, state, grad)
        else:
            updates, state = jax.jit(optim.update)(grad, state, model)
            model = optax.apply_updates(model, updates)
    return model, state


@pytest.mark.once
@pytest.mark.parametrize("axis_type", [AxisType.Auto, slow(AxisType.Explicit)])
def test_divided_among_devices(axis_type):
    """Each device has whole matrices, and its share of the work; matrices go there and
    back by one exchange each."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    shapes = {f"w{i}": (64, 32) for i in range(8)} | {"stack": (4, 48, 32)}
    numbers = dict.fromkeys(shapes, MuonDimensionNumbers(-2, -1))
    optim = fq.muon(1e-2, weight_dimension_numbers=numbers)
    model, *grads = (arrays(shapes, jnp.bfloat16, seed) for seed in range(3))
    there = NamedSharding(mesh, P("data"))
    put = lambda tree: jax.device_put(tree, there)
    expected = _steps(optim, model, grads)
    found = _steps(optim, put(model), [put(x) for x in grads])
    moments = [jtu.tree_leaves(state.moments) for _, state in (found, expected)]
    for x, y in zip(*moments, strict=True):
        np.testing.assert_allclose(float64(x), float64(y), rtol=2.0**-6, atol=2)
    # Products of as many matrices as a device has may be rounded elsewhere, by 2^-9 of
    # an update. Where a weight is smaller than its update, that is a unit of the weight
    # or many of its correction, so these are compared as one number.
    masters = [fq.master_weights(*x) for x in (found, expected)]
    for name in shapes:
        x, y = (float64(x[name]) for x in masters)
        way = np.linalg.norm(y - float64(model[name]))
        assert np.linalg.norm(x - y) <= 3 * 2.0**-8 * way
        assert found[0][name].sharding.is_equivalent_to(there, x.ndim)

    def compiled(model, grads):
        state = optim.init(model)
        return jax.jit(optim.step).lower(model, state, grads).compile()

    alone, divided = compiled(model, grads[0]), compiled(put(model), put(grads[0]))
    # The stack is divided as it is.
    assert _collectives(divided) == {"all-to-all": 2}
    work = [_flops(x) for x in (alone, divided)]
    assert work[1] <= 1.05 * work[0] / 4


@pytest.mark.once
@pytest.mark.parametrize(
    ("spec", "collectives"),
    [
        (P("data"), {"all-to-all": 2}),
        pytest.param(P(None, "data"), {"all-to-all": 2}, marks=pytest.mark.slow),
        pytest.param(P(), {"all-gather": 1}, marks=pytest.mark.slow),
    ],
)
def test_stacks_that_devices_do_not_divide(spec, collectives):
    """Five matrices on three devices: no device has more than two of them."""
    mesh = jax.make_mesh((3,), ("data",), devices=jax.devices()[:3])
    shapes = {f"w{i}": (192, 96) for i in range(5)}
    numbers = dict.fromkeys(shapes, MuonDimensionNumbers(-2, -1))
    optim = fq.muon(1e-2, weight_dimension_numbers=numbers)
    model, grads = (arrays(shapes, jnp.bfloat16, seed) for seed in range(2))
    there = NamedSharding(mesh, spec)
    ways = []
    for put in (lambda x: x, lambda x: jax.device_put(x, there)):
        here, state = put(model), optim.init(put(model))
        step = jax.jit(optim.step).lower(here, state, put(grads)).compile()
        masters = fq.master_weights(*step(here, state, put(grads)))
        ways.append((step, [float64(x) for x in masters.values()]))
    (alone, expected), (divided, found) = ways
    for x, y, start in zip(found, expected, model.values(), strict=True):
        way = np.linalg.norm(y - float64(start))
        assert np.linalg.norm(x - y) <= 3 * 2.0**-8 * way
    assert _collectives(divided) == collectives
    # The passes over a weight that is on all devices are made by all of them.
    passes = 0.05 if spec == P() else 0.01
    assert _flops(divided) <= (2 / 5 + passes) * _flops(alone)


def _collectives(compiled) -> collections.Counter[str]:
    names = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    return collections.Counter(
        re.findall(rf" ({names})(?:-start)?\(", compiled.as_text())
    )


def _flops(compiled) -> float:
    found = compiled.cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


@pytest.mark.slow
def test_axes_that_divide_nothing_share_the_work():
    """Also where a stack has fewer matrices than there are devices."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model, grads = (arrays(_SHAPES, jnp.bfloat16, seed) for seed in range(2))
    specs = {
        "a": P(None, "model"),
        "b": P(None, "model"),
        "fused": P(None, None, "model"),
    }
    specs |= {"heads": P(), "vector": P()}
    put = lambda tree: {
        k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()
    }
    optim = _make(1e-2)
    found = _steps(optim, put(model), [put(grads)])
    expected = _steps(optim, model, [grads])
    masters = [fq.master_weights(*x) for x in (found, expected)]
    for name in _SHAPES:
        x, y = (float64(x[name]) for x in masters)
        way = np.linalg.norm(y - float64(model[name]))
        assert np.linalg.norm(x - y) <= 3 * 2.0**-8 * way, name


def test_matrices_without_elements():
    shapes = {"rows": (0, 64), "columns": (64, 0), "stack": (0, 8, 8), "w": (8, 8)}
    model, grads = (arrays(shapes, jnp.bfloat16, seed) for seed in range(2))
    numbers = dict.fromkeys(shapes, MuonDimensionNumbers(-2, -1))
    optim = fq.muon(1e-2, weight_dimension_numbers=numbers)
    new, _ = _steps(optim, model, [grads])
    assert {k: x.shape for k, x in new.items()} == shapes
    assert not np.array_equal(new["w"], model["w"])


@pytest.mark.once
def test_update_is_a_step():
    model, grads = _tree(0, jnp.bfloat16), _tree(1, jnp.bfloat16)
    optim = _make(
        1e-2, weight_decay=0.1, mask={**dict.fromkeys(_SHAPES, True), "a": False}
    )
    expected = _steps(optim, model, [grads])
    found = _steps(optim, model, [grads], "update")
    _assert_masters_agree(found, expected)


def _assert_masters_agree(found, expected):
    """But for what 24 bits can tell."""
    for x, y in zip(
        *(jtu.tree_leaves(fq.master_weights(*x)) for x in (found, expected)),
        strict=True,
    ):
        np.testing.assert_allclose(float64(x), float64(y), rtol=2.0**-15, atol=2.0**-15)


@pytest.mark.once
def test_resumes_bit_for_bit(tmp_path):
    optim, model = _make(1e-2), _tree(0, jnp.bfloat16)
    step = jax.jit(optim.step)
    model, state = step(model, optim.init(model), _tree(1, jnp.bfloat16))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, state)
        found = checkpoints.restore(model, optim.init(model))
    assert tree_identical(found, (model, state))
    grads = _tree(2, jnp.bfloat16)
    assert tree_identical(step(*found, grads), step(model, state, grads))


class _Model(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: eqx.nn.Linear
    norms: eqx.nn.LayerNorm
    last: eqx.nn.Linear
    lm_head: jax.Array
    other: jax.Array


def test_what_is_a_matrix_by_default():
    key = jax.random.key(0)
    model = _Model(
        eqx.nn.Embedding(64, 32, key=key),
        eqx.filter_vmap(lambda k: eqx.nn.Linear(32, 32, key=k))(jax.random.split(key)),
        eqx.filter_vmap(lambda _: eqx.nn.LayerNorm(32))(jnp.arange(2)),
        eqx.nn.Linear(32, 64, key=key),
        jnp.ones((32, 64)),
        jnp.ones((32, 64)),
    )
    state = fq.muon(1e-2, consistent_rms=0.2).init(model)
    momentum = state.moments["momentum"]
    found = {
        jtu.keystr(path): x is not None
        for path, x in jtu.tree_leaves_with_path(
            momentum, is_leaf=lambda x: x is None or isinstance(x, fq.QuantMoment)
        )
    }
    matrices = {name for name, is_matrix in found.items() if is_matrix}
    assert matrices == {".blocks.weight", ".last.weight", ".other"}


@jtu.register_pytree_node_class
class _Box:
    """As of named arrays: one that names no fields."""

    def __init__(self, array):
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class _TokenEmbedding(eqx.Module):
    table: _Box
    project: eqx.nn.Linear


def test_cells_and_names_that_have_part_of_one_of_an_embedding():
    key = jax.random.key(0)
    cells = eqx.filter_vmap(lambda k: eqx.nn.LSTMCell(5, 7, key=k))
    x = jnp.ones((6, 8))
    weights = {
        "cell": eqx.nn.GRUCell(5, 7, key=key),
        "tokens": _TokenEmbedding(_Box(x), eqx.nn.Linear(6, 8, key=key)),
        "cells": cells(jax.random.split(key)),
        "multi_head_attention": {"query": x},
        "pos_ffn": {"up": x},
        "cls_head": x,
        "pos_embed": x,
    }
    leaves, _ = flatten(weights)
    choose = ByDimensionNumbers(None)
    optim = settings_of(fq.muon(1e-2))
    found = {
        leaf.name: (x.rule.reduction_axis, x.rule.output_axis)
        for leaf, x in zip(
            leaves, choose("muon", weights, leaves, optim.groups), strict=True
        )
        if isinstance(x.rule, fq.Muon)
    }
    # Inputs, then outputs.
    cell, other = ((-1,), (-2,)), ((-2,), (-1,))
    assert found == {
        "['cell'].weight_ih": cell,
        "['cell'].weight_hh": cell,
        "['cells'].weight_ih": cell,
        "['tokens'].project.weight": cell,
        "['cells'].weight_hh": cell,
        "['multi_head_attention']['query']": other,
        "['pos_ffn']['up']": other,
    }


def test_errors(without_typechecker):
    del without_typechecker
    model = _tree(0)
    assert_raises(ValueError, lambda: fq.muon(1e-2, "cubic"), "quintic", "'cubic'")
    assert_raises(ValueError, lambda: fq.muon(1e-2, ns_steps=0), "at least 1")
    assert_raises(ValueError, lambda: fq.muon(1e-2, adam_b1=1.5), "adam_b1")
    wrong = _NUMBERS | {"a": MuonDimensionNumbers(0, 0)}
    optim = fq.muon(1e-2, weight_dimension_numbers=wrong)
    assert_raises(ValueError, lambda: optim.init(model), "['a']", "(64, 32)")
    optim = fq.muon(1e-2, weight_dimension_numbers=_NUMBERS | {"a": 1})
    assert_raises(TypeError, lambda: optim.init(model), "['a']", "None to train")
    more = _NUMBERS | {"other": MuonDimensionNumbers(0, 1)}
    optim = fq.muon(1e-2, weight_dimension_numbers=more)
    assert_raises(ValueError, lambda: optim.init(model), "['other']", "a prefix of it")
    alone = fq.optimizer(fq.Muon(), 1e-2)
    assert_raises(
        ValueError, lambda: alone.init(model), "['vector']", "flashquinox.muon"
    )


@pytest.mark.once
@pytest.mark.parametrize("make", [_make, slow(fq.lamb)])
def test_gradient_release(make):
    """Matrices are updated layer by layer; norms wait for all layers."""
    model = {"in": (32, 32), "blocks": (3, 32, 32)}
    model = {k: x / 8 for k, x in arrays(model, jnp.bfloat16, 0).items()}
    arguments = {}
    if make is _make:
        numbers = {"in": None, "blocks": MuonDimensionNumbers(1, 2)}
        arguments["weight_dimension_numbers"] = numbers
    optim = make(1e-2, **arguments)
    batch = jnp.ones((4, 32), jnp.bfloat16)
    state = optim.init(model)
    release = jax.jit(lambda *x: fq.release_step(optim, RESIDUAL_LOSS, *x)[:2])
    found = release(model, state, batch)
    grads = jax.jit(jax.grad(RESIDUAL_LOSS))(model, batch)
    expected = jax.jit(optim.step)(model, state, grads)
    masters = [fq.master_weights(*x) for x in (found, expected)]
    for name, start in model.items():
        x, y = (float64(x[name]) for x in masters)
        way = np.linalg.norm(y - float64(start))
        assert np.linalg.norm(x - y) <= 2.0**-5 * way, name
