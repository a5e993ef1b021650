"""Companding curves, chosen and learned. What all codecs have in common is in
`test_codec`."""

import functools as ft
import io
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flashquinox as fq
from flashquinox._backends import learning
from flashquinox._sharding import parts
from flashquinox._storage import rational_learner
from flashquinox._storage.layout import Layout
from flashquinox._storage.learned_codec import Observation
from flashquinox._storage.rational_learner import RationalLearner
from flashquinox._storage.scales import decode_scale
from flashquinox.checkpoint import Checkpoints

from ..helpers import assert_code_of, EAGER, float64, roundtrip, slow, tree_identical
from ..kernels import arrays, assert_same, run


# The first step that learns.
_EARLY = min(learning._INTERVALS)


_CURVES = {
    "linear": fq.RationalCurve(0.0),
    "softsign": fq.RationalCurve(1.0),
    "steep": fq.RationalCurve(1000.0, root=2),
    "fourth root": fq.RationalCurve(0.0, root=4),
    "learned": fq.RationalCurve(3.0, root=4, learned=True),
    "mu-law": fq.MuLawCurve(),
}
_curves = pytest.mark.parametrize("curve", _CURVES.values(), ids=_CURVES)
_kinds = pytest.mark.parametrize("kind", ["signed", "nonnegative"])


def _moments(kind: str, shape=(40, 64), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.uniform(-20, 20, (*shape[:-1], 1)))
    x = x * np.exp2(rng.uniform(-15, 0, shape))
    x[0], x[1, ::2] = 0, 0
    return (x * x if kind == "nonnegative" else x).astype(np.float32)


@_kinds
@_curves
def test_codes_are_rounded_once(kind, curve):
    """To the documented curve."""
    codec = fq.CompandedCodec(kind, curve)
    x = _moments(kind)
    for layout in (Layout(x.shape, -1, 32), Layout(x.shape, -2, 16)):
        for count in (0, 1, 7):
            stored, decoded = roundtrip(codec, layout, x, count)
            assert_code_of(stored, x)
            if kind == "signed":
                assert not np.any(decoded[x == 0])
                assert not np.any(np.sign(decoded) * np.sign(x) < 0)
            else:
                group = layout.tile(jnp.asarray(x)).max(axis=layout.tile_axis) > 0
                tile = layout.tile(jnp.asarray(decoded))
                nonzero = jnp.all(tile > 0, axis=layout.tile_axis)
                assert np.array_equal(nonzero, group)


@_curves
def test_compress_is_the_inverse_of_expand(curve):
    y = jnp.linspace(0, 1, 1001)
    if isinstance(curve, fq.RationalCurve) and curve.initial is not None:
        curve = curve.at(jnp.float32(curve.initial))
    n = curve.expand(y)
    assert n[0] == 0 and np.all(np.diff(n) > 0)
    np.testing.assert_allclose(n[-1], 1, rtol=2**-20)
    # Of steep curves, the last codes are close together: what rounding does to n comes
    # back times the slope.
    slope = np.gradient(float64(y), float64(n))
    error = np.abs(float64(curve.compress(n)) - float64(y))
    assert np.all(error <= 2**-21 + slope * float64(n) * 2**-21)


def test_families():
    """Names and parameters that stand for the same curve."""
    x = jnp.linspace(0, 1, 101)
    np.testing.assert_allclose(fq.RationalCurve(1.0).compress(x), 2 * x / (1 + x))
    assert np.array_equal(fq.RationalCurve(0.0).compress(x), x)
    learned = fq.RationalCurve(learned=True)
    for a in (0.0, 1.0, 7.5):
        found = learned.at(jnp.float32(a)).compress(x)
        np.testing.assert_allclose(found, (1 + a) * x / (1 + a * x), rtol=2**-22)
        fixed = fq.RationalCurve(a).compress(x)
        np.testing.assert_allclose(found, fixed, rtol=2**-22)
    for name, root in (("linear", 1), ("sqrt", 2), ("fourth_root", 4)):
        codecs = fq.MomentCodecs.named(name)
        assert codecs.signed.curve == fq.RationalCurve(0.0, root)
        assert codecs.nonnegative.curve == fq.RationalCurve(0.0, root)


