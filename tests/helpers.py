"""The one table of cases over which the tests parametrize, and what they share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import optax.contrib
import pytest
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float32, PyTree, UInt32

import flashquinox as fq
from flashquinox._storage.layout import Layout
from flashquinox._storage.quant_moment import zeros
from flashquinox._storage.scales import decode_scale


#
# The table
#


class OptimizerCase(NamedTuple):
    # `make(learning_rate, **storage)`.
    make: Callable[..., fq.Optimizer]
    # What it is in Optax; of the same names of moments.
    reference: Callable[..., optax.GradientTransformation]


def _l2(weight_decay: float, optimizer: optax.GradientTransformation):
    return optax.chain(optax.add_decayed_weights(weight_decay), optimizer)


def _sgdw(learning_rate, momentum: float, weight_decay: float):
    return optax.chain(
        optax.trace(momentum),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


class _ScheduleFree(NamedTuple):
    count: Any
    nu: Any
    offset: Any


def _schedule_free(learning_rate, b1: float = 0.9, **kwargs: Any):
    """Optax's, with a state that has the names of this library: `offset`, and no `z`.
    All steps weigh the same."""
    inner = optax.contrib.schedule_free_adamw(
        learning_rate, b1=b1, weight_lr_power=0.0, **kwargs
    )

    def init(params):
        zeros = jtu.tree_map(jnp.zeros_like, params)
        return _ScheduleFree(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads, state, params):
        z = jtu.tree_map(lambda y, e: y - b1 / (1 - b1) * e, params, state.offset)
        there = inner.init(params)
        sums = state.count.astype(there.weight_sum.dtype)
        for name, value in {"count": state.count, "nu": state.nu}.items():
            there = optax.tree.set(there, **{name: value})
        there = there._replace(z=z, weight_sum=sums, step_count=state.count + 1)
        updates, there = inner.update(grads, there, params)
        y = optax.apply_updates(params, updates)
        x = optax.contrib.schedule_free_eval_params(there, y)
        offset = jtu.tree_map(jnp.subtract, x, y)
        nu = optax.tree.get(there, "nu")
        return updates, _ScheduleFree(state.count + 1, nu, offset)

    return optax.GradientTransformation(init, update)


class _Adafactor(NamedTuple):
    count: Any
    v_row: Any
    v_col: Any
    v: Any


def _adafactor(learning_rate, smallest: int, **kwargs: Any):
    """Optax's, with a state as of this library: axes over which there are means are
    kept with length 1, and there is `None` where Optax has a stand-in."""
    inner = optax.adafactor(learning_rate, smallest, **kwargs)

    def shapes(x):
        row, column = [*np.argsort(x.shape, kind="stable")[-2:], 0, 0][:2]
        if x.ndim < 2 or x.shape[row] < smallest:
            return None, None, x.shape
        mean = lambda axis: (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        return mean(column), mean(row), None

    def of_shapes(params, make):
        each = {key: shapes(x) for key, x in params.items()}
        return [
            {k: None if x[i] is None else make(i, k, x[i]) for k, x in each.items()}
            for i in range(3)
        ]

    def init(params):
        make = lambda i, key, shape: jnp.zeros(shape, params[key].dtype)
        return _Adafactor(jnp.zeros((), jnp.int32), *of_shapes(params, make))

    def update(grads, state, params):
        there = inner.init(params)
        names = state._fields[1:]
        like = {name: optax.tree.get(there, name) for name in names}
        reshaped = lambda own, x: x if own is None else own.reshape(x.shape)
        given = {
            name: {k: reshaped(getattr(state, name)[k], x) for k, x in of.items()}
            for name, of in like.items()
        }
        there = optax.tree.set(there, count=state.count, **given)
        updates, there = inner.update(grads, there, params)
        found = [optax.tree.get(there, name) for name in names]
        make = lambda i, key, shape: found[i][key].reshape(shape)
        return updates, _Adafactor(state.count + 1, *of_shapes(params, make))

    return optax.GradientTransformation(init, update)


OPTIMIZERS = {
    "adafactor": OptimizerCase(
        partial(fq.adafactor, min_dim_size_to_factor=5, weight_decay_rate=0.01),
        partial(_adafactor, smallest=5, weight_decay_rate=0.01),
    ),
    "adafactor-whole": OptimizerCase(
        partial(fq.adafactor, multiply_by_parameter_scale=False),
        partial(_adafactor, smallest=128, multiply_by_parameter_scale=False),
    ),
    "adamw": OptimizerCase(
        partial(fq.adamw, weight_decay=0.1), partial(optax.adamw, weight_decay=0.1)
    ),
    "adamw-nesterov": OptimizerCase(
        partial(fq.adamw, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1, nesterov=True),
        partial(
            optax.adamw, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1, nesterov=True
        ),
    ),
    "adam": OptimizerCase(
        partial(fq.adam, weight_decay=0.1), lambda lr: _l2(0.1, optax.adam(lr))
    ),
    # With this b2, Optax's formula is that of the paper.
    "adan": OptimizerCase(
        partial(fq.adan, b2=0.5, weight_decay=0.1),
        partial(optax.adan, b2=0.5, weight_decay=0.1),
    ),
    "ademamix": OptimizerCase(
        partial(fq.ademamix, b3=0.99, weight_decay=0.1),
        partial(optax.contrib.ademamix, b3=0.99, weight_decay=0.1),
    ),
    "lamb": OptimizerCase(
        partial(fq.lamb, weight_decay=0.1), partial(optax.lamb, weight_decay=0.1)
    ),
    "lars": OptimizerCase(
        partial(fq.lars, weight_decay=0.1, trust_coefficient=0.5),
        partial(optax.lars, weight_decay=0.1, trust_coefficient=0.5),
    ),
    "lion": OptimizerCase(
        partial(fq.lion, weight_decay=0.1), partial(optax.lion, weight_decay=0.1)
    ),
    "rmsprop": OptimizerCase(
        partial(fq.rmsprop, weight_decay=0.1), lambda lr: _l2(0.1, optax.rmsprop(lr))
    ),
    "rmsprop-momentum": OptimizerCase(
        partial(fq.rmsprop, eps=1e-3, momentum=0.9),
        partial(optax.rmsprop, eps=1e-3, momentum=0.9),
    ),
    "schedule-free": OptimizerCase(
        partial(fq.schedule_free_adamw, weight_decay=0.1),
        partial(_schedule_free, weight_decay=0.1),
    ),
    "sgd": OptimizerCase(fq.sgd, optax.sgd),
    "sgd-momentum": OptimizerCase(
        partial(fq.sgd, momentum=0.9, weight_decay=0.1),
        lambda lr: _l2(0.1, optax.sgd(lr, momentum=0.9)),
    ),
    "sgd-nesterov": OptimizerCase(
        partial(fq.sgd, momentum=0.9, nesterov=True),
        partial(optax.sgd, momentum=0.9, nesterov=True),
    ),
    "sgdw": OptimizerCase(
        partial(fq.sgdw, momentum=0.9, weight_decay=0.1),
        partial(_sgdw, momentum=0.9, weight_decay=0.1),
    ),
}


class Storage(NamedTuple):
    dtype: DTypeLike
    master_weight_bits: Literal[24, 32] | None
    moments: str


_WIDTHS = [
    (jnp.bfloat16, 24),
    (jnp.bfloat16, 32),
    (jnp.bfloat16, None),
    (jnp.float16, 24),
    (jnp.float16, 32),
    (jnp.float32, None),
]
STORAGES = [
    Storage(dtype, bits, moments)
    for dtype, bits in _WIDTHS
    for moments in ("flashquinox", "flashoptim", "float32")
]
OURS = Storage(jnp.bfloat16, 24, "flashquinox")

SHAPES = {
    "scalar": (),
    "empty": (0,),
    "bias": (37,),
    "matrix": (4, 64),
    "ragged": (64, 5),
    "kernel": (3, 2, 3, 3),
}


class Case(NamedTuple):
    name: str
    storage: Storage

    def optimizer(
        self,
        learning_rate: Any,
        stored: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> fq.Optimizer:
        """`stored` are arguments of `fq.Storage` beside those of this case."""
        fields = {
            "master_weight_bits": self.storage.master_weight_bits,
            "moments": self.storage.moments,
        }
        storage = fq.Storage(**(fields | dict(stored)))
        return OPTIMIZERS[self.name].make(learning_rate, storage=storage, **kwargs)

    def reference(self, learning_rate: Any) -> optax.GradientTransformation:
        return OPTIMIZERS[self.name].reference(learning_rate)

    def weights(self, *names: str, seed: int = 0) -> dict[str, Array]:
        return weights(*names, dtype=self.storage.dtype, seed=seed)

    # The options of which tests take pairs.

    @property
    def rule(self) -> str:
        return self.name.partition("-")[0].removesuffix("w")

    @property
    def dtype(self) -> DTypeLike:
        return self.storage.dtype

    @property
    def width(self) -> tuple[DTypeLike, int | None]:
        return self.storage.dtype, self.storage.master_weight_bits

    @property
    def moments(self) -> str:
        return self.storage.moments


# Begins far from what moments want, and so learns as soon as it is due.
EAGER = fq.MomentCodecs(
    fq.CompandedCodec("signed", fq.RationalCurve(8.0, learned=True)),
    fq.CompandedCodec("nonnegative", fq.RationalCurve(8.0, 2, learned=True)),
)


# Of a model with an `in` and a stack of `blocks`, all of them matrices.
RESIDUAL_LOSS = fq.LayeredLoss(
    lambda model: model["blocks"],
    lambda model, batch, key: batch @ model["in"],
    lambda block, x, batch, key: x + jnp.tanh(x @ block),
    lambda model, x, batch, key: jnp.mean(x.astype(jnp.float32) ** 2),
)


def _id(case: Case) -> str:
    dtype, bits, moments = case.storage
    return f"{case.name}-{jnp.dtype(dtype).name}-{bits}-{moments}"


def pairwise(
    cases: Iterable[Case], *pairs: tuple[str, str], known: Iterable[Case] = ()
) -> list[Case]:
    """As few of these cases as it takes, by greed, for any two values of each pair of
    options to be in one of them; beside those that are `known` to be taken. Of cases
    that are worth the same, the first: put those there that take little time."""
    found = list(known)
    of = lambda case: {(x, y, getattr(case, x), getattr(case, y)) for x, y in pairs}
    worth = {case: of(case) for case in [*cases, *found]}
    left = set().union(*worth.values()).difference(*[worth[case] for case in found])
    while left:
        found.append(max(worth, key=lambda case: len(worth[case] & left)))
        left -= worth[found[-1]]
    return found


# Of one moment or none: less to compile.
_FAST = ("lion", "sgd", "sgdw", "sgd-momentum", "sgd-nesterov", "rmsprop", "lars")
_NAMES = sorted(OPTIMIZERS, key=lambda name: name not in _FAST)
CASES = [Case(name, storage) for name in _NAMES for storage in STORAGES]
# Every optimizer with the storage of the defaults; pairs of a rule, a dtype and a
# codec; and of a width and a codec.
_QUICK = pairwise(
    CASES,
    ("rule", "dtype"),
    ("rule", "moments"),
    ("width", "moments"),
    known=[Case(name, OURS) for name in OPTIMIZERS],
)


def is_quick(case: Case) -> bool:
    return case in _QUICK


def slow(*values: Any, unless: bool = False, id: str | None = None):
    """A case that runs with `-m slow`, `unless` it is to run always."""
    return pytest.param(*values, marks=() if unless else pytest.mark.slow, id=id)


def parametrize_cases(
    select: Callable[[Case], bool] = lambda case: True,
    quick: Callable[[Case], bool] = is_quick,
):
    """Over the table. What is not `quick` runs with `-m slow`."""
    cases = [
        slow(case, unless=quick(case), id=_id(case)) for case in CASES if select(case)
    ]
    return pytest.mark.parametrize("case", cases)


def array_of(numbers: ArrayLike, dtype: DTypeLike) -> Array:
    """Numbers that are rounded to float32, then to a dtype: by NumPy, which compiles
    nothing."""
    return jnp.asarray(np.asarray(numbers, np.float32).astype(dtype))


def weights(
    *names: str, dtype: DTypeLike = jnp.bfloat16, seed: int = 0
) -> dict[str, Array]:
    """Weights, or gradients, of these names in `SHAPES`; all if none is named."""
    rng = np.random.default_rng(seed)
    return {
        name: array_of(rng.standard_normal(SHAPES[name]), dtype)
        for name in (names or SHAPES)
    }


#
# Other libraries
#


def have_what_haliax_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Haliax asks JAX for a function that is gone since 0.11. Of what is not symbolic,
    it says yes."""
    if not hasattr(jax.core, "is_constant_dim"):
        monkeypatch.setattr(jax.core, "is_constant_dim", lambda _: True, raising=False)


