"""Rules and codecs of a user's own: what they may be made of, and what is refused."""

import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import ScalarLike

import flashquinox as fq
from flashquinox._common import arithmetic

from ..kernels import arrays, compiling_for, run


#
# Functions that do more than compute
#


@jax.custom_vjp
def _quotient(x, y):
    return x / y


_quotient.defvjp(lambda x, y: (x / y, y), lambda y, g: (g / y, g))


@jax.custom_jvp
def _soft(x):
    return jnp.log1p(jnp.abs(x))


_soft.defjvps(lambda dx, y, x: dx)


# Under the names of functions of this library, each with another meaning.
@jax.jit
def _rounded_root(x):
    return jnp.round(8 * x) / 8


@jax.jit
def rounded_quotient(x, y):
    return jnp.maximum(x, y)


@jax.jit
def _canonical_pattern(x):
    return 1 + x


# An array is a constant that kernels cannot take.
_COEFFICIENTS = np.array([0.5, -0.25, 1.0], np.float32)


def _calls(x, s):
    x = _quotient(x, 1 + _soft(x))
    return jax.checkpoint(lambda x: x * s + jnp.sin(x))(x)


def _names(x, s):
    return _canonical_pattern(rounded_quotient(x, s) + _rounded_root(x))


def _branches(x, s):
    x = lax.cond(s > 0.5, lambda x: _soft(x), lambda x: x, x)
    return lax.switch(jnp.int32(s), [lambda x: -x, jnp.abs, jnp.exp], x)


def _loops(x, s):
    x = lax.fori_loop(0, 3, lambda i, x: x * s + i, x)
    x = lax.fori_loop(0, 40, lambda i, x: 0.9 * _quotient(x, 1 + s), x)
    count = lambda carry: carry[0] < s
    _, x = lax.while_loop(count, lambda c: (c[0] + 0.5, _soft(c[1])), (0.0, x))
    x = (
        jnp.polyval(_COEFFICIENTS, x)
        + lax.scan(lambda y, c: (y * s + c, y), x, _COEFFICIENTS)[0]
    )
    return x + np.full(x.shape, 2, np.float32)


class Calls(fq.AbstractRule):
    """A moment through each of these functions, in turn."""

    functions: tuple = eqx.field(static=True)

    @property
    def moments(self):
        return {"trace": fq.Moment("signed")}

    def scalars(self, count, learning_rate):
        return {"step": -learning_rate, "s": 0.75}

    def update(self, grad, weight, moments, scalars):
        trace = 0.5 * moments["trace"] + grad
        update = trace
        for function in self.functions:
            update = function(update, scalars["s"])
        return scalars["step"] * update, {"trace": trace}


class Curve(fq.AbstractCurve):
    """Linear, by functions with derivatives of their own."""

    @property
    def root(self):
        return 1

    def compress(self, n):
        return _quotient(n, jnp.ones_like(n))

    def expand(self, y):
        return jax.checkpoint(lambda y: _quotient(y, jnp.ones_like(y)))(y)


_codecs = fq.MomentCodecs(fq.CompandedCodec("signed", Curve()), fq.FullPrecision())
_FUNCTIONS = {
    "calls": (_calls, _names),
    "control": (_branches, _loops),
}


@pytest.mark.product
@pytest.mark.parametrize("backend", ["gpu", "tpu"])
@pytest.mark.parametrize("functions", _FUNCTIONS)
def test_kernels_take_functions_of_every_kind(functions, backend):
    """And functions that have a name in common with those that kernels replace."""
    shapes = {"leaf": (32, 64)}
    moments = _codecs if functions == "calls" else "float32"
    rule = Calls(_FUNCTIONS[functions])
    make = lambda backend: fq.optimizer(
        rule, 1e-2, storage=fq.Storage(moments=moments), backend=backend
    )
    grads = [arrays(shapes, jnp.float32, 1)]
    run(backend, make, arrays(shapes, jnp.bfloat16, 0), grads)


@pytest.mark.parametrize(
    "platform, kind", [("cuda", "NVIDIA H100 80GB HBM3"), ("tpu", "TPU v5 lite")]
)
def test_such_rules_are_lowered(platform, kind):
    rule = Calls((_calls, _names, _branches, _loops))
    backend = "gpu" if platform == "cuda" else "tpu"
    optim = fq.optimizer(
        rule, 1e-2, storage=fq.Storage(moments=_codecs), backend=backend
    )
    params = {"leaf": jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)}
    state = jax.eval_shape(optim.init, params)
    with compiling_for(kind, platform):
        lowered = jax.jit(optim.step).trace(params, state, params)
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert ("xla.gpu.ptx" if platform == "cuda" else "tpu_custom_call") in text