def test_pairs_of_names():
    pair = fq.MomentCodecs.named(("learned", "flashquinox"))
    assert pair.signed == fq.MomentCodecs.named("learned").signed
    assert pair.nonnegative == fq.FittedLogCodec()
    params = arrays({"w": (4, 64)}, jnp.bfloat16, 0)
    state = fq.adamw(
        1e-3, storage=fq.Storage(moments=("softsign", "fourth_root"))
    ).init(params)
    assert state.moments["mu"]["w"].codec == fq.SoftsignCodec()
    assert state.moments["nu"]["w"].codec.curve.root == 4
    for bad in (("learned", "cubic"), "cubic"):
        with pytest.raises(
            ValueError, match=r"`Storage\(moments=\.\.\.\)` must be one"
        ):
            fq.lion(1e-3, storage=fq.Storage(moments=bad))


def test_wrong_curves():
    for a, root in ((-0.5, 1), (math.nan, 1), (math.inf, 2), (1.0, 3)):
        with pytest.raises(ValueError, match="`a` must be at least 0"):
            fq.RationalCurve(a, root)
    with pytest.raises(ValueError, match="`mu` must be more than 0"):
        fq.MuLawCurve(0.0)


@pytest.mark.usefixtures("without_typechecker")
def test_wrong_kinds():
    companded = lambda kind: fq.CompandedCodec(kind, fq.MuLawCurve(255.0))
    for name, make in (
        ("CompandedCodec", companded),
        ("FlashOptimCodec", fq.FlashOptimCodec),
    ):
        message = rf"`{name}\(kind=\.\.\.\)` must be 'signed' .* got 'sgned'"
        with pytest.raises(ValueError, match=message):
            make("sgned")


#
# Kernels
#

_SHAPES = {"stack": (2, 32, 200)}


@pytest.mark.parametrize(
    "backend, name",
    [
        ("tpu", "fourth_root"),
        ("tpu", "log"),
        ("gpu", "log"),
        ("gpu", "learned"),
        slow("tpu", "learned"),
        slow("gpu", "fourth_root"),
    ],
)
def test_kernels_are_plain_xla(backend, name):
    """Of all operations that curves are made of."""
    grads = [arrays(_SHAPES, jnp.bfloat16, seed) for seed in (1, 2)]
    make = ft.partial(fq.adamw, 1e-2, storage=fq.Storage(moments=name))
    params = arrays(_SHAPES, jnp.bfloat16, 0)
    run(backend, make, params, grads)


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_kernels_learn(backend):
    """Each leaf has a parameter of its own, in a step that changes it: of leaves that
    share a kernel, which were not learned alike."""
    shapes = {name: (32, 128) for name in "ab"}
    params = arrays(shapes, jnp.bfloat16, 0)
    plain, kernel = (
        fq.adamw(1e-2, storage=fq.Storage(moments="learned"), backend=x)
        for x in ("xla", backend)
    )
    params, state = _train(plain, params, _EARLY, kernel.init(params))
    state = eqx.tree_at(
        lambda s: [s.moments["mu"][x].parameter for x in "ab"],
        state,
        [jnp.float32(0.5), jnp.float32(4.0)],
    )
    grads = arrays(shapes, jnp.bfloat16, 99)
    results = [jax.jit(x.step)(params, state, grads) for x in (kernel, plain)]
    assert _parameters(results[0][1]) == _parameters(results[1][1])
    old, new = _parameters(state), _parameters(results[0][1])
    assert new[0] != new[1] and all(x != y for x, y in zip(old[:2], new, strict=False))
    assert_same(*results, params, state, grads)


#
# Learning
#


