"""Calls that are wrong, or look wrong, and what comes of each: it works, warns, or
raises.

A row is a name, a call, and its outcome. A message of this library names the call, says
what came and what to do, and is made of sentences. Where Python, JAX or Optax find the
mistake first, the row says so.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq
from flashquinox import exchange
from flashquinox.checkpoint import CheckpointError, Checkpoints


pytestmark = pytest.mark.usefixtures("without_typechecker")


def _call(call):
    """The result, and the warnings that came with it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if w.category is UserWarning]


def _assert_readable(message, parts):
    """Has these parts, begins with the call, ends with a sentence, and is short
    whatever came."""
    assert all(part in message for part in parts), message
    assert message.startswith("`") and message.endswith("."), message
    assert len(message) < 600, message


@dataclasses.dataclass(frozen=True)
class Works:
    """Returns something of which this is true."""

    is_right: Callable[[Any], Any]

    def check(self, call):
        result, messages = _call(call)
        assert not messages
        assert self.is_right(result)


@dataclasses.dataclass(frozen=True)
class Warns:
    """Works, with one warning of this library that has all of these in it."""

    parts: tuple[str, ...]

    def check(self, call):
        _, messages = _call(call)
        assert len(messages) == 1, messages
        _assert_readable(messages[0], self.parts)


@dataclasses.dataclass(frozen=True)
class Raises:
    """A message of this library with all of these in it."""

    error: type[Exception]
    parts: tuple[str, ...]

    def check(self, call):
        with pytest.raises(self.error) as info:
            call()
        _assert_readable(str(info.value), self.parts)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """An error of Python, JAX or Optax, with this in its message."""

    error: type[Exception]
    part: str

    def check(self, call):
        with pytest.raises(self.error) as info:
            call()
        assert self.part in str(info.value)


def _works(check=lambda result: True):
    return Works(check)


def _warns(*parts):
    return Warns(parts)


def _type_error(*parts):
    return Raises(TypeError, parts)


def _value_error(*parts):
    return Raises(ValueError, parts)


_BF16 = jnp.bfloat16
_model = {"w": jnp.ones((4, 64), _BF16), "b": jnp.ones((5,), _BF16)}
_grads = jtu.tree_map(jnp.ones_like, _model)
_optim = fq.adamw(1e-3)
_state = _optim.init(_model)
_mlp32 = eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))
_mlp = fq.cast(_mlp32, _BF16)
_mlp_grads = jtu.tree_map(
    lambda x: jnp.ones_like(x) if eqx.is_inexact_array(x) else None, _mlp
)
_mlp_state = _optim.init(_mlp)
_arrays = eqx.filter(_mlp, eqx.is_inexact_array)


def _step(optim, model=_model, grads=_grads):
    return optim.step(model, _state, grads)


def _with(tree, **leaves):
    return {**tree, **leaves}


def _stepped(result):
    """Whether this is a model that has taken one step of Adam, and its state."""
    model, state = result
    moved = jtu.tree_leaves(fq.master_weights(model, state))
    return all(np.allclose(x, 1 - 1e-3, atol=1e-4) for x in moved) and state.count == 1


#
# Making an optimizer
#


class _Schedule:
    def __call__(self, count):
        return 1e-3 * (count + 1).astype(float)


class _ModuleSchedule(eqx.Module):
    peak: jax.Array

    def __call__(self, count):
        return self.peak


class _Scaled(fq.AbstractCurve):
    by: jax.Array

    @property
    def root(self):
        return 1

    def compress(self, n):
        return n * self.by

    def expand(self, y):
        return y / self.by


def _polynomial(power, count):
    return 1e-3 * (count + 1).astype(float) ** power


def _fails(count):
    raise KeyError("schedule")


_number = "takes a number or a scalar array"
_flag = "must be True or False"
_scalar = "It must return a number or a scalar array"
_bits = "must be 'auto', 24, 32 or None"
_size = "must be a multiple of 16 from 16 to 128"
_rate = "`adamw(learning_rate=...)`"