#
# A rule of a user
#


class HeavyBall(fq.AbstractRule):
    momentum: float | jax.Array = 0.9

    @property
    def moments(self):
        return {"trace": fq.Moment("signed")}

    def scalars(self, count, learning_rate):
        return {"momentum": self.momentum, "step": -learning_rate}

    def update(self, grad, weight, moments, scalars):
        trace = scalars["momentum"] * moments["trace"] + grad
        return scalars["step"] * trace, {"trace": trace}


#
# Bits
#


def bits_of(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    return lax.bitcast_convert_type(x, jnp.uint32)


def float_of(bits: UInt32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return lax.bitcast_convert_type(bits, jnp.float32)


def tree_identical(x: PyTree, y: PyTree) -> bool:
    """Whether two trees agree in structure, dtypes, shapes and every bit."""
    if jtu.tree_structure(x) != jtu.tree_structure(y):
        return False
    return all(map(_identical, jtu.tree_leaves(x), jtu.tree_leaves(y)))


def _identical(x: object, y: object) -> bool:
    if not isinstance(x, (jax.Array, np.ndarray)):
        return x is y or x == y
    x, y = np.asarray(x), np.asarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def assert_raises(
    error: type[Exception], call: Callable[[], object], *parts: str
) -> None:
    """Asserts that this is raised, with all of these parts in its message."""
    with pytest.raises(error) as info:
        call()
    message = str(info.value)
    for part in parts:
        assert part in message, message
    # A sentence that says what to do ends each.
    assert message.rstrip().endswith((".", ")")), message


def float64(x: Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


#
# Codes
#


def roundtrip(
    codec: fq.AbstractMomentCodec,
    layout: Layout,
    moment: ArrayLike,
    count: ArrayLike,
    factor: ArrayLike | None = None,
) -> tuple[Any, np.ndarray]:
    """A moment, times a factor, as it is stored at step `count`; and decoded again."""
    moment, count = jnp.asarray(moment), jnp.asarray(count)
    factor = None if factor is None else jnp.asarray(factor, moment.dtype)
    stored, decoded = _roundtrip(codec, layout, moment, count, factor)
    traced = isinstance(decoded, jax.core.Tracer)
    return stored, decoded if traced else np.asarray(decoded)


@eqx.filter_jit
def _roundtrip(codec, layout, moment, count, factor):
    codes, scales = codec.encode(
        layout.tile(moment), layout.tile_axis, fq.Dither.at(count, 0), factor
    )
    codes = layout.untile(codes)
    stored = zeros(codec, layout, moment.dtype)
    if not isinstance(stored, fq.QuantMoment):
        return codes, codes
    assert scales is not None
    assert codes.dtype == stored.codes.dtype and codes.shape == stored.codes.shape
    assert scales.dtype == stored.scales.dtype and scales.shape == stored.scales.shape
    stored = eqx.tree_at(lambda s: (s.codes, s.scales), stored, (codes, scales))
    return stored, stored.decode()


def of_elements(layout: Layout, groups: ArrayLike) -> np.ndarray:
    """What each group has, for each of its elements."""
    return np.asarray(_of_elements(layout, jnp.asarray(groups)))


@eqx.filter_jit
def _of_elements(layout, groups):
    tile = layout.tile(jnp.zeros(layout.shape))
    groups = jnp.expand_dims(groups, layout.tile_axis)
    return layout.untile(jnp.broadcast_to(groups, tile.shape))


def decoded(stored: fq.QuantMoment | Array) -> Array:
    """A moment as numbers."""
    return stored.decode() if isinstance(stored, fq.QuantMoment) else stored


def assert_code_of(
    stored: fq.QuantMoment,
    exact: np.ndarray,
    atol: float | np.ndarray = 0.0,
    base: np.ndarray | None = None,
) -> None:
    """Asserts that the codes are the exact values rounded once: to nearest, and so off
    by half a code, or by the dither, and so off by at most one.

    The bound is the curve itself: what half a code, or one, more and less stands for.
    `atol` is the error of the values before they were encoded. Of a moment that is
    stored relative to the root of another one, that is `base`, by default as it is
    stored.
    """
    if stored.relative_to is not None:
        base = float64(decoded(stored.base)) if base is None else base
        root = np.maximum(np.sqrt(base.astype(np.float64)), 2.0**-63)
        # The root and the quotient are rounded too, and so was what is below the root.
        atol = (atol + 2.0**-21 * np.abs(exact)) / root
        exact = exact / root
        stored = dataclasses.replace(stored, relative_to=None)
    codec = stored.codec
    if isinstance(codec, fq.FlashOptimCodec):
        # Nearest: half a code where codes are farthest apart, and a float16 scale's
        # 2^-11.
        largest = np.max(np.abs(exact), initial=0)
        half = 0.5 * 254 / 126.5**2 if codec.kind == "signed" else 2 * 0.5 / 255 * 1.01
        scale = 2**-11 if codec.kind == "signed" else 2**-10
        error = np.abs(float64(stored.decode()) - exact)
        assert np.all(error <= (half + scale) * largest + atol + 2.0**-24)
        return
    exact = exact.astype(np.float64)
    codes = float64(stored.codes)
    if isinstance(codec, fq.CompandedCodec):
        _assert_companded_code_of(stored, exact, codes, atol)
        return
    assert isinstance(codec, fq.LinearCodec | fq.SoftsignCodec | fq.FittedLogCodec)
    # The arithmetic's share is a few roundings of a code of at most 255: less than
    # 255 * 4 * 2^-24. The dither of a fitted step, a whole number of at least 2^12, is
    # rounded to one: 2^-13.
    radius = (1 if codec.dithered else 0.5) + 2.0**-12
    # Numbers below 2^-126 may be flushed.
    slack = atol + 2.0**-20 * np.abs(exact) + 2.0**-126
    low, high = exact - slack, exact + slack
    if isinstance(codec, fq.LinearCodec | fq.SoftsignCodec):
        below, above = (
            float64(_decode_codes(stored, bound))
            for bound in (codes - radius, codes + radius)
        )
        assert np.all((high >= below) & (low <= above))
        return
    # A step is the same everywhere on the bits, not on the values.
    low, high = map(real_bits, (np.maximum(low, 0), high))
    origin, step = (of_elements(stored.layout, x) for x in grid(stored.scales))
    # Only what is 31 powers of two below the largest, which takes one of the coarsest
    # steps, or below the normal numbers, is below code 0, and clamped to it.
    assert np.all((step >= 2**20) | (origin < 2**24) | (high >= origin))
    low, high = np.maximum(low, origin), np.maximum(high, origin)
    bits = origin + codes * step
    assert np.all((high >= bits - radius * step) & (low <= bits + radius * step))


def _assert_companded_code_of(
    stored: fq.QuantMoment,
    exact: np.ndarray,
    codes: np.ndarray,
    atol: float | np.ndarray,
) -> None:
    codec = stored.codec
    assert isinstance(codec, fq.CompandedCodec)
    signed = codec.kind == "signed"
    # As above; of a code of at most 255, and with four more operations.
    radius = 1 + 255 * 8 * 2.0**-24
    slack = atol + 2.0**-19 * np.abs(exact) + 2.0**-126
    size, low, high = np.abs(exact), np.abs(codes) - radius, np.abs(codes) + radius
    below, above = (_companded(stored, np.maximum(x, 0)) for x in (low, high))
    # Above the scale, which may have been rounded down, there is no code.
    last = 127 if signed else 255
    above = np.where(np.abs(codes) == last, above * (1 + 2.0**-8), above)
    # Of averages of squares, all that is small has the first one.
    below = np.where((codes == 1) & (not signed), 0, below)
    assert np.all(np.abs(codes) <= last) and (signed or np.all(codes >= 1))
    assert np.all((size + slack >= below) & (size - slack <= above))
    assert np.all(np.sign(codes) * np.sign(exact) >= 0)


def _companded(stored: fq.QuantMoment, codes: np.ndarray) -> np.ndarray:
    """What codes between the codes stand for, by the documented formula."""
    codec = stored.codec
    assert isinstance(codec, fq.CompandedCodec)
    curve, y = codec.curve, codes / (127 if codec.kind == "signed" else 255)
    if isinstance(curve, fq.MuLawCurve):
        x = np.expm1(y * np.log1p(curve.mu)) / curve.mu
    else:
        assert isinstance(curve, fq.RationalCurve)
        a = curve.a if stored.parameter is None else float(stored.parameter)
        # A code above the last is a little beyond the pole, if `a` is large.
        x = (y / np.maximum(1 + a - a * y, 1e-9)) ** curve.root
    return x * of_elements(stored.layout, decode_scale(stored.scales))


def _decode_codes(stored: fq.QuantMoment, codes: np.ndarray) -> Array:
    """What codes between the codes would stand for."""
    return _decode_jitted(stored, jnp.asarray(codes, jnp.float32))


@eqx.filter_jit
def _decode_jitted(stored: fq.QuantMoment, codes: Array) -> Array:
    layout = stored.layout
    tile = layout.tile(codes)
    decoded = stored.codec.decode(tile, stored.scales, layout.tile_axis, jnp.float32)
    return layout.untile(decoded)


def grid(scales: Array) -> tuple[np.ndarray, np.ndarray]:
    """The bits of code 0 and the step to code 1, for each group of a
    `FittedLogCodec`."""
    zero, one = np.moveaxis(np.asarray(_first_bits(scales)).astype(np.int64), -1, 0)
    return zero, one - zero


@jax.jit
def _first_bits(scales: Array) -> Array:
    codes = jnp.broadcast_to(jnp.arange(2, dtype=jnp.uint8), (*scales.shape, 2))
    return bits_of(fq.FittedLogCodec().decode(codes, scales, -1, jnp.float32))


def real_bits(x: np.ndarray) -> np.ndarray:
    """The bits of a nonnegative float32 as a function of real numbers: linear between
    powers of two, and below the normal numbers."""
    mantissa, exponent = np.frexp(x)
    normal = 2.0**23 * (125 + exponent + 2 * mantissa)
    return np.where(x < 2.0**-126, x * 2.0**149, normal)


#
# The exact step
#


def exact_step(
    reference: optax.GradientTransformation,
    count: int,
    masters: dict[str, np.ndarray],
    moments: dict[str, dict[str, np.ndarray]],
    grads: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """One step of Optax in float64, from these weights and moments: the new ones."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, grads, moments = jtu.tree_map(jnp.asarray, (masters, grads, moments))
        state = reference.init(params)
        # `optax.adan` counts in `t`.
        for name in ("count", "t"):
            if optax.tree.get_all_with_path(state, name):
                state = optax.tree.set(state, **{name: jnp.asarray(count, jnp.int32)})
        state = optax.tree.set(state, **moments) if moments else state
        updates, state = reference.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        moments = {name: optax.tree.get(state, name) for name in moments}
        return jtu.tree_map(np.asarray, (params, moments))


# The names of programs that this process has compiled. Tests clear it.
COMPILED = []


def _listen(event, duration, **details):
    if event.endswith("backend_compile_duration"):
        COMPILED.append(details.get("fun_name"))


jax.monitoring.register_event_duration_secs_listener(_listen)
