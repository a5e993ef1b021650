"""Which weights decay, in the layers and by the names of each framework."""

import functools as ft
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtyping import Array

import flashquinox as fq

from ..helpers import have_what_haliax_needs


def _decayed(params, mask=None, without=()) -> set[str]:
    """The dotted paths of what decays, without the parts of them in `without`."""
    mask = fq.decay_mask() if mask is None else mask
    values = mask(eqx.filter(params, eqx.is_inexact_array))
    dotted = ft.partial(jtu.keystr, simple=True, separator=".")
    paths = {dotted(path) for path, x in jtu.tree_leaves_with_path(values) if x is True}
    return {
        ".".join(x for x in path.split(".") if x not in without and not x.isdigit())
        for path in paths
    }


#
# Equinox
#

_key = jr.key(0)
_LAYERS = {
    "linear": (lambda key: eqx.nn.Linear(3, 4, key=key), {"weight"}),
    "of a scalar": (lambda key: eqx.nn.Linear("scalar", 4, key=key), {"weight"}),
    "conv": (lambda key: eqx.nn.Conv2d(2, 3, 3, key=key), {"weight"}),
    "transpose": (lambda key: eqx.nn.ConvTranspose1d(2, 3, 3, key=key), {"weight"}),
    "embedding": (lambda key: eqx.nn.Embedding(5, 4, key=key), {"weight"}),
    "layer norm": (lambda _: eqx.nn.LayerNorm((2, 4)), set()),
    "rms norm": (lambda _: eqx.nn.RMSNorm(4), set()),
    "group norm": (lambda _: eqx.nn.GroupNorm(2, 4), set()),
    "batch norm": (
        lambda _: eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="ema")[0],
        set(),
    ),
    "gru": (lambda key: eqx.nn.GRUCell(3, 4, key=key), {"weight_ih", "weight_hh"}),
    "lstm": (lambda key: eqx.nn.LSTMCell(3, 4, key=key), {"weight_ih", "weight_hh"}),
    "prelu": (lambda _: eqx.nn.PReLU(), set()),
    "attention": (
        lambda key: eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=key),
        {f"{name}_proj.weight" for name in ("query", "key", "value", "output")},
    ),
    "weight norm": (
        lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=key)),
        {"layer.weight"},
    ),
    "spectral norm": (
        lambda key: eqx.nn.make_with_state(eqx.nn.SpectralNorm)(
            eqx.nn.Linear(3, 4, key=key), "weight", key=key
        )[0],
        {"layer.weight"},
    ),
    "rotary": (lambda _: eqx.nn.RotaryPositionalEmbedding(4), set()),
    "mlp": (lambda key: eqx.nn.MLP(2, 2, 4, 2, key=key), {"layers.weight"}),
}