ARGUMENTS = {
    # Numbers.
    "lr string": (lambda: fq.adamw("1e-3"), _type_error(_rate, _number, "'1e-3'")),
    "lr None": (lambda: fq.adamw(None), _type_error(_rate, _number, "None")),
    "lr missing": (lambda: fq.adamw(), Elsewhere(TypeError, "learning_rate")),
    "lr negative": (lambda: fq.adamw(-1e-3), _value_error(_rate, "-0.001")),
    "lr NaN": (lambda: fq.adamw(float("nan")), _value_error(_rate, "nan")),
    "lr infinite": (lambda: fq.adamw(float("inf")), _value_error(_rate, "got inf")),
    "lr infinite in float32": (
        lambda: fq.adamw(1e39),
        _value_error(_rate, "1e+39", "rounded to float32"),
    ),
    "lr of 400 digits": (lambda: fq.adamw(10**400), _value_error(_rate, "less than")),
    "lr vector": (
        lambda: fq.adamw(jnp.ones(3)),
        _type_error(_rate, _number, "an array float32[3]"),
    ),
    "lr of shape (1,)": (lambda: fq.adamw(np.ones(1)), _type_error(_rate, "[1]")),
    "lr boolean": (lambda: fq.adamw(True), _type_error(_rate, _number, "True")),
    "lr NumPy boolean": (lambda: fq.adamw(np.bool_(True)), _type_error(_rate, "True")),
    "lr boolean array": (lambda: fq.adamw(jnp.array(True)), _type_error(_rate, "True")),
    "lr traced boolean": (
        lambda: jax.eval_shape(lambda x: fq.adamw(x).init(_model), jnp.array(True)),
        _type_error(_rate, "a traced bool[]"),
    ),
    "lr traced vector": (
        lambda: jax.eval_shape(lambda x: fq.adamw(x).init(_model), jnp.ones(2)),
        _type_error(_rate, "a traced float32[2]"),
    ),
    "lr complex": (lambda: fq.adamw(1j), _type_error(_rate, "1j")),
    "lr key": (lambda: fq.adamw(jax.random.key(0)), _type_error(_rate, "key")),
    "lr tree of parameters": (lambda: fq.adamw(_model), _type_error(_rate, "got {'w'")),
    "lr integer array": (lambda: _step(fq.adamw(jnp.array(0))), _works()),
    "lr NumPy number": (lambda: _step(fq.adamw(np.float32(1e-3))), _works(_stepped)),
    "b1 = 1": (lambda: fq.adamw(1e-3, b1=1.0), _value_error("`adamw(b1=...)`", "1.0")),
    "b1 rounds to 1": (
        lambda: fq.adamw(1e-3, b1=1 - 1e-9),
        _value_error("`adamw(b1=...)`", "less than 1", "rounded to float32"),
    ),
    "b2 rounds to 1": (
        lambda: fq.lion(1e-3, b2=1 - 1e-9),
        _value_error("`lion(b2=...)`", "less than 1", "rounded to float32"),
    ),
    "momentum rounds to 1": (
        lambda: fq.sgd(1e-3, 1 - 1e-9),
        _value_error("`sgd(momentum=...)`", "less than 1"),
    ),
    "b1 vector": (lambda: fq.adamw(1e-3, np.ones(2)), _type_error("`adamw(b1=...)`")),
    "Optax's eps_root, by position": (
        lambda: fq.adamw(1e-3, 0.9, 0.999, 1e-8, 0.0),
        Elsewhere(TypeError, "positional arguments"),
    ),
    "b1 tuple": (
        lambda: fq.adamw(1e-3, (0.9, 0.99)),
        _type_error("`adamw(b1=...)`", _number, "(0.9, 0.99)"),
    ),
    "b1 boolean": (lambda: fq.adamw(1e-3, False), _type_error("`adamw(b1=...)`")),
    "b1 schedule": (lambda: fq.adamw(1e-3, lambda c: 0.9), _type_error("b1", _number)),
    "betas, as in PyTorch": (
        lambda: fq.adamw(1e-3, betas=(0.9, 0.99)),
        _type_error("`adamw` has no argument `betas`", "b1, b2"),
    ),
    "lr=, as in PyTorch": (
        lambda: fq.adamw(lr=1e-3),
        _type_error("`adamw` has no argument `lr`", "learning_rate"),
    ),
    "weight_dacay": (
        lambda: fq.adamw(1e-3, weight_dacay=0.1),
        _type_error("`adamw` has no argument `weight_dacay`", "weight_decay"),
    ),
    "weight_decay negative": (
        lambda: fq.adamw(1e-3, weight_decay=-0.1),
        _value_error("`adamw(weight_decay=...)`", "-0.1"),
    ),
    "weight_decay None": (
        lambda: fq.sgd(1e-3, weight_decay=None),
        _type_error("`sgd(weight_decay=...)`", "None"),
    ),
    "weight_decay boolean": (
        lambda: fq.sgd(1e-3, weight_decay=False),
        _type_error("`sgd(weight_decay=...)`", "False"),
    ),
    "eps negative": (
        lambda: fq.adam(1e-3, eps=-1e-8),
        _value_error("`adam(eps=...)`", "-1e-08"),
    ),
    "eps string": (lambda: fq.adam(1e-3, eps="1e-8"), _type_error("`adam(eps=...)`")),
    "momentum = 1": (
        lambda: fq.sgd(1e-3, momentum=1.0),
        _value_error("`sgd(momentum=...)`", "1.0"),
    ),
    "momentum boolean": (
        lambda: fq.sgd(1e-3, False),
        _type_error("`sgd(momentum=...)`", "False"),
    ),
    "nesterov without momentum": (
        lambda: fq.sgd(1e-3, nesterov=True),
        _value_error("`sgd(nesterov=True)`", "momentum=0.9"),
    ),
    "dampening without momentum": (
        lambda: fq.sgd(1e-3, dampening=0.5),
        _value_error("`sgd(dampening=0.5)`", "momentum=0.9"),
    ),
    "dampening string": (
        lambda: fq.sgd(1e-3, dampening="0.5"),
        _type_error("`sgd(dampening=...)`", "'0.5'"),
    ),
    # True or False.
    "skip_nonfinite string": (
        lambda: fq.adamw(1e-3, skip_nonfinite="False"),
        _type_error("`adamw(skip_nonfinite=...)`", _flag, "'False'"),
    ),
    "skip_nonfinite array": (
        lambda: fq.adamw(1e-3, skip_nonfinite=jnp.array(True)),
        _type_error("`adamw(skip_nonfinite=...)`", _flag),
    ),
    "skip_nonfinite None": (
        lambda: fq.sgdw(1e-3, skip_nonfinite=None),
        _type_error("`sgdw(skip_nonfinite=...)`", _flag, "None"),
    ),
    "skip_nonfinite NumPy": (
        lambda: repr(fq.adamw(1e-3, skip_nonfinite=np.bool_(True))),
        _works(lambda text: "skip_nonfinite=True" in text),
    ),
    "decay misspelled": (
        lambda: fq.lion(1e-3, decay="independant"),
        _value_error("`lion(decay=...)`", "'independent'", "'independant'"),
    ),
    "decay boolean": (
        lambda: fq.adamw(1e-3, decay=True),
        _value_error("`adamw(decay=...)`", "'decoupled'", "True"),
    ),
    "decay of L2 regularization": (
        lambda: fq.sgdw(1e-3, decay="l2"),
        _value_error("`sgdw(decay=...)`", "'l2'", "`flashquinox.adam`, `sgd`"),
    ),
    "nesterov string": (
        lambda: fq.adam(1e-3, nesterov="False"),
        _type_error("`adam(nesterov=...)`", _flag, "'False'"),
    ),
    "nesterov array": (
        lambda: fq.adamw(1e-3, nesterov=jnp.array(False)),
        _type_error("`adamw(nesterov=...)`", _flag),
    ),
    "nesterov = 0.9": (
        lambda: fq.sgd(1e-3, 0.9, 0.9),
        _type_error("`sgd(nesterov=...)`", _flag, "0.9"),
    ),
    "nesterov string of a rule": (
        lambda: fq.optimizer(fq.Adam(nesterov="no"), 1e-3),
        _type_error("`optimizer(nesterov=...)`", _flag, "'no'"),
    ),
    "dither_weights string": (
        lambda: fq.adamw(
            1e-3, storage=fq.Storage(master_weight_bits=None, dither_weights="no")
        ),
        _type_error("`Storage(dither_weights=...)`", _flag),
    ),
    "decay of any rule misspelled": (
        lambda: fq.optimizer(fq.Adam(), 1e-3, decay="L2"),
        _value_error("`optimizer(decay=...)`", "'l2'", "got 'L2'"),
    ),
    "decay where there is L2 regularization": (
        lambda: fq.adam(1e-3, decay="l2"),
        _type_error("`adam` has no argument `decay`"),
    ),
    # Options, and arguments that are none.
    "an option that is none": (
        lambda: fq.adamw(1e-3, skip_nan=True),
        _type_error("`adamw` has no argument `skip_nan`", "skip_nonfinite"),
    ),
    "moments as an argument": (
        lambda: fq.lion(1e-3, moments="float32"),
        _type_error("`lion` has no argument `moments`", "flashquinox.Storage(moments"),
    ),
    "storage by name": (
        lambda: fq.adamw(1e-3, storage="float32"),
        _type_error("`adamw(storage=...)`", "`flashquinox.Storage`", "'float32'"),
    ),
    "storage None": (
        lambda: fq.adamw(1e-3, storage=None),
        _type_error("`adamw(storage=...)`", "`flashquinox.Storage`", "None"),
    ),
    "storage class": (
        lambda: fq.sgd(1e-3, storage=fq.Storage),
        _type_error("`sgd(storage=...)`", "Make one: `Storage(...)`"),
    ),
    "storage dict": (
        lambda: fq.optimizer(fq.Lion(), 1e-3, storage={"group_size": 64}),
        _type_error("`optimizer(storage=...)`", "{'group_size': 64}"),
    ),
    # How it is stored.
    "bits 16": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=16)),
        _value_error("`Storage(master_weight_bits=...)`", _bits, "16"),
    ),
    "bits '24'": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(master_weight_bits="24")),
        _value_error("`Storage(master_weight_bits=...)`", _bits, "'24'"),
    ),
    "bits 24.0": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=24.0)),
        _value_error("`Storage(master_weight_bits=...)`", _bits, "24.0"),
    ),
    "bits True": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=True)),
        _value_error("`Storage(master_weight_bits=...)`", _bits, "True"),
    ),
    "group 33": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(group_size=33)),
        _value_error("`Storage(group_size=...)`", _size, "33"),
    ),
    "group 0": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(group_size=0)),
        _value_error("`Storage(group_size=...)`", _size, "got 0"),
    ),
    "group 32.0": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(group_size=32.0)),
        _value_error("`Storage(group_size=...)`", _size, "32.0"),
    ),
    "group '32'": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(group_size="32")),
        _value_error("`Storage(group_size=...)`", _size, "'32'"),
    ),
    "group True": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(group_size=True)),
        _value_error("`Storage(group_size=...)`", _size, "True"),
    ),
    "group list": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(group_size=[32])),
        _value_error("`Storage(group_size=...)`", _size, "[32]"),
    ),
    "moments 'int8'": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(moments="int8")),
        _value_error("`Storage(moments=...)`", "'flashquinox'", "'int8'"),
    ),
    "moments misspelled": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(moments="flashoptin")),
        _value_error("`Storage(moments=...)`", "'flashoptim'", "'flashoptin'"),
    ),
    "moments None": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(moments=None)),
        _value_error("`Storage(moments=...)`", "None"),
    ),
    "moments dict": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(moments={"mu": "log"})),
        _value_error("`Storage(moments=...)`", "{'mu': 'log'}"),
    ),
    "moments without a hash": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(moments=[["a"], "log"])),
        _value_error("`Storage(moments=...)`", "[['a'], 'log']"),
    ),
    "moments array": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(moments=np.array(["log", "log"]))),
        _value_error("`Storage(moments=...)`", "an array"),
    ),
    "moments codec": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(moments=fq.SoftsignCodec())),
        _value_error("`Storage(moments=...)`", "MomentCodecs", "SoftsignCodec"),
    ),
    "moments class": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(moments=fq.MomentCodecs)),
        _value_error("`Storage(moments=...)`", "MomentCodecs"),
    ),
    "moments of a curve with an array": (
        lambda: fq.Storage(
            moments=fq.MomentCodecs(
                fq.CompandedCodec("signed", _Scaled(jnp.ones(()))), fq.FullPrecision()
            )
        ),
        _type_error("`Storage(moments=...)`", "CompandedCodec has no hash", "static"),
    ),
    "codecs in the other order": (
        lambda: fq.MomentCodecs(
            fq.FlashOptimCodec("nonnegative"), fq.FlashOptimCodec("signed")
        ),
        _value_error("`MomentCodecs(signed=...)`", "'nonnegative'"),
    ),
    "codec that is a name": (
        lambda: fq.MomentCodecs("softsign", fq.FullPrecision()),
        _type_error("`MomentCodecs(signed=...)`", "'softsign'"),
    ),
    "codec flag": (
        lambda: fq.SoftsignCodec(dithered="no"),
        _type_error("`SoftsignCodec(dithered=...)`", _flag),
    ),
    "curve string": (
        lambda: fq.RationalCurve("1"),
        _type_error("`RationalCurve(a=...)`", "'1'"),
    ),
    "backend 'cuda'": (
        lambda: fq.adamw(1e-3, backend="cuda"),
        _value_error("`adamw(backend=...)`", "'gpu'", "'cuda'"),
    ),
    "backend without a hash": (
        lambda: fq.adamw(1e-3, backend=["gpu"]),
        _value_error("`adamw(backend=...)`", "['gpu']"),
    ),
    "backend None": (
        lambda: fq.adamw(1e-3, backend=None),
        _value_error("`adamw(backend=...)`", "None"),
    ),
    "shardings that are none": (
        lambda: fq.adamw(1e-3, shardings={"w": "fsdp"}),
        _type_error("`adamw(shardings=...)`", "'fsdp'", "['w']"),
    ),
    # The peak of decoupled decay.
    "independent decay of a schedule": (
        lambda: fq.adamw(lambda c: 1e-3, decay="independent"),
        _value_error("`adamw(decay='independent')`", "peak_learning_rate=..."),
    ),
    "independent decay of an array": (
        lambda: fq.adamw(jnp.float32(1e-3), decay="independent"),
        _value_error("`adamw(decay='independent')`", "peak_learning_rate=..."),
    ),
    "independent decay of a rate of 0": (
        lambda: _step(fq.adamw(0.0, decay="independent", weight_decay=0.0)),
        _works(lambda result: bool(jnp.all(result[0]["w"] == 1))),
    ),
    "independent decay of a NumPy rate of 0": (
        lambda: _step(fq.adamw(np.float32(0), decay="independent")),
        _works(lambda result: bool(jnp.all(result[0]["w"] == 1))),
    ),
    "peak 0": (
        lambda: fq.adamw(1e-3, decay="independent", peak_learning_rate=0.0),
        _value_error("`adamw(peak_learning_rate=...)`", "must not be 0"),
    ),
    "peak array of 0": (
        lambda: fq.adamw(1e-3, decay="independent", peak_learning_rate=jnp.zeros(())),
        _value_error("`adamw(peak_learning_rate=...)`", "must not be 0"),
    ),
    "peak NumPy 0": (
        lambda: fq.adamw(1e-3, decay="independent", peak_learning_rate=np.float32(0)),
        _value_error("`adamw(peak_learning_rate=...)`", "must not be 0"),
    ),
    "peak boolean": (
        lambda: fq.adamw(1e-3, decay="independent", peak_learning_rate=True),
        _type_error("`adamw(peak_learning_rate=...)`", _number),
    ),
    "peak of decoupled decay": (
        lambda: fq.adamw(1e-3, peak_learning_rate=1e-3),
        _value_error("`adamw(peak_learning_rate=...)`", "decay='independent'"),
    ),
    "peak of L2 regularization": (
        lambda: fq.optimizer(fq.Adam(), 1e-3, decay="l2", peak_learning_rate=1e-3),
        _value_error("`optimizer(peak_learning_rate=...)`", "decay='independent'"),
    ),
    # Rules.
    "rule class": (
        lambda: fq.optimizer(fq.Adam, 1e-3),
        _type_error("`optimizer(rule=...)`", "AbstractRule", "Make one: `Adam(...)`"),
    ),
    "rule name": (
        lambda: fq.optimizer("adam", 1e-3),
        _type_error("`optimizer(rule=...)`", "'adam'"),
    ),
    "rule of Optax": (
        lambda: fq.optimizer(optax.adam(1e-3), 1e-3),
        _type_error("`optimizer(rule=...)`", "AbstractRule"),
    ),
    "rule and rate in the other order": (
        lambda: fq.optimizer(1e-3, fq.Adam()),
        _type_error("`optimizer(rule=...)`", "0.001"),
    ),
    # Names that there are not.
    "fq.AdamW": (lambda: fq.AdamW, Elsewhere(AttributeError, "AdamW")),
    "fq.soap": (lambda: fq.soap, Elsewhere(AttributeError, "soap")),
    "optim.apply": (lambda: _optim.apply, Elsewhere(AttributeError, "apply")),
    "optim(model)": (lambda: _optim(_model), Elsewhere(TypeError, "not callable")),
    "repr": (
        lambda: repr(_optim),
        _works(lambda text: text.startswith("adamw(learning_rate=0.001, b1=0.9,")),
    ),
}

