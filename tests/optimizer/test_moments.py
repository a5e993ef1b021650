"""Moments edited as numbers: encoded as they were stored, and training goes on as it
does in Optax."""

import copy
import dataclasses
import functools as ft
import operator
import pickle
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

from ..helpers import tree_identical


_MOMENTS = ["flashquinox", ("learned", "flashoptim"), "float32"]


def _model(rows=8, columns=96):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(0.1 * rng.standard_normal((rows, columns)), jnp.bfloat16),
        "b": jnp.zeros(rows, jnp.bfloat16),
    }


def _grads(model, seed):
    rng = np.random.default_rng(seed)

    def one(x):
        size = 1 + 10 * rng.random(x.shape)
        return jnp.asarray(size * rng.standard_normal(x.shape), jnp.bfloat16)

    return jtu.tree_map(one, model)


def _trained(optim, model, steps=4):
    state = optim.init(model)
    step = eqx.filter_jit(optim.step)
    for seed in range(steps):
        model, state = step(model, state, _grads(model, seed))
    return model, state


@pytest.fixture(scope="module", params=_MOMENTS)
def trained(request):
    optim = fq.adamw(1e-3, storage=fq.Storage(moments=request.param))
    return optim, *_trained(optim, _model())


def _quant(state):
    is_moment = lambda x: isinstance(x, fq.QuantMoment)
    return [x for x in jtu.tree_leaves(state, is_leaf=is_moment) if is_moment(x)]


_jit_encode = jax.jit(lambda moment, values, base: moment.encode(values, base=base))
_jit_decode = jax.jit(lambda moment, base: moment.decode(base=base))


def _encode(moment, values):
    return _jit_encode(moment, values, _base(moment))


def _decode(moment, base=None):
    return _jit_decode(moment, _base(moment) if base is None else base)


def _base(moment):
    """A moment alone, as `jit` gets it, does not know what it is relative to."""
    return None if moment.relative_to is None else moment.base


def test_a_base_has_the_same_shape(trained):
    _, _, state = trained
    for moment in [x for x in _quant(state) if x.relative_to is not None]:
        values = np.ones(moment.codes.shape, np.float32)
        for call in (moment.decode, ft.partial(moment.encode, values)):
            with pytest.raises(ValueError, match="to whose root it is relative"):
                call(base=jnp.ones(moment.codes.shape[:-1]))


@pytest.mark.product
def test_encode_is_nearest_and_keeps_the_form(trained):
    _, _, state = trained
    rng = np.random.default_rng(1)
    for moment in _quant(state):
        values = rng.standard_normal(moment.codes.shape).astype(np.float32)
        if moment.codes.dtype == jnp.uint8:
            values = values**2
        new = _encode(moment, values)
        assert jtu.tree_structure(new) == jtu.tree_structure(moment)
        for x, y in zip(jtu.tree_leaves(new), jtu.tree_leaves(moment), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
        # The largest distance between two codes of 256 is one of curves, 1/20 of the
        # largest of the group.
        base = _base(moment)
        error = np.abs(np.asarray(_decode(new, base)) - values)
        assert np.max(error) <= np.max(np.abs(values)) / 20
        # Without dither, and of what is stored nothing but the form counts.
        assert tree_identical(new, moment.encode(values))
        if moment.parameter is None:
            assert tree_identical(new, _jit_encode(new, values, base))
        zeros = _encode(moment, np.zeros_like(values))
        assert not np.any(np.asarray(_decode(zeros, base)))
        nothing = _encode(moment, np.where(np.arange(96) == 0, 0, values))
        left = np.asarray(_decode(nothing, base))[:, 0]
        assert np.all(left <= np.max(values) * 2.0**-15)


@pytest.mark.product
def test_encode_under_vmap_and_sharded(trained):
    optim, model, state = trained
    models = jtu.tree_map(lambda x: jnp.asarray(np.stack([x, x])), model)
    states = jax.jit(jax.vmap(optim.init))(models)
    ones = _quant(state)
    # Each moment under one kind of axes.
    kinds = (AxisType.Auto, AxisType.Explicit)[: len(ones)]
    for many, one, kind in zip(_quant(states), ones, kinds, strict=True):
        values = np.abs(np.sin(np.arange(2.0 * one.codes.size, dtype=np.float32)))
        values = values.reshape(2, *one.codes.shape)
        bases = _base(many)
        found = jax.jit(jax.vmap(lambda m, v, b: m.encode(v, base=b)))(
            many, values, bases
        )
        for i in range(2):
            like = fq.QuantMoment(
                one.codes,
                one.scales,
                one.axes,
                one.group_size,
                one.codec,
                _member(many, i).parameter,
                one.relative_to,
            )
            expected = _jit_encode(like, values[i], _member(bases, i))
            assert tree_identical(_member(found, i), expected)
        differs = many.scales.shape != many.layout.scale_shape
        if differs or many.parameter is not None:
            what = "scales" if differs else "a parameter"
            with pytest.raises(ValueError, match=f"with {what} of shape .*vmap"):
                many.encode(values)
        mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))

        def put(x, mesh=mesh):
            spec = P("x") if x.ndim == 2 else P()
            return jax.device_put(x, NamedSharding(mesh, spec))

        there = jtu.tree_map(put, one)
        base = _base(one)
        base_there = jtu.tree_map(put, base)
        found_there = there.encode(values[0], base=base_there)
        for x, y in zip(
            jtu.tree_leaves(found_there), jtu.tree_leaves(there), strict=True
        ):
            assert x.sharding == y.sharding
        assert tree_identical(
            jtu.tree_map(np.asarray, found_there),
            jtu.tree_map(np.asarray, _encode(one, values[0])),
        )