def _ones(make, *arguments):
    """What it makes, without its numbers: their shapes decide."""
    shapes = eqx.filter_eval_shape(make, *arguments)
    return jtu.tree_map(
        lambda x: (
            np.ones(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
        ),
        shapes,
    )


@pytest.mark.parametrize("name", _LAYERS)
def test_layers_of_equinox(name):
    make, expected = _LAYERS[name]
    assert _decayed(_ones(make, _key)) == expected


@pytest.mark.parametrize(
    "name", ["linear", "conv", "layer norm", "rms norm", "gru", "attention"]
)
def test_stacked_layers(name):
    """Also twice."""
    make, expected = _LAYERS[name]
    keys = jr.split(_key, (2, 3))
    assert _decayed(_ones(eqx.filter_vmap(eqx.filter_vmap(make)), keys)) == expected


def test_layers_in_a_model_that_is_cast():
    make = lambda key: [_LAYERS[name][0](key) for name in ("linear", "layer norm")]
    model = fq.cast(make(_key), jnp.bfloat16, keep=eqx.nn.LayerNorm)
    assert _decayed(model) == {"weight"}
    # As float32 layers are wrapped, but known by their own types.
    kept = fq.cast(make(_key), jnp.bfloat16, keep=[eqx.nn.Linear, eqx.nn.LayerNorm])
    assert _decayed(kept) == {"layer.weight"}


class _Scale(eqx.Module):
    weight: Array

    def __call__(self, x):
        return self.weight * x


class _Norm2d(_Scale):
    pass


class _Custom(eqx.Module):
    tokens: Array
    w1: Array
    b1: Array
    vector: Array
    layer_scale: Array
    norm: _Scale
    scale: _Norm2d
    norm_proj: eqx.nn.Linear


def _custom():
    matrix, vector = jnp.ones((4, 4)), jnp.ones(4)
    return _Custom(
        tokens=jnp.ones((1, 1, 4)),
        w1=matrix,
        b1=vector,
        vector=vector,
        layer_scale=vector,
        norm=_Scale(vector),
        scale=_Norm2d(vector),
        norm_proj=eqx.nn.Linear(4, 4, key=_key),
    )


def test_arrays_of_modules_of_the_user():
    matrices = {"tokens", "w1", "norm_proj.weight"}
    assert _decayed(_custom()) == matrices
    # Stacked, nothing tells a vector without a telling name from a matrix.
    stacked = eqx.filter_vmap(lambda _: _custom())(jnp.arange(3))
    assert _decayed(stacked) == {*matrices, "vector"}
    assert _decayed(stacked, fq.decay_mask(exclude="vector")) == matrices
    wrapped = fq.cast(_custom(), jnp.bfloat16, keep="norm")
    assert isinstance(wrapped.norm, fq.Float32Layer) and _decayed(wrapped) == matrices


def test_dictionaries():
    vector, matrix = jnp.ones((3, 4)), jnp.ones((3, 4, 4))
    params = {
        "ln_1": {"weight": vector, "w": vector},
        "final_norm": vector,
        "input_layernorm": {"weight": vector},
        "mlp": {"w": matrix, "b": vector, "lora_b": matrix, "bias_in": vector},
        "h.0.ln_2.weight": vector,
        "h.0.attn.c_attn.weight": matrix,
        "lora": {"A": matrix, "B": matrix},
        "step": jnp.asarray(3),
        "flag": True,
    }
    assert fq.decay_mask()(params) == {
        "ln_1": {"weight": False, "w": False},
        "final_norm": False,
        "input_layernorm": {"weight": False},
        "mlp": {"w": True, "b": False, "lora_b": True, "bias_in": False},
        "h.0.ln_2.weight": False,
        "h.0.attn.c_attn.weight": True,
        "lora": {"A": True, "B": True},
        "step": False,
        "flag": False,
    }


#
# Other frameworks
#


class _LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.LayerNorm(name="pre")(x)
        x = nn.MultiHeadDotProductAttention(2)(x)
        x = nn.RMSNorm()(nn.PReLU()(x))
        return nn.Dense(4, kernel_init=nn.with_partitioning(nn.zeros, (None, "x")))(
            x
        ), None


class _LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4)(tokens)
        stack = nn.scan(
            _LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: None},
        )
        x, _ = stack(name="blocks")(x, None)
        x = nn.GroupNorm(2)(nn.Conv(4, (3,))(x))
        carry = jnp.zeros(4), jnp.zeros(4)
        return nn.LSTMCell(4)(carry, x[0])


@pytest.mark.parametrize("boxed", [True, False])
def test_flax_linen(boxed):
    variables = jax.eval_shape(_LinenModel().init, _key, jnp.zeros(3, jnp.int32))
    params = variables["params"] if boxed else nn.unbox(variables["params"])
    params = jtu.tree_map(lambda x: np.zeros(x.shape, x.dtype), params)
    attention = "blocks.MultiHeadDotProductAttention_0"
    cell = {f"{side}{gate}" for side in "ih" for gate in "ifgo"}
    assert _decayed(params, without=("value",)) == {
        "Embed_0.embedding",
        "Conv_0.kernel",
        "blocks.Dense_0.kernel",
        *(f"{attention}.{name}.kernel" for name in ("query", "key", "value", "out")),
        *(f"LSTMCell_0.{name}.kernel" for name in cell),
    } - ({f"{attention}.value.kernel"}) | {f"{attention}.kernel"}


class _NnxModel(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)
        self.norms = nnx.List(
            [nnx.LayerNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)]
        )
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)