SCHEDULES = {
    "of no arguments": (
        lambda: fq.adamw(lambda: 1e-3),
        _type_error(_rate, "a function of the number of steps", "<lambda>"),
    ),
    "of two arguments": (
        lambda: fq.adamw(1e-3, weight_decay=_polynomial),
        _type_error("`adamw(weight_decay=...)`", "_polynomial", "'count'"),
    ),
    "a class": (
        lambda: fq.adamw(_ModuleSchedule).init(_model),
        _type_error(_rate, "_ModuleSchedule"),
    ),
    "a model": (
        lambda: fq.adamw(_mlp).init(_model),
        Elsewhere(Exception, ""),
    ),
    "returns a vector": (
        lambda: _step(fq.adamw(lambda c: jnp.ones(3))),
        _type_error(_rate, "<lambda> returned an array float32[3]", _scalar),
    ),
    "returns a vector of one": (
        lambda: _step(fq.adamw(lambda c: jnp.ones(1))),
        _type_error(_rate, "returned an array float32[1]", _scalar),
    ),
    "returns a vector, traced": (
        lambda: jax.eval_shape(
            lambda s: fq.adamw(lambda c: c * jnp.ones(3, int)).step(_model, s, _grads),
            _state,
        ),
        _type_error(_rate, "returned a traced int32[3]", _scalar),
    ),
    "returns None": (
        lambda: _step(fq.adamw(lambda c: None)),
        _type_error(_rate, "returned None", _scalar),
    ),
    "returns a boolean": (
        lambda: _step(fq.adamw(lambda c: c > 3)),
        _type_error(_rate, "returned", _scalar),
    ),
    "returns a complex number": (
        lambda: _step(fq.adamw(lambda c: 1j)),
        _type_error(_rate, "returned 1j", _scalar),
    ),
    "returns a string": (
        lambda: _step(fq.adamw(lambda c: "1e-3")),
        _type_error(_rate, "returned '1e-3'", _scalar),
    ),
    "returns NaN": (
        lambda: _step(fq.adamw(lambda c: jnp.nan)),
        _value_error(_rate, "returned nan after 0 steps"),
    ),
    "returns an array of NaN": (
        lambda: _step(fq.adamw(lambda c: 0.0 / c.astype(jnp.float32))),
        _value_error(_rate, "returned nan after 0 steps"),
    ),
    "returns a negative number": (
        lambda: _step(fq.adamw(lambda c: -1e-2)),
        _value_error(_rate, "returned -0.01", "at least 0"),
    ),
    "decay is NaN": (
        lambda: fq.adamw(1e-3, weight_decay=lambda c: np.nan).init(_model),
        _value_error("`adamw(weight_decay=...)`", "returned nan"),
    ),
    "is found by init": (
        lambda: fq.adamw(lambda c: None).init(_model),
        _type_error(_rate, "returned None"),
    ),
    "raises": (lambda: _step(fq.adamw(_fails)), Elsewhere(KeyError, "schedule")),
    "returns an integer": (lambda: _step(fq.adamw(lambda c: 0)), _works()),
    "an object": (lambda: _step(fq.adamw(_Schedule())), _works(_stepped)),
    "a module": (
        lambda: _step(fq.adamw(_ModuleSchedule(jnp.float32(1e-3)))),
        _works(_stepped),
    ),
    "a partial": (
        lambda: _step(fq.adamw(functools.partial(_polynomial, 2))),
        _works(_stepped),
    ),
    "of Optax": (
        lambda: _step(fq.adamw(optax.constant_schedule(1e-3))),
        _works(_stepped),
    ),
}