def test_moments_of_such_rules_can_be_learned():
    """What is learned depends on the rule's derivative, which a `custom_vjp` does not
    have forward."""
    params = {"leaf": jnp.ones((32, 32), jnp.bfloat16)}
    optim = fq.optimizer(Calls((_calls,)), 1e-2, storage=fq.Storage(moments="learned"))
    state = optim.init(params)
    _, state = jax.eval_shape(optim.step, params, state, params)
    assert state.moments["trace"]["leaf"].parameter is not None


#
# Functions that kernels replace
#


@pytest.mark.product
@pytest.mark.parametrize("name", ["rounded_quotient", "rounded_root", "byte_times"])
def test_replaceable_functions_are_ordinary_ones(name):
    function = getattr(arithmetic, name)
    x = jnp.arange(1, 13, dtype=jnp.float32).reshape(3, 4)
    args = {
        "rounded_root": (x,),
        "rounded_quotient": (x, x[:, :1]),
        "byte_times": (x.astype(jnp.uint8), x[:1].astype(jnp.int32)),
    }[name]
    expected = function.function(*jnp.broadcast_arrays(*args))
    assert np.array_equal(function(*args), expected)
    assert np.array_equal(jax.jit(function)(*args), expected)
    args = jnp.broadcast_arrays(*args)
    assert np.array_equal(jax.vmap(function)(*args), expected)
    first, *others = args
    along_rows = jax.vmap(lambda x: function(x, *(y[0] for y in others)))
    assert along_rows(first).shape == expected.shape
    if name != "byte_times":
        found, plain = (
            jax.grad(lambda x, f=f: jnp.sum(f(x, *others) ** 2))(first)
            for f in (function, function.function)
        )
        assert np.array_equal(found, plain)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
def test_nearest_bytes(dtype):
    """As `round` and a conversion give them: between two of them the even one, also of
    a product that lies there once it is rounded; beyond all of them, the last one."""
    info, nearest = jnp.iinfo(dtype), getattr(arithmetic, f"nearest_{dtype.__name__}")
    x = np.arange(4 * info.min - 2, 4 * info.max + 3, dtype=np.float32) / 4
    around = [np.nextafter(x, np.float32(end)) for end in (-np.inf, np.inf)]
    beyond = np.float32([np.inf, 256, 2.0**23 + 1, 2.0**31, 3e38])
    # With all bits, as logarithms give it, and with few.
    nan = np.uint32([0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FC0_0000, 0xFFC0_0001])
    x = np.concatenate([x, *around, beyond, -beyond, nan.view(np.float32)])
    with np.errstate(invalid="ignore"):
        whole = np.clip(np.round(np.where(np.isnan(x), 0, x)), info.min, info.max)
    assert np.array_equal(jax.jit(nearest)(x), whole.astype(dtype))
    # Rounded to float32, some of them lie in the middle.
    x = np.random.default_rng(0).uniform(info.min, info.max, 2_000_000).astype("f4")
    factor = np.float32(0.7310001)
    found = jax.jit(lambda x, factor: nearest(x * factor))(x, factor)
    assert np.array_equal(found, np.round(x * factor).astype(dtype))


#
# What an optimizer is not built of
#


class Elementwise(fq.AbstractRule):
    """A rule whose update, but for the factor, is a function of a test's."""

    function: Callable = eqx.field(static=True)
    b: ScalarLike = 0.9

    @property
    def moments(self):
        return {"mu": fq.Moment("signed")}

    def scalars(self, count, learning_rate):
        return {"step": -learning_rate, "b": self.b}

    def update(self, grad, weight, moments, scalars):
        mu = moments["mu"] + grad
        return scalars["step"] * self.function(mu, scalars["b"]), {"mu": mu}