def _fit(kind: str, x: np.ndarray, root: int, start: float, fits: int = 60):
    """The parameter after so many fits, each of codes made with the last one."""
    codec = fq.CompandedCodec(kind, fq.RationalCurve(1.0, root, learned=True))
    dither = fq.Dither(jnp.float32(0.5), jnp.uint32(2**15))

    @jax.jit
    def fit(_, a):
        encoder = codec.with_parameter(a)
        codes, scales = encoder.encode(jnp.asarray(x), -1, dither)
        of_elements = jnp.broadcast_to(scales[:, None], codes.shape)
        constants = encoder.decode_constants(of_elements, None, jnp.float32)
        n, _ = encoder.observe(codes, constants, jnp.float32)
        n = n.ravel()
        observed = Observation(n, jnp.zeros_like(n))
        errors = RationalLearner.errors([codec.learner], [observed], a[None])
        return RationalLearner.follow(a[None], errors)[0]

    return float(jax.lax.fori_loop(0, fits, fit, jnp.float32(start)))


def _error(kind: str, x: np.ndarray, root: int, a: float) -> float:
    """What is stored, less what was: for a signed moment, the square error in units of
    the scale; for an average of squares, the relative one of its root, at most 1."""
    codec = fq.CompandedCodec(kind, fq.RationalCurve(a, root))
    errors = []
    for count in range(8):
        _, decoded = roundtrip(codec, Layout(x.shape, -1, 32), x, count)
        largest = np.max(np.abs(float64(x)), axis=-1, keepdims=True)
        error = (float64(decoded) - float64(x)) / largest
        if kind == "nonnegative":
            error = np.minimum(np.abs(np.sqrt(float64(x) / float64(decoded)) - 1), 1)
        errors.append(np.mean(error**2))
    return float(np.mean(errors))


_PARAMETERS = [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]