MASKS = {
    "wrong structure": (
        lambda: fq.adamw(1e-3, mask={"w": True, "zz": False}).init(_model),
        _value_error("`adamw(...).init`", "`mask` has nothing at `['b']`"),
    ),
    "wrong structure, in step": (
        lambda: _step(fq.adamw(1e-3, mask={"w": True, "zz": False})),
        _value_error("`adamw(...).step`", "`mask` has nothing at `['b']`"),
    ),
    "wrong structure of a module": (
        lambda: fq.adamw(1e-3, mask={"a": True}).init(_mlp),
        _value_error("`adamw(...).init`", "`mask`", "`.layers[0].weight`"),
    ),
    "wrong structure from a function": (
        lambda: fq.adamw(1e-3, mask=lambda p: [True]).init(_model),
        _value_error("`adamw(...).init`", "`mask` has nothing at"),
    ),
    "a function that returns None": (
        lambda: fq.adamw(1e-3, mask=lambda p: None).init(_model),
        _type_error("`adamw(...).init`", "`mask`", "returned None"),
    ),
    "a function that raises": (
        lambda: fq.adamw(1e-3, mask=lambda p: p.foo).init(_model),
        Elsewhere(AttributeError, "foo"),
    ),
    "floats": (
        lambda: _step(fq.adamw(1e-3, mask={"w": 1.0, "b": 0.0})),
        _type_error("`mask` at `['b']`", _flag, "0.0"),
    ),
    "strings": (
        lambda: fq.adamw(1e-3, mask={"w": "no", "b": True}).init(_model),
        _type_error("`mask` at `['w']`", _flag, "'no'"),
    ),
    "elements": (
        lambda: fq.adamw(
            1e-3, mask=jtu.tree_map(lambda x: jnp.ones(x.shape, bool), _model)
        ).init(_model),
        _type_error("`mask` at `['b']`", "an array bool[5]", "of whole leaves"),
    ),
    "traced": (
        lambda: jax.eval_shape(
            lambda x: fq.adamw(1e-3, mask={"w": x, "b": True}).init(_model),
            jnp.array(True),
        ),
        _type_error("`mask` at `['w']`", "a traced bool[]", "part of the program"),
    ),
    "scalar arrays": (
        lambda: _step(fq.adamw(1e-3, mask={"w": jnp.array(True), "b": np.False_})),
        _works(_stepped),
    ),
    "a prefix": (lambda: _step(fq.adamw(1e-3, mask=True)), _works(_stepped)),
    "of the whole model, init of a part": (
        lambda: fq.adamw(1e-3, mask={"w": {"a": True}, "b": False}).init(
            {"w": None, "b": _model["b"]}
        ),
        _works(lambda state: state.count == 0),
    ),
    "with the decay of the default": (
        lambda: repr(fq.adamw(1e-3, mask={"w": True, "b": False})),
        _works(lambda text: "weight_decay=0.0001, mask={'w': True" in text),
    ),
    "without decay": (
        lambda: fq.adam(1e-3, mask={"w": True, "b": False}),
        _warns("`adam(mask=...)` has no effect", "`weight_decay` is 0"),
    ),
}


#
# The model
#

_LARGE = {"w": jnp.ones((8, 64), _BF16), "b": _model["b"]}