_ACCEPTED = {
    "where": lambda x, b: jnp.where(b > 0, x, 0) + jnp.where(x > 0, x, 1.0),
    "clip": lambda x, b: jnp.clip(x, -b, 1) + jnp.sign(x),
    "powers": lambda x, b: x**b + x**3 + jnp.abs(x) ** 0.5 + jnp.hypot(x, x),
    "activations": lambda x, b: jax.nn.gelu(x) + jax.nn.silu(x) + jax.nn.softplus(x),
    "more activations": lambda x, b: jax.nn.relu(x) + jax.nn.elu(x) + jax.nn.mish(x),
    "special": lambda x, b: jax.scipy.special.erf(x) + jnp.nan_to_num(x, nan=b),
    "cond": lambda x, b: lax.cond(b > 0, lambda: x, lambda: jnp.zeros_like(x)),
    "loops": lambda x, b: _loops(x, b),
    "branches": lambda x, b: _branches(x, b),
    "calls": lambda x, b: _calls(x, b),
    "derivative": lambda x, b: jax.grad(lambda y: jnp.sum(b * y**3))(x),
    "stopped": lambda x, b: lax.stop_gradient(x) + lax.optimization_barrier(x),
    "one by one": lambda x, b: jax.vmap(lambda row: jnp.sin(b * row))(x),
    "flattened": lambda x, b: jnp.exp(x.reshape(-1)).reshape(x.shape),
    "filled": lambda x, b: x + jnp.full_like(x, b) + np.ones(x.shape, np.float32),
    "constants": lambda x, b: (
        x * jnp.array([1.0, 2.0])[1] * jnp.linspace(0, 1, 5).sum()
    ),
    "bits": lambda x, b: lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFF_0000), jnp.float32
    ),
    "narrowed": lambda x, b: x.astype(jnp.bfloat16).astype(jnp.float32),
}

# Each with the operation that the message names.
_REFUSED = {
    "sum": (lambda x, b: x / jnp.sum(x), "reduce_sum"),
    "mean": (lambda x, b: x - x.mean(), "reduce_sum"),
    "largest": (lambda x, b: x / jnp.max(jnp.abs(x)), "reduce_max"),
    "norm of rows": (lambda x, b: jax.vmap(lambda y: y / jnp.sum(y))(x), "reduce_sum"),
    "softmax": (lambda x, b: jax.nn.softmax(x), "reduce_max"),
    "any": (lambda x, b: lax.cond(jnp.any(x > b), lambda: x, lambda: -x), "reduce_or"),
    "argmax": (lambda x, b: x * jnp.argmax(x), "argmax"),
    "cumsum": (lambda x, b: jnp.cumsum(x, -1), "cumsum"),
    "scan": (lambda x, b: lax.scan(lambda c, y: (c, c * y), b, x)[1], "scan"),
    "sort": (lambda x, b: jnp.sort(x), "sort"),
    "reversed": (lambda x, b: x[::-1], "rev"),
    "roll": (lambda x, b: jnp.roll(x, 1), "slice"),
    "first": (lambda x, b: x * x[..., :1], "slice"),
    "set": (lambda x, b: x.at[0].set(b), "scatter"),
    "taken": (lambda x, b: x[..., jnp.array([1] * x.shape[-1])], "gather"),
    "matrix product": (lambda x, b: x @ (x.T @ x), "transpose"),
    "contraction": (lambda x, b: jnp.vdot(x, x) * x, "dot_general"),
    "convolution": (
        lambda x, b: jnp.convolve(x.ravel(), jnp.ones(3), "same").reshape(x.shape),
        "conv_general",
    ),
    "spectrum": (lambda x, b: jnp.fft.fft(x).real, "fft"),
    "stacked": (lambda x, b: jnp.stack([x, -x]).max(0), "stack"),
    "padded": (lambda x, b: jnp.pad(x.ravel(), 1)[:-2].reshape(x.shape), "pad"),
    "inside of a loop": (
        lambda x, b: lax.fori_loop(0, 3, lambda i, y: y - jnp.mean(y), x),
        "reduce_sum",
    ),
    "inside of a call": (
        lambda x, b: jax.jit(jax.checkpoint(lambda x: x - jnp.mean(x)))(x),
        "reduce_sum",
    ),
    "inside of a custom_vjp": (lambda x, b: _quotient(x, x.sum()), "reduce_sum"),
    "position": (lambda x, b: x * jnp.arange(x.shape[-1]), "position"),
    "position along an axis": (
        lambda x, b: x * lax.broadcasted_iota(jnp.float32, x.shape, 0),
        "position",
    ),
    "array of NumPy": (
        lambda x, b: x * np.arange(x.size, dtype=np.float32).reshape(x.shape),
        "position",
    ),
    "size": (lambda x, b: x / x.size, "shape"),
    "width": (lambda x, b: x / np.sqrt(x.shape[-1]), "shape"),
    "number of axes": (lambda x, b: x if x.ndim < 2 else 2 * x, "shape"),
    "ones": (lambda x, b: x / jnp.sum(jnp.ones_like(x)), "shape"),
    "random": (
        lambda x, b: x + jax.random.normal(jax.random.key(0), x.shape),
        "random",
    ),
    "callback": (lambda x, b: jax.pure_callback(lambda y: y, x, x), "pure_callback"),
    "printed": (lambda x, b: (jax.debug.print("{}", b), x)[1], "debug"),
}