def _member(tree, index):
    return jtu.tree_map(lambda x: jnp.asarray(np.asarray(x)[index]), tree)


@pytest.mark.usefixtures("without_typechecker")
def test_what_cannot_be_encoded():
    moment = fq.adamw(1e-3).init(_model()).moments["nu"]["w"]
    ones = jnp.ones((8, 96))
    for values, kind, part in (
        (ones.at[3, 5].set(jnp.nan), ValueError, "finite"),
        (ones.at[3, 5].set(jnp.inf), ValueError, "finite"),
        (ones.at[3, 5].set(-1), ValueError, "at least 0"),
        (ones[:, 1:], ValueError, "(8, 96)"),
        (jnp.ones((8, 96), jnp.int32), TypeError, "int32"),
        (3.0, TypeError, "float"),
        (None, TypeError, "NoneType"),
    ):
        with pytest.raises(kind) as info:
            moment.encode(values)
        message = str(info.value)
        assert message.startswith("`QuantMoment.encode`: `values` must ")
        assert part in message and message.endswith(".")
    with pytest.raises(Exception, match="at least 0"):
        jax.block_until_ready(jax.jit(lambda x: moment.encode(x))(-ones))


@pytest.mark.parametrize(
    "moments, large, names",
    # Those of `flashoptim` are float16.
    [("flashquinox", 2e38, ["mu"]), ("flashoptim", 1e12, ["mu", "nu"])],
)
def test_too_large_for_the_scales(moments, large, names):
    state = fq.adamw(1e-3, storage=fq.Storage(moments=moments)).init(_model())
    for name in names:
        moment = state.moments[name]["w"]
        values = jnp.full(moment.codes.shape, large)
        with pytest.raises(ValueError, match="too large for the scales"):
            moment.encode(values)
        with pytest.raises(Exception, match="too large for the scales"):
            jax.block_until_ready(_encode(moment, values))
    with pytest.raises(ValueError, match=r"`map_moments`: .*too large for the scales"):
        fq.map_moments(lambda m: m + large, state)


def test_map_moments(trained):
    _, _, state = trained
    unchanged = fq.map_moments(lambda m: m, state)
    assert tree_identical(unchanged, state)
    mask = {"w": jnp.arange(8)[:, None] % 2 == 0, "b": jnp.arange(8) % 2 == 0}
    reset = lambda state: fq.map_moments(
        lambda m, d: jnp.where(d, 0, m), state, mask, names="mu"
    )
    found = reset(state)
    # Groups lie along rows, or the leaf is flattened with rows of whole groups.
    dead = np.arange(8) % 2 == 0
    for key in ("w", "b"):
        before, after = (_decoded(s.moments["mu"][key]) for s in (state, found))
        assert not np.any(after[dead])
        np.testing.assert_allclose(after[~dead], before[~dead], rtol=0.02)
    assert tree_identical(found.moments["nu"], state.moments["nu"])
    assert tree_identical(eqx.filter_jit(reset)(state), found)