MODELS = {
    "float32": (lambda: _optim.init({"w": jnp.ones((4, 64))}), _works()),
    "float32, explicit 24": (
        lambda: fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=24)).init(_mlp32),
        _value_error("`Storage(master_weight_bits=24)`", "no effect", "float32"),
    ),
    "float16": (
        lambda: _optim.init(fq.cast(_mlp32, jnp.float16)),
        _works(lambda state: state.corrections.layers[0].weight.dtype == jnp.int8),
    ),
    "float32 beside bfloat16": (
        lambda: _optim.init(_with(_model, b=jnp.ones(5))),
        _works(lambda state: state.corrections["b"] is None),
    ),
    "empty": (
        lambda: _optim.step({}, _optim.init({}), {}),
        _works(lambda result: result[0] == {} and result[1].count == 1),
    ),
    "None": (lambda: _optim.init(None), _type_error("`adamw(...).init`", "is None")),
    "the state": (
        lambda: _optim.init(_state),
        _type_error("`adamw(...).init`", "OptimizerState", "the model belongs"),
    ),
    "Python floats": (
        lambda: _optim.init({"w": 1.0}),
        _warns("`adamw(...).init`", "nothing to train", "`['w']`", "1.0"),
    ),
    "a class": (
        lambda: _optim.init(eqx.nn.Linear),
        _warns("`adamw(...).init`", "nothing to train"),
    ),
    "NumPy bfloat16": (
        lambda: _optim.step(
            jtu.tree_map(np.asarray, _model), _state, jtu.tree_map(np.asarray, _grads)
        ),
        _works(_stepped),
    ),
    "float8 beside bfloat16": (
        lambda: _optim.init(_with(_model, b=jnp.ones(5, jnp.float8_e4m3fn))),
        _works(lambda state: state.moments["mu"]["b"] is None),
    ),
    "float8 alone": (
        lambda: _optim.init({"w": jnp.ones((4, 64), jnp.float8_e4m3fn)}),
        _warns("`adamw(...).init`", "nothing to train", "float8_e4m3fn[4,64]"),
    ),
    "complex alone": (
        lambda: _optim.init({"w": jnp.ones(3, jnp.complex64)}),
        _warns("`adamw(...).init`", "nothing to train", "complex64[3]"),
    ),
    "shapes": (
        lambda: _optim.init(jax.eval_shape(lambda: _model)),
        _warns("`adamw(...).init`", "nothing to train", "ShapeDtypeStruct"),
    ),
    "NumPy": (
        lambda: _optim.init(jtu.tree_map(lambda x: np.ones(x.shape, "f"), _model)),
        _works(lambda state: state.moments["mu"]["w"].codes.shape == (4, 64)),
    ),
    "cast to integers": (
        lambda: fq.cast(_mlp, jnp.int8),
        _type_error("`cast(model, dtype)`", "floating-point", "'int8'"),
    ),
    "cast to None": (
        lambda: fq.cast(_mlp, None),
        _type_error("`cast(model, dtype)`", "None"),
    ),
    "cast to a name": (
        lambda: fq.cast(_mlp32, "bfloat16").layers[0].weight.dtype,
        _works(lambda dtype: dtype == _BF16),
    ),
    "cast to a name that there is not": (
        lambda: fq.cast(_mlp32, "bf16"),
        _type_error("`cast(model, dtype)`", "'bf16'"),
    ),
    "cast in the other order": (
        lambda: fq.cast(_BF16, _mlp32),
        _type_error("`cast(model, dtype)`", "MLP"),
    ),
    "cast in the other order, of a dictionary": (
        lambda: fq.cast(_BF16, _model),
        _type_error("`cast(model, dtype)`", "{'w'"),
    ),
    "cast with a string for wrap": (
        lambda: fq.cast(_mlp32, _BF16, wrap="no"),
        _type_error("`cast(wrap=...)`", _flag),
    ),
    "keep misspelled": (
        lambda: fq.cast(_mlp, _BF16, keep="layres.0"),
        _value_error("`cast(keep=...)`", "'layres.0' is nowhere", "layers.0.weight"),
    ),
    "keep one of two misspelled": (
        lambda: fq.cast(_mlp, _BF16, keep=["layers.0", "layer.1"]),
        _value_error("`cast(keep=...)`", "'layer.1' is nowhere"),
    ),
    "keep a type that there is not": (
        lambda: fq.cast(_mlp, _BF16, keep=eqx.nn.LayerNorm),
        _value_error("`cast(keep=...)`", "there is no LayerNorm in the model"),
    ),
    "keep a function that is true of nothing": (
        lambda: fq.cast(_mlp, _BF16, keep=lambda x: x.ndim > 5),
        _value_error("`cast(keep=...)`", "<lambda> is true of no array"),
    ),
    "keep an object of another model": (
        lambda: fq.cast(_mlp, _BF16, keep=eqx.nn.Linear(2, 2, key=jax.random.key(1))),
        _value_error("`cast(keep=...)`", "This Linear is nowhere in the model"),
    ),
    "keep a type that there is beside one that there is not": (
        lambda: fq.cast(_mlp32, _BF16, keep=[eqx.nn.LayerNorm, eqx.nn.Linear]),
        _works(lambda model: not jtu.tree_leaves(fq.cast(model, _BF16)) == []),
    ),
    "keep nothing": (
        lambda: fq.cast(_mlp32, _BF16, keep=[]).layers[0].weight.dtype,
        _works(lambda dtype: dtype == _BF16),
    ),
    "keep a function that returns a string": (
        lambda: fq.cast(_mlp, _BF16, keep=lambda x: "no"),
        _type_error("`cast(keep=...)`", "<lambda> returned 'no'", "True or False"),
    ),
    "keep the empty string": (
        lambda: fq.cast(_mlp, _BF16, keep=""),
        _value_error("`cast(keep=...)`", "'' is nowhere"),
    ),
    "keep a number": (
        lambda: fq.cast(_mlp, _BF16, keep=3),
        _type_error("`cast(keep=...)`", "patterns", "got 3"),
    ),
}


#
# `step` and `update`
#


def _vmapped_init():
    models = jtu.tree_map(lambda x: jnp.stack([x, x]), _model)
    return jax.vmap(_optim.init)(models)


def _donated():
    model = jtu.tree_map(jnp.array, _model)
    jtu.tree_map(lambda x: x.delete(), model)
    return model


def _donated_state():
    state = jtu.tree_map(jnp.array, _state)
    state.moments["mu"]["w"].codes.delete()
    return state


_step_call = "`adamw(...).step`"

