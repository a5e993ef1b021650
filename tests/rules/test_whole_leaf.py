"""Rules that need whole leaves: two passes, and a function between them."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq

from ..helpers import assert_raises, float64, slow, tree_identical, weights
from ..kernels import arrays


class _ScaledSign(fq.AbstractWholeLeafRule):
    momentum: float | jax.Array = 0.9

    @property
    def before(self):
        return fq.SGD(self.momentum)

    @property
    def after(self):
        return fq.SGD()

    def transform(self, direction, weight):
        del weight
        return jnp.sign(direction) * jnp.mean(jnp.abs(direction))


_SHAPES = {"w": (64, 64), "v": (64,), "k": (3, 3, 8, 32)}
_RULES = {"sign": _ScaledSign(), "lamb": fq.Lamb(), "lars": fq.Lars(0.1)}


def test_a_rule_of_a_user():
    w, grads = weights("matrix"), [weights("matrix", seed=i) for i in (1, 2)]
    storage = fq.Storage(master_weight_bits=32, moments="float32")
    optim = fq.optimizer(_ScaledSign(), 0.1, weight_decay=0.5, storage=storage)
    state, exact, trace = optim.init(w), float64(w["matrix"]), 0.0
    for grad in grads:
        w, state = jax.jit(optim.step)(w, state, grad)
        trace = 0.9 * trace + float64(grad["matrix"])
        size = np.mean(np.abs(trace))
        exact = (1 - 0.1 * 0.5) * exact - 0.1 * np.sign(trace) * size
    found = float64(fq.master_weights(w, state)["matrix"])
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
    found = state.moments["trace"]["matrix"]
    np.testing.assert_allclose(found, trace, rtol=1e-6, atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("axis_type", [AxisType.Auto, slow(AxisType.Explicit)])
@pytest.mark.parametrize("name", ["lamb", slow("sign"), slow("lars")])
def test_divided_among_devices(name, axis_type):
    """Norms are of whole leaves."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    specs = {"w": P("a", "b"), "v": P("a"), "k": P(None, None, "b", "a")}
    put = lambda tree: {
        key: jax.device_put(x, NamedSharding(mesh, specs[key]))
        for key, x in tree.items()
    }
    # On another mesh, groups may be of other elements: codes differ, and where they are
    # near zero their signs.
    storage = fq.Storage(moments="float32") if name == "sign" else fq.Storage()
    rule = _RULES[name]
    optim = fq.optimizer(rule, 0.1, weight_decay=0.1, decay="l2", storage=storage)
    model, *grads = (arrays(_SHAPES, jnp.bfloat16, seed) for seed in range(3))
    results = []
    for place in (lambda tree: tree, put):
        here, state = place(model), optim.init(place(model))
        for grad in grads:
            here, state = jax.jit(optim.step)(here, state, place(grad))
        results.append(fq.master_weights(here, state))
    for key, start in model.items():
        found, expected = (float64(x[key]) for x in results)
        way = np.max(np.abs(expected - float64(start)))
        # A norm is summed in another order; then single codes, and units of a master
        # weight, may differ.
        assert np.max(np.abs(found - expected)) <= 2.0**-6 * way + 2.0**-14


@pytest.mark.once
@pytest.mark.parametrize(
    "backend, make, members",
    [
        ("tpu", fq.lamb, None),
        ("gpu", fq.lamb, None),
        slow("gpu", fq.muon, None),
        ("gpu", fq.muon, 2),
        slow("gpu", fq.lamb, 2),
        slow("tpu", fq.muon, None),
    ],
)
def test_kernels_take_both_passes(backend, make, members):
    """Kernels for GPUs have directions in one array: of Muon, a stack of leaves of one
    shape; of others, one leaf after the other, of any size."""
    try:
        kernel = make(0.1, backend=backend)
    except ImportError:
        pytest.skip("this JAX has no such kernels")
    plain = make(0.1, backend="xla")
    shapes = {"a": (64, 128), "b": (64, 128), "c": (37, 5), "d": (36, 7), "v": (8,)}
    if members is not None:
        shapes = {key: (members, *shape) for key, shape in shapes.items()}
    model, grads = (arrays(shapes, jnp.bfloat16, seed) for seed in (0, 1))
    map_ = (lambda f: f) if members is None else jax.vmap
    state = jax.jit(map_(kernel.init))(model)
    found = jax.jit(map_(kernel.step))(model, state, grads)
    expected = jax.jit(map_(plain.step))(model, state, grads)
    masters = map_(fq.master_weights)
    for key, start in model.items():
        x, y = (float64(masters(*each)[key]) for each in (found, expected))
        # The products of Muon are in bfloat16, whose roundings add up.
        share = 2.0**-14 if make is fq.lamb else 2.0**-4
        way = np.max(np.abs(y - float64(start)))
        assert np.max(np.abs(x - y)) <= share * way + 2.0**-14
    is_code = lambda x: x.dtype in (jnp.int8, jnp.uint8)
    codes = [
        [x for x in jtu.tree_leaves(each[1].moments) if is_code(x)]
        for each in (found, expected)
    ]
    for x, y in zip(*codes, strict=True):
        assert np.mean(np.asarray(x) != np.asarray(y)) < 0.01


