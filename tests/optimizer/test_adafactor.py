"""Adafactor: means over rows and columns, in whole leaves, whatever holds them."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq

from ..helpers import assert_raises, float64, RESIDUAL_LOSS, slow, tree_identical
from ..kernels import arrays


# Factored by the last two axes; by the first and the last; not at all.
_SHAPES = {"w": (6, 8), "k": (7, 2, 6), "b": (5,), "s": ()}
_EXACT = fq.Storage(master_weight_bits=None, moments="float32")


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "weight_decay_rate": 0.01, "decay_offset": 1},
        slow({}),
        slow({"multiply_by_parameter_scale": False, "clipping_threshold": None}),
        slow({"factored": False, "decay_rate": 0.5, "eps": 1e-3}),
    ],
)
def test_is_that_of_optax(options):
    ours = fq.adafactor(0.02, 6, storage=_EXACT, **options)
    theirs = optax.adafactor(0.02, 6, **options)
    found = expected = arrays(_SHAPES, jnp.float32, 0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state, reference = ours.init(found), theirs.init(found)
        # Before `decay_offset`, Optax's decay rate is no number.
        skipped = options.get("decay_offset", 0)
        state = optax.tree.set(state, count=state.count + skipped)
        reference = optax.tree.set(reference, count=jnp.int32(skipped))
        step, update = jax.jit(ours.step), jax.jit(theirs.update)
        for seed in range(1, 5):
            grads = arrays(_SHAPES, jnp.float32, seed)
            found, state = step(found, state, grads)
            updates, reference = update(grads, reference, expected)
            expected = optax.apply_updates(expected, updates)
    for name, x in expected.items():
        # Some roundings of weights of up to 4.
        np.testing.assert_allclose(found[name], x, rtol=0, atol=16 * 2.0**-22)


def test_state_has_vectors():
    model = arrays({"w": (256, 128), "k": (128, 3, 256), "b": (4096,)}, jnp.bfloat16, 0)
    state = fq.adafactor(1e-2).init(model)
    rows, columns, squares = (state.moments[x] for x in ("v_row", "v_col", "v"))
    assert [x["w"].shape for x in (rows, columns)] == [(1, 128), (256, 1)]
    assert [x["k"].shape for x in (rows, columns)] == [(128, 3, 1), (1, 3, 256)]
    assert rows["w"].dtype == jnp.float32 and squares["w"] is None
    assert isinstance(squares["b"], fq.QuantMoment) and rows["b"] is None
    plan = fq.memory_plan(model, fq.adafactor(1e-2))
    means = 4 * (128 + 256 + 3 * 128 + 3 * 256)
    assert sum(x.nbytes for x in jtu.tree_leaves((rows, columns))) == means
    assert plan.step.moments == means + 4096


@pytest.mark.once
@pytest.mark.parametrize("axis_type", [AxisType.Auto, slow(AxisType.Explicit)])
def test_divided_among_devices(axis_type):
    """Means are of whole rows and columns; each device holds those of its part."""
    shapes = {"w": (64, 64), "k": (2, 64, 3, 128), "v": (64,)}
    specs = {"w": P("a", "b"), "k": P(None, "b", None, "a"), "v": P("a")}
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    there = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    optim = fq.adafactor(0.1, 32, momentum=0.9)
    model, *grads = (arrays(shapes, jnp.bfloat16, seed) for seed in range(3))
    results = []
    for place in (lambda tree: tree, lambda tree: jax.device_put(tree, there)):
        here, state = place(model), optim.init(place(model))
        step = jax.jit(optim.step, donate_argnums=(0, 1))
        for grad in grads:
            here, state = step(jtu.tree_map(jnp.array, here), state, place(grad))
        results.append(fq.master_weights(here, state))
    for key, start in model.items():
        found, expected = (float64(x[key]) for x in results)
        way = np.max(np.abs(expected - float64(start)))
        # Sums are in another order: single codes may differ.
        assert np.max(np.abs(found - expected)) <= 2.0**-6 * way + 2.0**-14
    rows, columns = state.moments["v_row"], state.moments["v_col"]
    divided = lambda x, *spec: x.sharding.is_equivalent_to(
        NamedSharding(mesh, P(*spec)), x.ndim
    )
    assert divided(rows["w"], "a") and divided(columns["w"], None, "b")
    assert divided(rows["k"], None, "b")
    assert divided(columns["k"], None, None, None, "a")
    text = jax.jit(optim.step).lower(here, state, place(grads[0])).compile().as_text()
    assert text
    for operation in ("all-gather", "all-to-all"):
        assert f" {operation}" not in text


@pytest.mark.once
def test_steps_that_are_skipped_change_nothing():
    model, grads = (arrays(_SHAPES, jnp.bfloat16, seed) for seed in (0, 1))
    optim = fq.adafactor(0.1, 6, skip_nonfinite=True)
    step = jax.jit(optim.step)
    before = step(model, optim.init(model), grads)
    grads["b"] = grads["b"].at[0].set(jnp.inf)
    assert tree_identical(step(*before, grads), before)


@pytest.mark.once
def test_gradient_release():
    """Scales and clipping are of all layers together, so that they wait."""
    shapes = {"in": (32, 48), "blocks": (3, 48, 48)}
    model = {k: x / 8 for k, x in arrays(shapes, jnp.bfloat16, 0).items()}
    optim, batch = fq.adafactor(1e-2, 32), jnp.ones((4, 32), jnp.bfloat16)
    state = optim.init(model)
    found = jax.jit(lambda *x: fq.release_step(optim, RESIDUAL_LOSS, *x)[:2])(
        model, state, batch
    )
    grads = jax.jit(jax.grad(RESIDUAL_LOSS))(model, batch)
    expected = jax.jit(optim.step)(model, state, grads)
    masters = [fq.master_weights(*x) for x in (found, expected)]
    for name, start in model.items():
        x, y = (float64(x[name]) for x in masters)
        assert np.linalg.norm(x - y) <= 2.0**-5 * np.linalg.norm(y - float64(start))


@pytest.mark.slow
def test_ensemble():
    make = lambda seed: arrays(_SHAPES, jnp.bfloat16, seed)
    optim = fq.adafactor(0.1, 6)
    stacked = lambda *seeds: jtu.tree_map(lambda *x: jnp.stack(x), *map(make, seeds))
    models, grads = stacked(0, 1), stacked(2, 3)
    states = jax.vmap(optim.init)(models)
    found, _ = jax.jit(jax.vmap(optim.step))(models, states, grads)
    for i in range(2):
        expected, _ = jax.jit(optim.step)(make(i), optim.init(make(i)), make(2 + i))
        for name, x in expected.items():
            np.testing.assert_allclose(
                float64(found[name][i]), float64(x), rtol=2.0**-8, atol=2.0**-10
            )


def test_errors():
    model = arrays(_SHAPES, jnp.bfloat16, 0)
    raises = lambda call, *parts: assert_raises(ValueError, call, *parts)
    raises(lambda: fq.adafactor(0.1, clipping_threshold=0.5), "clipping_threshold")
    raises(lambda: fq.adafactor(0.1, weight_decay_rate=-1.0), "weight_decay_rate")
    raises(lambda: fq.adafactor(0.1, 0), "min_dim_size_to_factor", "at least 1")
    alone = fq.optimizer(fq.Adafactor(), 0.1)
    raises(lambda: alone.init(model), "['b']", "flashquinox.adafactor")
    optim = fq.adafactor(0.1, 6)
    state = optim.init(model)
    moments = state.moments | {"v_row": state.moments["v_row"] | {"w": jnp.ones(6)}}
    wrong = dataclasses.replace(state, moments=moments)
    raises(lambda: optim.step(model, wrong, model), "'v_row'", "['w']", "(6, 1)")
    raises(lambda: fq.Moment("nonnegative", mean_over=(-1,)), "kept 'exact'")
    raises(lambda: fq.Moment(kept="exact", mean_over=(0,)), "negative")


class _Means(fq.AbstractMeansRule):
    @property
    def before(self):
        return None

    @property
    def after(self):
        return fq.SGD(0.9)

    @property
    def means(self):
        return {"trace": fq.Moment(kept="exact", mean_over=(-1,))}

    def transform(self, direction, weight, means, count):
        del weight, means, count
        return direction, {"other": direction}


class _Other(_Means):
    @property
    def means(self):
        return {"rows": fq.Moment(kept="exact", mean_over=(-1,))}


def test_rules_of_a_user():
    assert_raises(
        ValueError, lambda: fq.optimizer(_Means(), 0.1), "'trace'", ".after", ".means"
    )
    optim, model = fq.optimizer(_Other(), 0.1), {"w": jnp.ones((4, 64), jnp.bfloat16)}
    assert_raises(
        TypeError,
        lambda: optim.step(model, optim.init(model), model),
        "_Other.transform",
        "'rows'",
    )


@pytest.mark.usefixtures("without_typechecker")
def test_state_of_other_arguments():
    """The smallest axis decides which moments a leaf has."""
    model = arrays(_SHAPES, jnp.bfloat16, 0)
    states = [fq.adafactor(0.1, smallest).init(model) for smallest in (6, 128)]
    for smallest, state, name in ((128, states[0], "'v'"), (6, states[1], "'v_row'")):
        step = fq.adafactor(0.1, smallest).step
        wrong = lambda step=step, state=state: step(model, state, model)
        assert_raises(ValueError, wrong, name, "['k']", "had other moments")