CALLS = {
    # Order.
    "step(model, grads, state)": (
        lambda: _optim.step(_model, _grads, _state),
        _type_error(_step_call, "no `flashquinox.OptimizerState` but a dict"),
    ),
    "step(grads, model, state)": (
        lambda: _optim.step(_grads, _model, _state),
        _type_error(_step_call, "the model comes before the state"),
    ),
    "step(state, model, grads)": (
        lambda: _optim.step(_state, _model, _grads),
        _type_error(_step_call, "the model comes before the state"),
    ),
    "step(state, grads, model)": (
        lambda: _optim.step(_state, _grads, _model),
        _type_error(_step_call, "the model comes before the state"),
    ),
    # Two trees of arrays of the same shapes and dtypes: nothing tells them apart.
    "step(grads, state, model), of arrays": (
        lambda: _optim.step(_grads, _state, _model),
        _works(),
    ),
    "step(grads, state, model), of a module": (
        lambda: _optim.step(_mlp_grads, _mlp_state, _mlp),
        _type_error(_step_call, ".activation", "changed places"),
    ),
    "step(grads, state, model), of float32 gradients": (
        lambda: _optim.step(fq.cast(_grads, jnp.float32), _state, _model),
        _value_error(_step_call, "float32", "bfloat16"),
    ),
    "step(model, state)": (
        lambda: _optim.step(_model, _state),
        Elsewhere(TypeError, "grads"),
    ),
    "step(model, state, None)": (
        lambda: _optim.step(_model, _state, None),
        _type_error(_step_call, "`grads` is None"),
    ),
    "step(None, state, grads)": (
        lambda: _optim.step(None, _state, _grads),
        _type_error(_step_call, "the model is None"),
    ),
    "step(model, None, grads)": (
        lambda: _optim.step(_model, None, _grads),
        _type_error(_step_call, "NoneType", "`init`"),
    ),
    "step(model, state, state)": (
        lambda: _optim.step(_model, _state, _state),
        _type_error(_step_call, "`grads` is a `flashquinox.OptimizerState`"),
    ),
    "step((model, state), grads)": (
        lambda: _optim.step((_model, _state), _grads),
        Elsewhere(TypeError, "grads"),
    ),
    "step(*init's arguments)": (
        lambda: _optim.init(_model, _state),
        Elsewhere(TypeError, ""),
    ),
    "update(grads, state)": (
        lambda: _optim.update(_grads, _state),
        _value_error("`adamw(...).update(grads, state, params)`", "third argument"),
    ),
    "update(model, state, grads), of arrays": (
        lambda: _optim.update(_model, _state, _grads),
        _works(),
    ),
    "update(model, state, grads), of a module": (
        lambda: _optim.update(_mlp, _mlp_state, _mlp_grads),
        _type_error("`adamw(...).update`", ".activation", "changed places"),
    ),
    "update(state, grads, params)": (
        lambda: _optim.update(_mlp_state, _mlp_grads, _arrays),
        _type_error("`adamw(...).update`", "OptimizerState", "MLP"),
    ),
    "update(grads, params, state)": (
        lambda: _optim.update(_grads, _model, _state),
        _type_error("`adamw(...).update`", "the model comes before the state"),
    ),
    "update(params, grads, state)": (
        lambda: _optim.update(_model, _grads, _state),
        _type_error("`adamw(...).update`", "the gradients before it in `update("),
    ),
    # Gradients.
    "gradients and their value": (
        lambda: _optim.step(_model, _state, (1.0, _grads)),
        _type_error(_step_call, "`grads` is a tuple", "value_and_grad", "has_aux"),
    ),
    "a gradient is missing": (
        lambda: _optim.step(_model, _state, {"w": _grads["w"]}),
        _value_error(_step_call, "`grads` has nothing at `['b']`", "eqx.filter_grad"),
    ),
    "one gradient too many": (
        lambda: _optim.step(_model, _state, _with(_grads, c=_grads["b"])),
        _value_error(_step_call, "`grads` has a leaf at `['c']`"),
    ),
    "a gradient of another shape": (
        lambda: _optim.step(_model, _state, _with(_grads, w=_grads["w"][:2])),
        _value_error(_step_call, "(2, 64)", "(4, 64)", "`['w']`"),
    ),
    "integers": (
        lambda: _optim.step(_model, _state, _with(_grads, w=jnp.ones((4, 64), int))),
        _type_error(_step_call, "`['w']`", "int32", "bfloat16, float16"),
    ),
    "booleans": (
        lambda: _optim.step(_model, _state, _with(_grads, w=jnp.ones((4, 64), bool))),
        _type_error(_step_call, "`['w']`", "bool"),
    ),
    "complex": (
        lambda: _optim.step(
            _model, _state, _with(_grads, w=jnp.ones((4, 64), jnp.complex64))
        ),
        _type_error(_step_call, "`['w']`", "complex64"),
    ),
    "float8": (
        lambda: _optim.step(
            _model, _state, _with(_grads, w=jnp.ones((4, 64), jnp.float8_e4m3fn))
        ),
        _type_error(_step_call, "`['w']`", "float8_e4m3fn"),
    ),
    "a Python number": (
        lambda: _optim.step(_model, _state, _with(_grads, w=1.0)),
        _type_error(_step_call, "`['w']`", "1.0", "None"),
    ),
    "a list": (
        lambda: _optim.step(_model, _state, _with(_grads, w=[1.0])),
        _value_error(_step_call, "`grads` has nothing at `['w']`"),
    ),
    "shapes": (
        lambda: _optim.step(_model, _state, eqx.filter_eval_shape(lambda: _grads)),
        _type_error(_step_call, "`['b']`", "ShapeDtypeStruct"),
    ),
    "float32": (
        lambda: _optim.step(_model, _state, fq.cast(_grads, jnp.float32)),
        _works(_stepped),
    ),
    "None for a leaf": (
        lambda: _optim.step(_model, _state, _with(_grads, b=None))[0]["b"],
        _works(lambda b: bool(jnp.all(b == 1))),
    ),
    "of a Python number": (
        lambda: _optim.step(
            _with(_model, p=0.5),
            _optim.init(_with(_model, p=0.5)),
            _with(_grads, p=jnp.ones(())),
        ),
        _type_error(_step_call, "`['p']`", "float, is not trained"),
    ),
    "of integers": (
        lambda: _optim.step(
            _with(_model, n=jnp.arange(3)),
            _optim.init(_with(_model, n=jnp.arange(3))),
            _with(_grads, n=jnp.ones(3)),
        ),
        _type_error(_step_call, "`['n']`", "int32, is not trained"),
    ),
    "NaN": (
        lambda: _optim.step(_model, _state, jtu.tree_map(lambda x: x * np.nan, _grads)),
        _works(lambda result: bool(jnp.all(jnp.isnan(result[0]["w"])))),
    ),
    "donated weights": (
        lambda: _optim.step(_donated(), _state, _grads),
        Raises(RuntimeError, (_step_call, "`['b']` of `model`", "donated")),
    ),
    "donated state": (
        lambda: _optim.step(_model, _donated_state(), _grads),
        Raises(RuntimeError, (_step_call, "of `state`", "donated", "mu")),
    ),
    "donated, in what looks into states": (
        lambda: fq.master_weights(_donated(), _state),
        Raises(RuntimeError, ("`master_weights`", "`['b']` of `model`", "donated")),
    ),
    "a state of shapes": (
        lambda: _optim.step(_model, jax.eval_shape(lambda: _state), _grads),
        _type_error(_step_call, "count", "`state`", "ShapeDtypeStruct", "eval_shape"),
    ),
    "a state of shapes, its moments": (
        lambda: fq.map_moments(lambda m: m, jax.eval_shape(lambda: _state)),
        _type_error("`map_moments`", "count", "`state`", "ShapeDtypeStruct"),
    ),
    "a model of shapes": (
        lambda: _optim.update(_grads, _state, jax.eval_shape(lambda: _model)),
        _type_error("`adamw(...).update`", "`['b']` of `model`", "ShapeDtypeStruct"),
    ),
    "donated gradients": (
        lambda: _optim.step(_model, _state, _donated()),
        Raises(RuntimeError, (_step_call, "`['b']` of `grads`", "donated")),
    ),
    # State.
    "state of another optimizer": (
        lambda: fq.lion(1e-3).step(_model, _state, _grads),
        _value_error("`lion(...).step`", "another optimizer", "['mu', 'nu']", "`init`"),
    ),
    "state of lion": (
        lambda: _optim.step(_model, fq.lion(1e-3).init(_model), _grads),
        _value_error(_step_call, "another optimizer", "['mu']"),
    ),
    "state of SGD with momentum": (
        lambda: fq.sgd(1e-3).step(_model, fq.sgd(1e-3, 0.9).init(_model), _grads),
        _value_error("`sgd(...).step`", "another optimizer", "['trace']"),
    ),
    # Both keep the same; the one goes on where the other stopped.
    "state of adam": (
        lambda: _optim.step(_model, fq.adam(1e-3).init(_model), _grads),
        _works(_stepped),
    ),
    "state of Optax": (
        lambda: _optim.step(_model, optax.adamw(1e-3).init(_model), _grads),
        _type_error(_step_call, "no `flashquinox.OptimizerState` but a tuple"),
    ),
    "state in Optax": (
        lambda: optax.adamw(1e-3).update(_grads, _state, _model),
        Elsewhere(TypeError, ""),
    ),
    "state of another width": (
        lambda: _optim.step(_LARGE, _state, _with(_grads, w=_LARGE["w"])),
        _value_error(_step_call, "'mu' at `['w']`", "(4, 64)", "(8, 64)"),
    ),
    "state of another structure": (
        lambda: _optim.step(_model, _optim.init([*_model.values()]), _grads),
        _value_error(_step_call, "`state.moments['mu']` has nothing at `['b']`"),
    ),
    "state of another depth": (
        lambda: _optim.step(
            _mlp,
            _optim.init(fq.cast(eqx.nn.MLP(4, 4, 8, 2, key=jax.random.key(0)), _BF16)),
            _mlp_grads,
        ),
        _value_error(_step_call, "`.layers[2].weight`", "the model has none"),
    ),
    "state of another group size": (
        lambda: _step(fq.adamw(1e-3, storage=fq.Storage(group_size=64))),
        _value_error(_step_call, "group_size=32", "group_size=64", "`init`"),
    ),
    "state of other moments": (
        lambda: _step(fq.adamw(1e-3, storage=fq.Storage(moments="log"))),
        _value_error(_step_call, "LinearCodec", "moments=..."),
    ),
    "state with corrections, optimizer without": (
        lambda: _step(fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=None))),
        _value_error(_step_call, "master_weight_bits=None", "`init`"),
    ),
    "state of 24 bits, optimizer of 32": (
        lambda: _step(fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=32))),
        _value_error(_step_call, "flashquinox.widen_corrections"),
    ),
    "state of float32 weights, weights of bfloat16": (
        lambda: _optim.step(_model, _optim.init(fq.cast(_model, jnp.float32)), _grads),
        _value_error(_step_call, "bfloat16"),
    ),
    "state of bfloat16 weights, weights of float32": (
        lambda: _optim.step(fq.cast(_model, jnp.float32), _state, _grads),
        _value_error(_step_call, "float32", "int8 correction", "`init`"),
    ),
    "state that is cast": (
        lambda: _optim.step(
            _model, jtu.tree_map(lambda x: x.astype(jnp.float32), _state), _grads
        ),
        _type_error(_step_call, "float32", "must be int32", "`init`"),
    ),
    "state of None": (
        lambda: _optim.step(_model, jtu.tree_map(lambda x: None, _state), _grads),
        _type_error(_step_call, "None", "int32", "`init`"),
    ),
    "state of an ensemble": (
        lambda: _optim.step(_model, _vmapped_init(), _grads),
        _value_error(_step_call, "(2,)", "vmap", "eqx.filter_vmap(optim.step)"),
    ),
    "vmap over arrays of other sizes": (
        lambda: jax.vmap(lambda model: _optim.step(model, _state, _grads)[0])(_model),
        Elsewhere(ValueError, "vmap"),
    ),
    "jax.jit of a module with functions": (
        lambda: jax.jit(_optim.step)(_mlp, _mlp_state, _mlp_grads),
        Elsewhere(TypeError, "Error interpreting argument to"),
    ),
    "weights cast from bfloat16 to float16": (
        lambda: _optim.step(fq.cast(_model, jnp.float16), _state, _grads),
        _value_error(
            _step_call, "float16", "that of a bfloat16 weight", "Cast the model back"
        ),
    ),
    # Wrappers.
    # In one step, nothing tells; `verify_weights=True` notices it in the next.
    "a factor after the optimizer": (
        lambda: (
            (chain := optax.chain(_optim, optax.scale(0.5)))
            .update(_grads, chain.init(_model), _model)[0]["w"]
            .shape
        ),
        _works(lambda shape: shape == (4, 64)),
    ),
    "several optimizers": (
        lambda: optax.multi_transform(
            {"a": fq.adamw(1e-3), "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}
        ).init(_model),
        _works(),
    ),
    "init under jit": (
        lambda: jax.jit(_optim.init)(_model).count,
        _works(lambda count: count == 0),
    ),
}