def _decoded(stored):
    stored = _decode(stored) if isinstance(stored, fq.QuantMoment) else stored
    return np.asarray(stored)


def test_map_moments_in_wrappers():
    optim = fq.adamw(1e-3)
    model = _model()
    half = lambda state: fq.map_moments(lambda m, c: c * m, state, 0.5)
    _, state = _trained(optim, model, steps=1)
    is_state = lambda x: isinstance(x, fq.OptimizerState)
    expected = half(state)
    for wrapped in (
        optax.chain(optax.identity(), optim),
        optax.MultiSteps(optim, 2),
        optax.partition({"all": optim}, {"w": "all", "b": "all"}),
    ):
        tree = wrapped.init(model)
        tree = jtu.tree_map(
            lambda x: state if is_state(x) else x, tree, is_leaf=is_state
        )
        found = [
            x for x in jtu.tree_leaves(half(tree), is_leaf=is_state) if is_state(x)
        ]
        assert len(found) == 1 and tree_identical(found[0], expected)


@pytest.mark.usefixtures("without_typechecker")
def test_errors_of_map_moments():
    optim = fq.adamw(1e-3)
    model = _model()
    state = optim.init(model)
    for arguments, names, kind, part in (
        (((),), None, TypeError, "OptimizerState"),
        ((state, {"w": 1.0}), None, ValueError, "nothing at `['b']`"),
        ((state, {"w": 1.0}), None, ValueError, "or a state of the same kind"),
        ((state, fq.lion(1e-3).init(model)), None, ValueError, "no moment 'nu'"),
        ((state,), "v", ValueError, "'mu', 'nu'"),
    ):
        with pytest.raises(kind) as info:
            fq.map_moments(lambda m, *_: m, *arguments, names=names)
        assert "`map_moments" in str(info.value) and part in str(info.value)
    with pytest.raises(TypeError, match="takes a function first; got an object"):
        fq.map_moments(state, lambda m: m)  # pyright: ignore
    for function, part in (
        (lambda m: m[:3], "got (3,"),
        (lambda m: m - 1, "at least 0"),
        (lambda m: None, "NoneType"),
    ):
        with pytest.raises((ValueError, TypeError)) as info:
            fq.map_moments(function, state, names="nu")
        assert "the function returned" in str(info.value)
        assert part in str(info.value)


def test_reset_neurons_train_as_in_optax(trained):
    optim, model, state = trained
    dead = {"w": (jnp.arange(8) % 4 == 0)[:, None], "b": jnp.arange(8) % 4 == 0}
    # Neurons in columns share groups with others.
    mixed = {"w": (jnp.arange(96) % 5 == 0)[None, :], "b": dead["b"]}
    reference = optax.adamw(1e-3)
    for mask, bound in ((dead, 0.05), (mixed, 0.3)):
        reset = fq.map_moments(lambda m, d: jnp.where(d, 0, m), state, mask)
        weights = fq.master_weights(model, state)
        now = {
            key: jtu.tree_map(
                lambda x, d: jnp.where(d, 0, _decoded(x)),
                state.moments[key],
                mask,
                is_leaf=lambda x: isinstance(x, fq.QuantMoment),
            )
            for key in ("mu", "nu")
        }
        theirs: Any = reference.init(weights)
        theirs = (theirs[0]._replace(count=state.count, **now), *theirs[1:])
        grads = _grads(model, 99)
        step = eqx.filter_jit(optim.step)
        new, new_state = step(model, reset, grads)
        wide = jtu.tree_map(lambda g: g.astype(jnp.float32), grads)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = reference.update(wide, theirs, weights)
        moved = jtu.tree_map(jnp.subtract, fq.master_weights(new, new_state), weights)
        for key in ("w", "b"):
            where = np.broadcast_to(np.asarray(mask[key]), moved[key].shape)
            want, got = (np.asarray(t[key])[where] for t in (updates, moved))
            # In a group with others, 0 is stored as their smallest code: elements with
            # small gradients move by less.
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            assert error < bound, (key, error)
            # Never by more.
            assert np.max(np.abs(got)) <= 1.05 * np.max(np.abs(want))