@_kinds
@pytest.mark.parametrize("spread", [0, slow(2), 8])
def test_learned_is_as_good_as_any_fixed(kind, spread):
    """Of its family, found by a search; on moments of one size and of many."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 32)) * np.exp2(rng.uniform(-spread, 0, (256, 32)))
    x = (x * x if kind == "nonnegative" else x).astype(np.float32)
    root = 1 if kind == "signed" else 2
    learned = _error(kind, x, root, _fit(kind, x, root, 1.0))
    errors = {a: _error(kind, x, root, a) for a in _PARAMETERS}
    # The criterion is of the smooth error, the comparison of the real one of a fixed
    # sample: 8,192 elements, whose mean square is known to about 2 %.
    assert learned <= 1.02 * min(errors[0.0], errors[1.0])
    # It stays with softsign, or where it is, if there is no more to be had.
    most = 1 + max(rational_learner._WORTH, rational_learner._WORTH_OF_SOFTSIGN)
    assert learned <= most * 1.02 * min(errors.values())


@_kinds
def test_the_start_does_not_matter(kind):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 32)) * np.exp2(rng.uniform(-8, 0, (256, 32)))
    x = (x * x if kind == "nonnegative" else x).astype(np.float32)
    found = [_fit(kind, x, 1, start) for start in (0.0, 1.0, 200.0)]
    # Codes are integers: an optimum is as wide as the square root of their error.
    np.testing.assert_allclose(np.log1p(found), np.log1p(found[0]), atol=0.2)


def test_nothing_is_learned_from_nothing():
    """Nor from what is not finite."""
    codec = fq.MomentCodecs.named("learned").signed
    zeros = jnp.zeros(64)
    old = jnp.float32([2.5])
    for n, weight in [(0.0, 1.0), (0.0, np.nan), (np.nan, 1.0)]:
        observed = Observation(zeros + n, zeros + weight)
        errors = RationalLearner.errors([codec.learner], [observed], old)
        assert tree_identical(RationalLearner.follow(old, errors), old)
    # Where no weight is finite, the moment's own error counts.
    observed = Observation(zeros + 0.01, zeros + np.inf)
    errors = RationalLearner.errors([codec.learner], [observed], old)
    assert RationalLearner.follow(old, errors)[0] > old[0]


def test_parameters_move_where_it_is_worth_it():
    """Of the error of one element, which is (1 + a n)^4 / (1 + a)^2, the smallest is at
    a = 1 / n - 2."""
    codec = fq.MomentCodecs.named("learned").signed

    def follow(best: float, start: float) -> float:
        observed = Observation(jnp.full(8, 1 / (best + 2)), jnp.ones(8))
        old = jnp.float32([start])
        errors = RationalLearner.errors([codec.learner], [observed], old)
        (new,) = RationalLearner.follow(old, errors)
        return float(new)

    # The slope is 0 there, to a rounding; and the curvature about 1.
    assert follow(8.0, 4.0) == pytest.approx(8.0, abs=1e-2)
    assert follow(8.0, 14.0) == pytest.approx(8.0, abs=1e-2)
    # From far away in steps.
    assert follow(8.0, 1.0) == pytest.approx(2 * math.e - 1, rel=1e-5)
    assert follow(8.0, 100.0) == pytest.approx(101 / math.e - 1, rel=1e-5)
    # By less than 10 % of the error, and to something that is no better than softsign.
    assert follow(8.0, 8.4) == np.float32(8.4)
    assert follow(1.2, 1.0) == 1.0
    assert follow(1.2, 3.0) == pytest.approx(1.0)


def test_sparse_moments_are_not_rounded_again():
    codec = fq.MomentCodecs.named("learned").signed
    n = jnp.full(100, 0.01)
    old = jnp.float32([1.0])
    for zeros, padding, moves in [(20, 0, True), (30, 0, False), (0, 80, True)]:
        one = n.at[:zeros].set(0).at[zeros : zeros + padding].set(-1)
        observed = Observation(one, jnp.where(one > 0, 1.0, one))
        errors = RationalLearner.errors([codec.learner], [observed], old)
        assert (RationalLearner.follow(old, errors)[0] > old[0]) == moves


@pytest.mark.parametrize(
    "shape, axis",
    [
        ((5,), None),
        ((70, 3), None),
        ((40, 64), -1),
        ((3, 5000), -1),
        ((3, 5000), None),
        ((1, 100_000), -1),
        ((4, 9, 128), -1),
    ],
)
def test_samples(shape, axis):
    """Of enough elements, from all parts, and with the scales of their groups."""
    layout = Layout(shape, axis, 32)
    size = math.prod(shape)
    numbers = jnp.arange(size, dtype=jnp.int32).reshape(shape)
    along = jnp.arange(size if axis is None else shape[-1], dtype=jnp.int32) // 32
    group = along.reshape(shape) if axis is None else jnp.broadcast_to(along, shape)
    group_of = np.asarray(group).ravel()
    of_groups = np.arange(math.prod(layout.scale_shape), dtype=np.int32)
    seen = set()
    for count in (0, 1, 77):
        elements, groups = learning._places(layout, jnp.asarray(count))
        found = np.asarray(elements(numbers))
        assert len(set(found)) == found.size <= learning._SAMPLE
        assert found.size >= min(size, learning._SAMPLE) / 2
        here = np.asarray(groups(jnp.asarray(of_groups).reshape(layout.scale_shape)))
        assert np.array_equal(here % layout.scale_shape[-1], group_of[found])
        # A part of every axis in every half of it.
        for length, index in zip(shape, np.unravel_index(found, shape), strict=True):
            assert length == 1 or set(index * 2 // length) == {0, 1}
        seen.add(found.tobytes())
    assert len(seen) == 3 or size <= learning._SAMPLE


def test_what_counts_is_the_update():
    """The weights of a sample are what its errors do to updates, by Adam's formula: of
    momentum, its share of m / sqrt(v); of v, half of it."""
    params = arrays({"w": (64, 64)}, jnp.float32, 0)
    optim = fq.adam(
        1e-2, eps=0.0, storage=fq.Storage(moments="learned", master_weight_bits=None)
    )
    params, state = _train(optim, params, 6)
    steps = []
    learn = parts.learn
    with pytest.MonkeyPatch.context() as patch:
        record = lambda x, y: steps.extend(x) or learn(x, y)
        patch.setattr(parts, "learn", record)
        optim.step(params, state, params)
    (step,) = steps
    found = learning.observe(
        ["mu", "nu"], step.structure, step.layout, step.scalars, step.old
    )
    elements, groups = learning._places(step.layout, state.count)
    mu, nu = (state.moments[name]["w"] for name in ("mu", "nu"))
    m, v = (float64(elements(x.decode())) for x in (mu, nu))
    units = [float64(decode_scale(groups(x.scales))) for x in (mu, nu)]
    for observed, x, unit, root in zip(found, (m, v), units, (1, 2), strict=True):
        n = (np.abs(x) / unit) ** (1 / root)
        np.testing.assert_allclose(
            float64(observed.n)[: n.size], n, rtol=1e-4, atol=1e-7
        )
    # b1 m / sqrt(b2 v), up to a factor that all have in common.
    update = 0.9 * m / np.sqrt(0.999 * v)
    relative = [
        (np.sqrt(float64(x.weight)) * float64(x.n) ** root)[: update.size]
        for x, root in zip(found, (1, 2), strict=True)
    ]
    large = np.abs(update) > 1e-3 * np.max(np.abs(update))
    ratios = [x[large] / np.abs(update[large]) for x in relative]
    np.testing.assert_allclose(ratios[0], ratios[0][0], rtol=1e-3)
    np.testing.assert_allclose(ratios[1], ratios[0] / 2, rtol=1e-2)


def _train(optim: fq.Optimizer, params, steps: int, state=None, first: int = 0):
    state = optim.init(params) if state is None else state
    step = eqx.filter_jit(optim.step)
    shapes = {name: x.shape for name, x in params.items()}
    for seed in range(first, first + steps):
        grads = arrays(shapes, jnp.bfloat16, 1 + seed)
        params, state = step(params, state, grads)
    return params, state


def _parameters(state) -> list[float]:
    is_moment = lambda x: isinstance(x, fq.QuantMoment)
    moments = jtu.tree_leaves(state.moments, is_leaf=is_moment)
    return [float(x.parameter) for x in moments if is_moment(x)]


def test_steps_learn():
    optim = fq.adamw(1e-2, storage=fq.Storage(moments="learned"))
    params = arrays({"w": (64, 64)}, jnp.bfloat16, 0)
    first = _parameters(optim.init(params))
    assert first == [1.0, 1.0]
    # From the codes of a step before it, on those that are due.
    params, state = _train(optim, params, _EARLY)
    assert _parameters(state) == first
    params, state = _train(optim, params, 1, state, 20)
    assert _parameters(state)[0] != first[0]
    learned = _parameters(state)
    params, state = _train(optim, params, _EARLY - 1, state, 30)
    assert _parameters(state) == learned


def test_a_parameter_belongs_to_its_codes():
    """In the step that changes it, old codes are decoded by the old one."""
    params = arrays({"w": (64, 64)}, jnp.bfloat16, 0)
    optim = fq.sgd(
        1e-2, momentum=0.9, storage=fq.Storage(moments=EAGER), weight_decay=0.0
    )
    params, state = _train(optim, params, _EARLY)
    before = state.moments["trace"]["w"]
    zeros = jtu.tree_map(jnp.zeros_like, params)
    _, state = optim.step(params, state, zeros)
    after = state.moments["trace"]["w"]
    assert abs(float(after.parameter) - float(before.parameter)) > 0.05
    exact = np.float32(0.9) * np.asarray(before.decode())
    assert_code_of(after, exact, atol=2.0**-22 * np.abs(exact))


def test_skipped_steps_learn_nothing():
    params = arrays({"w": (64, 64)}, jnp.bfloat16, 0)
    optim = fq.adamw(1e-2, storage=fq.Storage(moments=EAGER), skip_nonfinite=True)
    params, state = _train(optim, params, _EARLY)
    bad = {"w": params["w"].at[0, 0].set(jnp.nan)}
    assert tree_identical(optim.step(params, state, bad), (params, state))


def test_sharded_learning():
    """All devices find the same parameter, by one collective, and only in the steps
    that learn."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec("x")))
    params = {"a": jnp.ones((128, 64), jnp.bfloat16), "b": jnp.ones((8, 32))}
    grads = arrays({"a": (128, 64), "b": (8, 32)}, jnp.float32, 1)
    params, grads = place((params, grads))
    optim = fq.adamw(
        1e-2, storage=fq.Storage(moments="learned", master_weight_bits=None)
    )
    state = optim.init(params)
    step = eqx.filter_jit(optim.step)
    for _ in range(2 * _EARLY):
        params, state = step(params, state, grads)
    for moment in state.moments.values():
        for name in "ab":
            parameter = moment[name].parameter
            assert parameter.sharding.is_fully_replicated
            shards = {float(x.data) for x in parameter.addressable_shards}
            assert len(shards) == 1
    assert _parameters(state)[0] != 1.0
    text = jax.jit(optim.step).lower(params, state, grads).compile().as_text() or ""
    assert text.count(" all-reduce(") == 1 and "all-gather" not in text
    assert " conditional(" in text