#
# Other functions of a state
#

_mesh = jax.sharding.AbstractMesh((2,), ("a",))
_loss = fq.LayeredLoss(
    blocks=lambda model: {"w": model["w"]},
    prologue=lambda model, batch, key: batch,
    block=lambda block, x, batch, key: x * block["w"],
    epilogue=lambda model, x, batch, key: jnp.sum(x),
)

OTHERS = {
    "master_weights(state, model)": (
        lambda: fq.master_weights(_state, _model),
        _type_error("`master_weights`", "OptimizerState", "dict"),
    ),
    "master_weights(model, model)": (
        lambda: fq.master_weights(_model, _model),
        _type_error("`master_weights`", "OptimizerState"),
    ),
    "master_weights without corrections": (
        lambda: fq.master_weights(
            _model,
            fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=None)).init(_model),
        ),
        _works(lambda model: model["w"].dtype == jnp.float32),
    ),
    "from_master_weights of bfloat16": (
        lambda: fq.from_master_weights(_model, _model, _state),
        _type_error("`from_master_weights`", "`['b']`", "bfloat16", "float32"),
    ),
    "from_master_weights(model, float32_model, state)": (
        lambda: fq.from_master_weights(_model, fq.cast(_model, jnp.float32), _state),
        _type_error("`from_master_weights`", "bfloat16"),
    ),
    "from_master_weights(model, state)": (
        lambda: fq.from_master_weights(_model, _state),
        Elsewhere(TypeError, "state"),
    ),
    "check_numerics of a rate of 0": (
        lambda: fq.check_numerics(_model, _state, learning_rate=0),
        _value_error("`check_numerics(learning_rate=...)`", "positive", "got 0"),
    ),
    "check_numerics of a boolean": (
        lambda: fq.check_numerics(_model, _state, jnp.array(True)),
        _type_error("`check_numerics(learning_rate=...)`", _number),
    ),
    "check_numerics without a rate": (
        lambda: fq.check_numerics(_model, _state),
        Elsewhere(TypeError, "learning_rate"),
    ),
    "check_numerics that raises 'no'": (
        lambda: fq.check_numerics(_model, _state, 1e-3, raise_on_error="no"),
        _type_error("`check_numerics(raise_on_error=...)`", _flag),
    ),
    "widen what there is not": (
        lambda: fq.widen_corrections(_model, _state, ["nope"]),
        _value_error("`widen_corrections(leaves=...)`", "'nope' is nowhere", "b, w"),
    ),
    "widen by a function that is true of nothing": (
        lambda: fq.widen_corrections(_model, _state, lambda x: x.ndim == 7),
        _value_error("`widen_corrections(leaves=...)`", "true of no array"),
    ),
    "widen_corrections(state, model)": (
        lambda: fq.widen_corrections(_state, _model),
        _type_error("`widen_corrections`", "OptimizerState"),
    ),
    "from_master_weights(None, model, state)": (
        lambda: fq.from_master_weights(None, _model, _state),
        # It may stand for any part of the model that stays as it is.
        _works(lambda result: result[0] is not None),
    ),
    "check_numerics of a schedule without arguments": (
        lambda: fq.check_numerics(_model, _state, lambda: 1e-3),
        _type_error("`check_numerics(learning_rate=...)`", "<lambda>"),
    ),
    "check_numerics of a schedule that returns None": (
        lambda: fq.check_numerics(_model, _state, lambda c: None),
        _type_error("`check_numerics(learning_rate=...)`", "returned None"),
    ),
    "check_numerics of an optimizer": (
        lambda: fq.check_numerics(_model, _state, _optim),
        _type_error("`check_numerics(learning_rate=...)`", "got adamw(learning_rate="),
    ),
    "fsdp_shardings(mesh, model)": (
        lambda: fq.fsdp_shardings(None, _model),
        _type_error("`fsdp_shardings(model, mesh)`", "{'w'"),
    ),
    "fsdp_shardings of a group size": (
        lambda: fq.fsdp_shardings(_model, _mesh, storage=32),
        _type_error("`fsdp_shardings(storage=...)`", "`flashquinox.Storage`", "32"),
    ),
    "fsdp_shardings of blocks by name": (
        lambda: fq.fsdp_shardings(_model, _mesh, blocks="layers"),
        _type_error("`fsdp_shardings(blocks=...)`", "takes a function", "'layers'"),
    ),
    "LayeredLoss of names": (
        lambda: fq.LayeredLoss("layers", jnp.sum, jnp.sum, jnp.sum),
        _type_error("`LayeredLoss(blocks=...)`", "takes a function", "'layers'"),
    ),
    "release_step of a plain loss": (
        lambda: fq.release_step(_optim, jnp.sum, _model, _state, jnp.ones(3)),
        _type_error("`release_step`", "LayeredLoss", "sum"),
    ),
    "release_step of a wrapper": (
        lambda: fq.release_step(
            optax.chain(_optim), _loss, _model, _state, jnp.ones(3)
        ),
        _type_error("`release_step`", "no `flashquinox.Optimizer`", "optax.chain"),
    ),
    "release_step(optim, loss, state, model, batch)": (
        lambda: fq.release_step(_optim, _loss, _state, _model, jnp.ones(3)),
        _type_error("`release_step`", "the model comes before the state"),
    ),
    "release_step of a boolean norm": (
        lambda: fq.release_step(
            _optim, _loss, _model, _state, jnp.ones(3), max_norm=True
        ),
        _type_error("`release_step(max_norm=...)`", _number),
    ),
    "release_step of a number for a key": (
        lambda: fq.release_step(_optim, _loss, _model, _state, jnp.ones(3), 0),
        _type_error("`release_step(key=...)`", "jax.random.key(0)", "got 0"),
    ),
    "memory_plan of the state": (
        lambda: fq.memory_plan(_model, _state),
        _type_error("`memory_plan`", "OptimizerState"),
    ),
    "memory_plan of no optimizer": (
        lambda: fq.memory_plan(_model, 1e-3),
        _type_error("`memory_plan`", "0.001"),
    ),
}