@pytest.mark.parametrize("name", _ACCEPTED)
def test_elementwise_rules_are_built(name):
    fq.optimizer(Elementwise(_ACCEPTED[name]), 1e-3)


@pytest.mark.parametrize("name", _REFUSED)
def test_other_rules_are_refused(name):
    function, operation = _REFUSED[name]
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError) as error,
    ):
        fq.optimizer(Elementwise(function), 1e-3)
    message = str(error.value)
    assert message.startswith(
        "`optimizer(rule=...)`: `Elementwise.update` is not elementwise: "
    )
    assert operation in message and "`scalars`" in message


@pytest.mark.parametrize("name", ["adamw", "adam", "adan", "lion", "sgd", "sgdw"])
def test_hyperparameters_may_be_traced(name):
    make = getattr(fq, name)
    optim = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(1e-3)
    params = {"leaf": jnp.ones((8, 32), jnp.float32)}
    state = jax.eval_shape(optim.init, params)
    jax.eval_shape(optim.update, params, state, params)


def test_a_rule_is_traced_once():
    calls = []

    def function(x, b):
        calls.append(x.shape)
        return b * x

    for b in (0.1, 0.2, jnp.float32(0.3)):
        fq.optimizer(Elementwise(function, b), 1e-3)
    jax.eval_shape(lambda b: fq.optimizer(Elementwise(function, b), b) and b, 0.4)
    # Of two shapes.
    assert len(calls) == 2


class Broken(fq.AbstractRule):
    """Of parts that need not fit together."""

    result: Callable = eqx.field(static=True)
    of_moments: Any = eqx.field(static=True, default=(("mu", fq.Moment()),))
    of_step: Any = eqx.field(static=True, default=None)
    b: ScalarLike = 0.9

    @property
    def moments(self):
        return dict(self.of_moments)

    def scalars(self, count, learning_rate):
        if self.of_step is None:
            return {"step": -learning_rate}
        return self.of_step(learning_rate)

    def update(self, grad, weight, moments, scalars):
        return self.result(self, grad, moments, scalars)


_fine = lambda self, g, m, s: (s["step"] * g, m)
_BROKEN = {
    "kind": (Broken(_fine, (("mu", "signed"),)), "`Broken.moments` must"),
    "vector": (Broken(_fine, of_step=lambda a: {"step": jnp.ones(3)}), "'step' is"),
    "number": (Broken(_fine, of_step=lambda a: -a), "must return a dictionary"),
    "name of a factor": (
        Broken(_fine, (("mu", fq.Moment(before="b1")),)),
        "`before` of 'mu' is 'b1', which is none of what `scalars` returns: 'step'",
    ),
    "name of the other factor": (
        Broken(_fine, (("mu", fq.Moment("nonnegative", "step", "b2")),)),
        "`after` of 'mu' is 'b2', which is none of",
    ),
    "missing scalar": (
        Broken(lambda self, g, m, s: (s["eps"] * g, m)),
        "asks for 'eps'. There are the moments 'mu' and, of `scalars`, 'step'",
    ),
    "missing moment": (
        Broken(lambda self, g, m, s: (g, {"mu": m["nu"]})),
        "asks for 'nu'",
    ),
    "other moments": (Broken(lambda self, g, m, s: (g, {"nu": g})), "the moments 'nu'"),
    "no moments": (Broken(lambda self, g, m, s: (g, g)), "as a dictionary"),
    "no pair": (Broken(lambda self, g, m, s: g), "must return a pair"),
    "scalar": (Broken(lambda self, g, m, s: (s["step"], m)), "in shape ()"),
    "number of Python": (Broken(lambda self, g, m, s: (0.0, m)), "returned 0.0 as"),
    "narrow": (
        Broken(lambda self, g, m, s: (g, {"mu": g.astype(jnp.float16)})),
        "returned the moment 'mu' as float16",
    ),
}