@pytest.mark.once
def test_as_an_optax_transformation():
    model, grads = weights("matrix", "bias"), weights("matrix", "bias", seed=1)
    optim = fq.lamb(0.1, weight_decay=0.1)
    expected = fq.master_weights(*jax.jit(optim.step)(model, optim.init(model), grads))
    chain = optax.chain(optax.identity(), optim)
    updates, state = jax.jit(chain.update)(grads, chain.init(model), model)
    found = fq.master_weights(optax.apply_updates(model, updates), state)
    for name, x in expected.items():
        # 24 bits of the weight, or those of an update that is larger than it.
        size = np.abs(float64(x) - float64(model[name]))
        bound = 2.0**-15 * np.abs(float64(x)) + 2.0**-8 * size
        assert np.all(np.abs(float64(found[name]) - float64(x)) <= bound)


@pytest.mark.parametrize("name", ["lamb", "lars", "schedule_free_adamw"])
def test_masks(name):
    """What does not decay, beside Optax in float32; and a leaf that gets no
    gradient."""
    model = weights("matrix", "bias", dtype=jnp.float32)
    grads = weights("matrix", "bias", dtype=jnp.float32, seed=1)
    storage = fq.Storage(moments="float32")
    ours = lambda mask: getattr(fq, name)(
        0.01, weight_decay=0.5, mask=mask, storage=storage
    )
    there = optax.contrib if name == "schedule_free_adamw" else optax
    key = "weight_decay_mask" if name == "lars" else "mask"
    # Optax has no mask of this one.
    theirs = lambda mask, rate: getattr(there, name)(
        0.01, weight_decay=rate, **({} if there is optax.contrib else {key: mask})
    )
    mask = {"matrix": True, "bias": False}
    optim = ours(mask)
    found, state = jax.jit(optim.step)(model, optim.init(model), grads)
    for leaf, decays in mask.items():
        reference = theirs(True, 0.5 if decays else 0.0)
        part = {leaf: model[leaf]}
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = jax.jit(reference.update)(
                {leaf: grads[leaf]}, reference.init(part), part
            )
        expected = model[leaf] + updates[leaf]
        np.testing.assert_allclose(found[leaf], expected, rtol=0, atol=2.0**-20)
    frozen, after = jax.jit(optim.step)(model, state, grads | {"bias": None})
    assert tree_identical(frozen["bias"], model["bias"])
    assert not tree_identical(frozen["matrix"], model["matrix"])
    for moment in after.moments.values():
        assert moment["bias"] is not None
    # Optax's wrapper leaves the others to itself.
    masked = optax.masked(ours(None), mask)
    updates, _ = jax.jit(masked.update)(grads, masked.init(model), model)
    assert tree_identical(updates["bias"], grads["bias"])


def test_steps_that_are_skipped_change_nothing():
    model, grads = weights("matrix", "bias"), weights("matrix", "bias", seed=1)
    optim = fq.lamb(0.1, skip_nonfinite=True)
    state = optim.init(model)
    grads["bias"] = grads["bias"].at[0].set(jnp.nan)
    assert tree_identical(jax.jit(optim.step)(model, state, grads), (model, state))


def test_clipping():
    model, grads = weights("matrix"), weights("matrix", seed=1)
    small = jtu.tree_map(lambda x: x * jnp.bfloat16(2.0**-10), grads)
    norm = float(np.linalg.norm(float64(grads["matrix"])))
    # Without a first pass.
    optim = fq.lars(0.1, eps=1e-2, trust_coefficient=0.1)
    state, step = optim.init(model), jax.jit(optim.step)
    found, _ = step(model, state, grads, max_norm=norm * 2.0**-10)
    expected, _ = step(model, state, small)
    np.testing.assert_allclose(
        float64(found["matrix"]), float64(expected["matrix"]), rtol=2.0**-7
    )


def test_derivatives():
    """Of the learning rate, through two steps without rounding."""
    storage = fq.Storage(master_weight_bits=None, moments="float32")
    model, grads = arrays(_SHAPES, jnp.float32, 0), arrays(_SHAPES, jnp.float32, 1)

    def ours(rate):
        optim = fq.lamb(rate, weight_decay=0.1, storage=storage)
        w, state = model, optim.init(model)
        for _ in range(2):
            w, state = optim.step(w, state, grads)
        return jnp.sum(w["w"] ** 2)

    def theirs(rate):
        optim = optax.lamb(rate, weight_decay=0.1)
        w, state = model, optim.init(model)
        for _ in range(2):
            updates, state = optim.update(grads, state, w)
            w = optax.apply_updates(w, updates)
        return jnp.sum(jnp.square(w["w"]))  # pyright: ignore

    with jax.numpy_dtype_promotion("standard"):
        found, expected = (jax.jit(jax.grad(f))(0.1) for f in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


class _Twice(_ScaledSign):
    @property
    def after(self):
        return fq.SGD(0.5)


def test_moments_of_two_passes_have_names_of_their_own():
    assert_raises(ValueError, lambda: fq.optimizer(_Twice(), 0.1), "'trace'", "before")