def _reloaded(like):
    """Into other trees than those that Equinox wrote."""
    eqx.tree_serialise_leaves("saved.eqx", (_model, _state))
    return eqx.tree_deserialise_leaves("saved.eqx", like)


FILES = {
    "Equinox's file of another model": (
        lambda: _reloaded((_LARGE, _optim.init(_LARGE))),
        Elsewhere(RuntimeError, "changed shape"),
    ),
    "Equinox's file into the state of lion": (
        lambda: _reloaded((_model, fq.lion(1e-3).init(_model))),
        Elsewhere(RuntimeError, "changed dtype"),
    ),
    "Equinox's file into corrections of 32 bits": (
        lambda: _reloaded(
            (
                _model,
                fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=32)).init(_model),
            )
        ),
        Elsewhere(RuntimeError, "changed dtype"),
    ),
    "save_safetensors(model, path)": (
        lambda: exchange.save_safetensors(_model, "model"),
        _type_error("`save_safetensors(path, ...)`", "takes a path", "{'w'"),
    ),
    "save_safetensors(path, state, model)": (
        lambda: exchange.save_safetensors("model", _state, _model),
        _type_error("`save_safetensors`", "OptimizerState"),
    ),
    "save_safetensors of None": (
        lambda: exchange.save_safetensors("model", None),
        _type_error("`save_safetensors`", "is None"),
    ),
    "save_safetensors to a folder": (
        lambda: exchange.save_safetensors(".", _model),
        Raises(IsADirectoryError, ("`save_safetensors`", "is a folder")),
    ),
    "save_safetensors into no folder": (
        lambda: exchange.save_safetensors("absent/x", _model),
        Raises(FileNotFoundError, ("`save_safetensors`", "no folder absent")),
    ),
    "save_safetensors as integers": (
        lambda: exchange.save_safetensors("model", _model, dtype=jnp.int8),
        _type_error("`save_safetensors(dtype=...)`", "'int8'"),
    ),
    "load_safetensors(model, path)": (
        lambda: exchange.load_safetensors(_model, "model"),
        _type_error("`load_safetensors(path, ...)`", "takes a path", "{'w'"),
    ),
    "load_safetensors of a folder": (
        lambda: exchange.load_safetensors(".", _model),
        Raises(IsADirectoryError, ("`load_safetensors`", "is a folder")),
    ),
    "load_safetensors of nothing": (
        lambda: exchange.load_safetensors("absent/x", _model),
        Raises(FileNotFoundError, ("`load_safetensors`", "no file absent/x")),
    ),
    "load_safetensors of a text": (
        lambda: exchange.load_safetensors(__file__, _model),
        _value_error("`load_safetensors`", "damaged, or no safetensors file"),
    ),
    "from_optax(state, optax_state)": (
        lambda: exchange.from_optax(_state, optax.adamw(1e-3).init(_model)),
        _value_error("`from_optax`", "no `OptimizerState` in `state`"),
    ),
    "to_optax(optax_state, state)": (
        lambda: exchange.to_optax(optax.adamw(1e-3).init(_model), _state),
        _value_error("`to_optax`", "no `OptimizerState` in `state`"),
    ),
    "from_optax of another optimizer": (
        lambda: exchange.from_optax(optax.sgd(0.1).init(_model), _state),
        _value_error("`from_optax`", "no `ScaleByAdamState`"),
    ),
    "Checkpoints(None)": (
        lambda: Checkpoints(None),
        _type_error("`Checkpoints(directory, ...)`", "takes a path", "None"),
    ),
    "Checkpoints of a file": (
        lambda: Checkpoints(__file__),
        Raises(CheckpointError, ("is a file", "Pass a directory")),
    ),
    "Checkpoints that keep none": (
        lambda: Checkpoints("x", max_to_keep=0),
        _value_error("`Checkpoints(max_to_keep=...)`", "from 1", "got 0"),
    ),
    "Checkpoints.restore of nothing": (
        lambda: Checkpoints("empty").restore(_model, _state),
        Raises(CheckpointError, ("`Checkpoints.restore`", "there is no checkpoint")),
    ),
    "Checkpoints.save(model, state, step)": (
        lambda: Checkpoints("x").save(_model, _state, 1),
        _type_error("`Checkpoints.save(step=...)`", "an integer", "{'w'"),
    ),
    "Checkpoints.save(True, model, state)": (
        lambda: Checkpoints("x").save(True, _model, _state),
        _type_error("`Checkpoints.save(step=...)`", "an integer", "True"),
    ),
    "Checkpoints.save(step, state, model)": (
        lambda: Checkpoints("x").save(1, _state, _model),
        _type_error("`Checkpoints.save`", "the model comes before the state"),
    ),
}

_TABLE = {
    f"{kind}: {name}": row
    for kind, rows in {
        "arguments": ARGUMENTS,
        "schedules": SCHEDULES,
        "masks": MASKS,
        "models": MODELS,
        "calls": CALLS,
        "others": OTHERS,
        "files": FILES,
    }.items()
    for name, row in rows.items()
}


@pytest.mark.parametrize("name", _TABLE)
def test_outcome(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, outcome = _TABLE[name]
    outcome.check(call)
