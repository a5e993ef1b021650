"""Low-rank adapters (LoRA; Hu et al., 2021, arXiv:2106.09685) on chosen linear layers
of an Equinox model, on weights that may be quantized (QLoRA; Dettmers et al., 2023,
arXiv:2305.14314). Arrays may have leading axes, such as that of stacked layers.

    model = quantize(model, "blocks.*", "nf4")
    model = add_adapters(model, "blocks.*", rank=16, key=key)
    trained, frozen = eqx.partition(model, adapters(model))
    ...
    model = merge(eqx.combine(trained, frozen))
"""

import fnmatch
import zlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import qwix
from jaxtyping import Array, Float, Key, PyTree


class QuantizedLinear(eqx.Module):
    """A linear layer without a bias, whose weight is stored as codes and scales."""

    weight: qwix.QArray

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return qwix.dequantize(self.weight) @ x


class LoRA(eqx.Module):
    r"""$W x + \frac{\alpha}{r} B A x$, with the layer $W$, `down` $A$ and `up` $B$."""

    layer: eqx.nn.Linear | QuantizedLinear
    down: Float[Array, "*layers rank in"]
    up: Float[Array, "*layers out rank"]
    scale: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.layer(x) + self.scale * (self.up @ (self.down @ x))


# How the weight of each kind is quantized: by Qwix, with a scale for each row, or for
# each 64 elements of one.
KINDS: dict[str, dict[str, Any]] = {
    "int8": {"qtype": jnp.int8, "channelwise_axes": (0,)},
    "nf4": {"qtype": "nf4", "channelwise_axes": (0,), "tiled_axes": {1: 64}},
}


def quantize(model: PyTree, pattern: str, kind: str) -> PyTree:
    """The model with each linear layer whose path matches, `blocks.query` for instance,
    as a `QuantizedLinear`, with scales in bfloat16. What it computes is bfloat16."""

    def quantized(layer: Any, path: str) -> QuantizedLinear:
        if layer.weight.shape[-1] % 64 != 0 or layer.bias is not None:
            raise ValueError(
                f"{path}: layers that are quantized have no bias, and multiples of 64 "
                f"inputs; this one has {layer.weight.shape[-1]}"
            )
        one = lambda w: qwix.quantize(w, scale_dtype=jnp.bfloat16, **KINDS[kind])
        # One matrix after the other: for nf4, Qwix has 16 differences of each element.
        weight = layer.weight.reshape(-1, *layer.weight.shape[-2:])
        new = jax.jit(lambda w: jax.lax.map(one, w))(weight)
        shape = lambda x: x.reshape(*layer.weight.shape[:-2], *x.shape[1:])
        return QuantizedLinear(jtu.tree_map(shape, new))

    return _replace(model, pattern, quantized)


def add_adapters(
    model: PyTree, pattern: str, *, rank: int, key: Key[Array, ""], alpha: float = 16.0
) -> PyTree:
    """The model with an adapter around each linear layer whose path matches. It
    computes the same: `up` is 0."""

    def adapted(layer: Any, path: str) -> LoRA:
        *layers, out, into = layer.weight.shape
        # Each layer has a key of its own, whichever others there are.
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        down = jax.random.normal(own, (*layers, rank, into)) / into**0.5
        return LoRA(layer, down, jnp.zeros((*layers, out, rank)), alpha / rank)

    return _replace(model, pattern, adapted)


def adapters(model: PyTree) -> PyTree[bool]:
    """What of a model is trained: True for the two matrices of each adapter."""

    def of(x: Any) -> Any:
        frozen = jtu.tree_map(lambda _: False, x)
        if not isinstance(x, LoRA):
            return frozen
        return eqx.tree_at(lambda x: (x.down, x.up), frozen, (True, True))

    return jtu.tree_map(of, model, is_leaf=lambda x: isinstance(x, LoRA))


def merge(model: PyTree) -> PyTree:
    """The model with each adapter's product in the weight of its layer, which is
    float32 then, and not quantized."""

    def merged(x: Any) -> Any:
        if not isinstance(x, LoRA):
            return x
        weight = x.layer.weight
        if isinstance(weight, qwix.QArray):
            weight = qwix.dequantize(weight.astype(jnp.float32))
        product = x.up.astype(jnp.float32) @ x.down.astype(jnp.float32)
        weight = weight.astype(jnp.float32) + x.scale * product
        if isinstance(x.layer, eqx.nn.Linear):
            return eqx.tree_at(lambda layer: layer.weight, x.layer, weight)
        out, into = weight.shape[-2:]
        make = lambda: eqx.nn.Linear(into, out, use_bias=False, key=jax.random.key(0))
        return eqx.tree_at(lambda x: x.weight, eqx.filter_eval_shape(make), weight)

    return jtu.tree_map(merged, model, is_leaf=lambda x: isinstance(x, LoRA))


def _replace(model: PyTree, pattern: str, new: Callable[[Any, str], Any]) -> PyTree:
    is_layer = lambda x: isinstance(x, eqx.nn.Linear | QuantizedLinear)
    found = []

    def one(path: tuple[Any, ...], x: Any) -> Any:
        name = jtu.keystr(path, simple=True, separator=".")
        if not is_layer(x) or not fnmatch.fnmatchcase(name, pattern):
            return x
        found.append(name)
        return new(x, name)

    model = jtu.tree_map_with_path(one, model, is_leaf=is_layer)
    if not found:
        raise ValueError(f"no linear layer of the model matches {pattern!r}")
    return model