def test_ensembles_learn_for_themselves():
    shapes = {"w": (2, 32, 64)}
    params = arrays(shapes, jnp.bfloat16, 0)
    optim = fq.adamw(1e-2, storage=fq.Storage(moments="learned"))
    state = jax.vmap(optim.init)(params)
    step = jax.jit(jax.vmap(optim.step))
    single = [jtu.tree_map(lambda x, i=i: x[i], (params, state)) for i in (0, 1)]
    alone = jax.jit(optim.step)
    # Elements of a group differ in size, and more in one member.
    sizes = 2.0 ** -(np.array([4, 8])[:, None, None] * np.linspace(0, 1, 64))
    for seed in range(6 * _EARLY + 1):
        grads = {"w": arrays(shapes, jnp.bfloat16, seed)["w"] * jnp.bfloat16(sizes)}
        params, state = step(params, state, grads)
        for i in (0, 1):
            grad = jtu.tree_map(lambda x, i=i: x[i], grads)
            single[i] = alone(*single[i], grad)
    found = state.moments["mu"]["w"].parameter
    assert found.shape == (2,) and 1 < found[0] < found[1]
    for i in (0, 1):
        expected = single[i][1].moments["mu"]["w"].parameter
        # Sums in another order.
        np.testing.assert_allclose(found[i], expected, rtol=2**-12)


