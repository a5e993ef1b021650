"""Scales of quantized weights are not trained by accident."""

import re
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import qwix
from flax import nnx

import flashquinox as fq


class _Linear(eqx.Module):
    codes: jax.Array
    scale: jax.Array
    bias: jax.Array
    down: jax.Array


def _linear(dtype: Any = jnp.int8) -> _Linear:
    # The shapes of adapters and biases could be those of scales.
    shape = 64, 128
    return _Linear(
        jnp.ones(shape, dtype), jnp.ones(64), jnp.zeros(64), jnp.ones((8, 128))
    )


_W = jnp.ones((64, 128), jnp.bfloat16)
_CODES, _SCALES = jnp.ones((64, 128), jnp.int8), jnp.ones((64, 2))
_MODELS = {
    "a module": (_linear(), ".scale", ".codes"),
    "float8": (_linear(jnp.float8_e4m3fn), ".scale", ".codes"),
    "Qwix": (
        {"a": qwix.quantize(_W, jnp.int8, channelwise_axes=(0,)), "b": _W},
        "['a'].scale",
        "['a'].qvalue",
    ),
    "packed": (
        {"qweight": jnp.ones((16, 64), jnp.int32), "absmax": jnp.ones(16)},
        "['absmax']",
        "['qweight']",
    ),
    "short names": (
        {"q": jnp.ones((64, 16), jnp.float8_e4m3fn), "s": _SCALES},
        "['s']",
        "['q']",
    ),
    "a tuple": ([(_CODES, _SCALES)], "[0][1]", "[0][0]"),
    "trees": (
        {"codes": {"a": _CODES}, "scales": {"a": _SCALES}},
        "['scales']['a']",
        "['codes']['a']",
    ),
    "NNX": (
        nnx.State({"w": {"qvalue": nnx.Param(_CODES), "scale": nnx.Param(_SCALES)}}),
        "['w']['scale']",
        "['w']['qvalue']",
    ),
}


@pytest.mark.parametrize("kind", _MODELS)
def test_scales_are_an_error(kind):
    model, scale, codes = _MODELS[kind]
    message = f"`adamw(...).init`: the leaf at `{scale}"
    optim = fq.adamw(1e-3)
    for init in (optim.init, jax.jit(optim.init)):
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            init(model)
        text = str(raised.value)
        assert f"quantized weight at `{codes}" in text and "other lea" not in text
        assert "eqx.partition(model, spec)" in text


@pytest.mark.parametrize("kind", _MODELS)
def test_casts_leave_scales_alone(kind):
    """All else that is floating-point is cast, in both directions."""
    model, scale, _ = _MODELS[kind]
    for dtype in (jnp.bfloat16, jnp.float32):
        new = fq.cast(model, dtype)
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(model),
            jax.tree.leaves(new),
            strict=True,
        )
        for (path, old), x in pairs:
            is_scale = scale in jax.tree_util.keystr(path)
            is_code = jnp.finfo(old.dtype).bits < 16 if old.dtype.kind in "fV" else True
            assert x.dtype == (old.dtype if is_scale or is_code else dtype), path


def test_scales_are_cast_where_they_are_chosen():
    model = {"a": _linear(), "scale": jnp.ones(64)}
    model = eqx.tree_at(lambda m: m["a"].scale, model, jnp.ones(64, jnp.bfloat16))
    assert fq.cast(model, jnp.bfloat16, keep="a.scale")["a"].scale.dtype == jnp.float32
    # What has no codes next to it is a weight.
    assert fq.cast(model, jnp.bfloat16)["scale"].dtype == jnp.bfloat16


def test_they_are_counted():
    model = {"a": _linear(), "b": [_linear(), _linear()]}
    with pytest.raises(ValueError, match="; and so do 2 other leaves"):
        fq.prepare(model, fq.lion(1e-3))


def test_the_rest_is_trained():
    """As the message says."""
    model = {"base": _linear(), "head": jnp.ones((4, 64))}
    spec = {"base": False, "head": True}
    trained, frozen = eqx.partition(model, spec)
    optim = fq.adamw(1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = optim.init(trained)
        # What is a bias or an adapter may be trained beside codes.
        part = eqx.tree_at(lambda m: m.scale, _linear(), None)
        assert optim.init(part).moments["mu"].down is not None
    grads = eqx.filter_grad(
        lambda trained: jnp.sum(eqx.combine(trained, frozen)["head"])
    )(trained)
    new, _ = optim.step(model, state, grads)
    assert jnp.all(new["base"].scale == model["base"].scale)
    assert jnp.any(new["head"] != model["head"])


def test_scales_without_their_codes():
    model = [_linear(), _linear()]
    part = eqx.filter(model, eqx.is_inexact_array)
    with pytest.warns(UserWarning, match="whose codes, at .*, were left out") as caught:
        state = fq.adamw(1e-3).init(part)
    (found,) = caught
    assert "`[0].scale`" in str(found.message)
    assert "1 other leaf" in str(found.message)
    assert state.moments["mu"][0].scale is not None


@pytest.mark.parametrize(
    "model",
    [
        {"norm": {"scale": jnp.ones(64), "bias": None}, "w": _W},
        # More scales than codes would be no codes.
        {"scale": jnp.ones(64), "index": jnp.arange(8)},
        (jnp.arange(64), jnp.ones(32)),
        {"index": jnp.arange(128), "z": jnp.ones(64)},
        {"weight": _W, "scale": jnp.ones(64)},
    ],
)
def test_other_scales(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fq.adamw(1e-3).init(model)