@pytest.mark.product
def test_grown_rows(trained):
    # Two more neurons, as of a vocabulary: new rows begin at zero, old ones go on.
    optim, model, state = trained
    grow = lambda old, like: jnp.zeros(like.shape, old.dtype).at[: len(old)].set(old)

    @jax.jit
    def run(model, state, like):
        weights = fq.master_weights(model, state)
        bigger = jtu.tree_map(grow, weights, like)
        new, empty = fq.from_master_weights(bigger, like, optim.init(like))
        grown = fq.map_moments(lambda new, old: grow(old, new), empty, state)
        grown = eqx.tree_at(lambda s: s.steps, grown, state.steps)
        return grown, weights, fq.master_weights(new, grown)

    grown, weights, found = run(model, state, _model(rows=10))
    assert tree_identical(
        jtu.tree_map(lambda x: np.asarray(x)[:8], found), jax.device_get(weights)
    )
    for name in ("mu", "nu"):
        for key in ("w", "b"):
            before, after = (_decoded(s.moments[name][key]) for s in (state, grown))
            assert not np.any(after[8:])
            np.testing.assert_allclose(after[:8], before, rtol=0.07, atol=1e-9)


def test_a_moment_is_a_pytree_that_is_not_changed(trained):
    _, _, state = trained
    for moment in _quant(state):
        paths, treedef = jtu.tree_flatten_with_path(moment)
        leaves = [x for _, x in paths]
        assert [jtu.keystr(path) for path, _ in paths][:2] == [".codes", ".scales"]
        assert treedef == jtu.tree_structure(moment)
        new = treedef.unflatten(leaves)
        static = dataclasses.replace(new, axes=(-2,))
        assert new == moment and jtu.tree_structure(static) != treedef
        assert all(map(operator.is_, jtu.tree_leaves(new), leaves))
        with pytest.raises(AttributeError):
            moment.codes = moment.scales
        for copied in (copy.deepcopy(moment), pickle.loads(pickle.dumps(moment))):
            assert copied == moment and repr(copied) == repr(moment)
        assert "i8[8,96]" in repr(moment) or "u8[8,96]" in repr(moment)


def test_moments_know_their_bases_in_a_state_that_a_program_returned(trained):
    # Also where JAX takes them out, not `state.moments`.
    _, _, state = trained
    returned = jax.jit(lambda state: state)(state)
    names = {x.relative_to for x in _quant(returned)}
    for moment, same in zip(_quant(returned), _quant(state), strict=True):
        np.testing.assert_array_equal(moment.decode(), same.decode())
        base = None if moment.relative_to is None else returned.moments["nu"]["w"]
        assert base is _base(moment)
    assert names in ({None, "nu"}, set(), {None}), names


def test_a_state_is_a_pytree_that_is_not_changed(trained):
    _, _, state = trained
    paths, treedef = jtu.tree_flatten_with_path(state)
    names = [jtu.keystr(path) for path, _ in paths]
    assert names[0] == ".steps.count" and names[-1] == ".corrections['w']"
    assert treedef == jtu.tree_structure(state)
    # What a copy knows of the structure of a state is not that of the next one.
    is_moment = lambda x: isinstance(x, fq.QuantMoment)
    moments = iter(jtu.tree_leaves(state, is_leaf=is_moment))
    empty = jtu.tree_map(lambda _: 0, state, is_leaf=is_moment)
    assert empty != state
    filled = jtu.tree_map(lambda _: next(moments), empty)
    for copied in (filled, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert copied == state and jtu.tree_structure(copied) == treedef
        assert repr(copied) == repr(state)
        for moment in _quant(copied):
            assert _base(moment) is None or _base(moment) in _quant(copied)
    for name in ("moments", "steps", "unknown"):
        with pytest.raises(AttributeError):
            setattr(state, name, None)