def test_checkpoints_keep_parameters(tmp_path):
    params = arrays({"w": (64, 64)}, jnp.bfloat16, 0)
    optim = fq.adamw(1e-2, storage=fq.Storage(moments="learned"))
    params, state = _train(optim, params, _EARLY + 1)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    like = optim.init(params)
    assert tree_identical(eqx.tree_deserialise_leaves(file, like), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, params, state)
        restored = checkpoints.restore(params, like)
        assert tree_identical(restored[1], state)
        # Of groups that lie elsewhere: with the parameter of the codes.
        other = fq.adamw(
            1e-2, storage=fq.Storage(moments="learned"), backend="tpu"
        ).init(params)
        _, regrouped = checkpoints.restore(params, other)
    assert _parameters(regrouped) == _parameters(state)
    moment = regrouped.moments["mu"]["w"]
    exact = np.asarray(state.moments["mu"]["w"].decode())
    assert moment.axis == -2
    assert_code_of(moment, exact)


def test_optax_and_scans():
    params = arrays({"w": (64, 64)}, jnp.bfloat16, 0)
    optim = optax.chain(
        optax.clip_by_global_norm(1.0),
        fq.adamw(1e-2, storage=fq.Storage(moments="learned")),
    )
    grads = arrays({"w": (64, 64)}, jnp.bfloat16, 1)

    def body(carry, _):
        params, state = carry
        updates, state = optim.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (_, state), _ = jax.lax.scan(body, (params, optim.init(params)), length=9)
    assert _parameters(state[1])[0] != 1.0