@pytest.mark.parametrize("name", _BROKEN)
def test_parts_of_a_rule_fit_together(name):
    rule, message = _BROKEN[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
        fq.optimizer(rule, 1e-3)
    assert str(error.value).startswith("`optimizer(rule=...)`: ")


@pytest.mark.parametrize(
    "result, kind, note",
    [
        (lambda self, g, m, s: 1 / 0, ZeroDivisionError, "tried `Broken.update`"),
        (lambda self, g, m, s: (self.b * g, m), TypeError, "through `scalars`"),
    ],
)
def test_a_rules_own_errors_say_where_they_came_from(result, kind, note):
    with pytest.raises(kind) as error:
        fq.optimizer(Broken(result), 1e-3)
    assert any(
        "`optimizer(rule=...)`" in x and note in x for x in error.value.__notes__
    )


def test_static_fields_have_a_hash():
    rule = Broken(_fine, [("mu", fq.Moment())])
    with pytest.raises(
        TypeError, match=r"`optimizer\(rule=...\)`: Broken's static fields"
    ):
        fq.optimizer(rule, 1e-3)


#
# Codecs and curves
#


class Bent(fq.AbstractCurve):
    """Linear, but for a function of a test's."""

    function: Callable = eqx.field(static=True)

    @property
    def root(self):
        return 1

    def compress(self, n):
        return self.function(n)

    def expand(self, y):
        return y


class Unscaled(fq.AbstractMomentCodec):
    """Integers, with no scale; each step is there once to be replaced."""

    reduction: Callable = eqx.field(static=True, default=jnp.max)
    prepared: Callable = eqx.field(static=True, default=lambda x: x)
    code_dtype: Any = eqx.field(static=True, default=jnp.int8)
    decoded: Callable = eqx.field(static=True, default=lambda x: x)
    stored_dtypes: Any = eqx.field(static=True, default=(jnp.int8, jnp.uint16))

    @property
    def kinds(self):
        return ("signed",)

    @property
    def flattened(self):
        return False

    @property
    def dtypes(self):
        return self.stored_dtypes

    def prepare(self, moment):
        return (self.prepared(moment),)

    def statistics(self, prepared):
        return ((self.reduction, prepared[0]),)

    def fit(self, statistics, factor, dither):
        one = jnp.ones((), statistics[0].dtype)
        return statistics[0].astype(jnp.uint16), (one if factor is None else factor,)

    def quantize(self, prepared, encode_constants):
        return (prepared[0] * encode_constants[0]).astype(self.code_dtype)

    def decode_constants(self, scales, factor, dtype):
        wide = scales.astype(dtype)
        return (wide if factor is None else wide * factor,)

    def dequantize(self, codes, decode_constants, dtype):
        (scale,) = decode_constants
        return self.decoded(codes.astype(dtype) * scale)


_CODECS = {
    "curve": (lambda: Bent(lambda n: n / jnp.max(n)), "quantize", "reduce_max"),
    "curve in order": (lambda: Bent(lambda n: jnp.cumsum(n, -1)), "quantize", "cumsum"),
    "centered": (lambda: Unscaled(prepared=lambda x: x - x.mean()), "prepare", "sum"),
    "position": (
        lambda: Unscaled(
            decoded=lambda x: x * lax.broadcasted_iota(x.dtype, x.shape, 0)
        ),
        "dequantize",
        "position",
    ),
    "sum of a group": (lambda: Unscaled(jnp.sum), "statistics", "`jnp.max`"),
    "no codes": (lambda: Unscaled(stored_dtypes=None), "Unscaled.dtypes", "None"),
    "floating codes": (
        lambda: Unscaled(stored_dtypes=(jnp.float16, jnp.float16)),
        "Unscaled.dtypes",
        "an integer dtype",
    ),
    "wide codes": (
        lambda: Unscaled(code_dtype=jnp.int16),
        "quantize",
        "codes as int16",
    ),
    "narrow moments": (
        lambda: Unscaled(decoded=lambda x: x.astype(jnp.bfloat16)),
        "dequantize",
        "as bfloat16",
    ),
}


def _moment_codecs(codec):
    if isinstance(codec, fq.AbstractCurve):
        codec = fq.CompandedCodec("signed", codec)
    return fq.MomentCodecs(codec, fq.FullPrecision())


@pytest.mark.parametrize("name", _CODECS)
def test_codecs_that_are_none_are_refused(name):
    make, step, message = _CODECS[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
        fq.lion(1e-3, storage=fq.Storage(moments=_moment_codecs(make())))
    assert str(error.value).startswith("`Storage(moments=...)`: ")
    assert step in str(error.value)


def test_other_codecs_are_built():
    for codec in (Unscaled(), Bent(jnp.sqrt), Curve()):
        fq.lion(1e-3, storage=fq.Storage(moments=_moment_codecs(codec)))
    for name in fq.MomentCodecs.names():
        named = fq.MomentCodecs.named(name)
        again = fq.MomentCodecs(named.signed, named.nonnegative)
        assert fq.adamw(1e-3, storage=fq.Storage(moments=again)) is not None