@pytest.mark.parametrize("what", ["module", "state", "pure"])
def test_flax_nnx(what):
    model = _NnxModel(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    if what == "module":
        params = model
    elif what == "pure":
        params = nnx.to_pure_dict(params)
    expected = {"blocks.kernel", "embed.embedding", "conv.kernel"}
    assert _decayed(params, without=("value",)) == expected


def test_haliax(monkeypatch):
    have_what_haliax_needs(monkeypatch)
    hax = pytest.importorskip("haliax", exc_type=ImportError)
    width, hidden, layers = hax.Axis("width", 4), hax.Axis("hidden", 8), 3

    class Block(eqx.Module):
        ln: Any
        up: Any

        @staticmethod
        def init(key):
            up = hax.nn.Linear.init(width, hidden, key=key)
            return Block(hax.nn.LayerNorm.init(width), up)

    stack = hax.nn.Stacked.init(hax.Axis("layers", layers), Block)
    make = lambda key: {
        "embed": hax.nn.Embedding.init(hax.Axis("vocabulary", 5), width, key=key),
        "blocks": stack(jr.split(key, layers)),
        "to one": hax.nn.Linear.init(width, (), key=key),
    }
    model = _ones(make, _key)
    without = ("<flat index 0>",)
    matrices = {"embed.weight", "blocks.stacked.up.weight", "to one.weight"}
    assert _decayed(model, without=without) == matrices
    # With the names of axes, it is a mask of the model.
    model = jtu.tree_map(
        jnp.asarray, {name: model[name] for name in ("embed", "blocks")}
    )
    optim = fq.adamw(
        1e-2,
        weight_decay=1.0,
        mask=fq.decay_mask(),
        storage=fq.Storage(moments="float32"),
    )
    grads = jtu.tree_map(jnp.zeros_like, model)
    new, _ = jax.jit(optim.step)(model, optim.init(model), grads)
    assert np.all(new["embed"].weight.array == np.float32(0.99))
    assert np.all(new["blocks"].stacked.ln.weight.array == 1)


#
# As a mask
#


def test_selectors():
    model = [_custom(), eqx.nn.Embedding(5, 4, key=_key)]
    matrices = {"tokens", "w1", "norm_proj.weight", "weight"}
    assert _decayed(model) == matrices
    excluded = fq.decay_mask(exclude=[eqx.nn.Embedding, "*.tokens"])
    assert _decayed(model, excluded) == {"w1", "norm_proj.weight"}
    included = fq.decay_mask(include=["*.norm", _Norm2d], exclude=lambda x: x.ndim > 1)
    assert _decayed(model, included) == {"norm.weight", "scale.weight"}
    # What is excluded is not included in its parts.
    both = fq.decay_mask(include="*.norm.weight", exclude="*.norm")
    assert _decayed(model, both) == matrices


def test_wrong_selectors():
    model = eqx.nn.MLP(2, 2, 4, 1, key=_key)
    with pytest.raises(ValueError, match=r"`decay_mask\(exclude=...\)`.*'norm'"):
        fq.decay_mask(exclude="norm")(model)
    with pytest.raises(ValueError, match=r"`decay_mask\(include=...\)`.*LayerNorm"):
        fq.decay_mask(include=eqx.nn.LayerNorm)(model)
    with pytest.raises(TypeError, match=r"`decay_mask\(exclude=...\)`.*its name"):
        fq.decay_mask(exclude=model.layers[0])


@pytest.mark.usefixtures("without_typechecker")
def test_what_is_no_selector():
    with pytest.raises(TypeError, match=r"`decay_mask\(include=...\)` takes"):
        fq.decay_mask(include=3)  # pyright: ignore


def test_masks_are_values():
    """So programs that optimizers are passed to are not compiled again."""
    make = lambda: fq.decay_mask(exclude=["*.bias", eqx.nn.Embedding])
    assert make() == make() and hash(make()) == hash(make())
    assert make() != fq.decay_mask()
    assert repr(fq.decay_mask()) == "decay_mask()"
    assert "exclude=['*.bias'" in repr(make())


@pytest.mark.parametrize("wrap", ["step", "optax", "partition", "inject"])
def test_optimizers_take_masks(wrap):
    make = lambda key: [eqx.nn.LayerNorm(4), eqx.nn.Linear(4, 4, key=key)]
    model = _ones(eqx.filter_vmap(make), jr.split(_key, 3))
    params = eqx.filter(jtu.tree_map(jnp.asarray, model), eqx.is_inexact_array)
    grads = jtu.tree_map(jnp.zeros_like, params)
    options = {"weight_decay": 1.0, "mask": fq.decay_mask()}
    decay = optax.add_decayed_weights(**options)
    optim = optax.chain(decay, optax.sgd(1e-2))
    if wrap != "optax":
        optim = fq.adamw(1e-2, storage=fq.Storage(moments="float32"), **options)
    if wrap == "partition":
        labels = jtu.tree_map(lambda x: "a", params)
        optim = optax.partition({"a": optim, "b": optim}, lambda _: labels)
    if wrap == "inject":
        # Which takes functions for schedules: `_Signature` hides this one.
        optim = optax.inject_hyperparams(fq.adamw)(
            1e-2, storage=fq.Storage(moments="float32"), **options
        )
        assert set(optim.init(params).hyperparams) == {"learning_rate", "weight_decay"}
    if wrap == "step":
        new, _ = jax.jit(optim.step)(params, optim.init(params), grads)
    else:
        updates, _ = jax.jit(optim.update)(grads, optim.init(params), params)
        new = eqx.apply_updates(params, updates)
    same = jtu.tree_map(lambda x, y: bool(jnp.all(x == y)), new, params)
    assert same[0].weight and same[0].bias and same[1].bias and not same[1].weight
