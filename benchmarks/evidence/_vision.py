"""Classifiers of images of 28 × 28: a residual network, a vision transformer, and the
small network of `examples/mnist.py`.

Convolutions are products of patches and a matrix: under `vmap` over seeds these are
batched products, where convolutions would be grouped ones, which are slow.
"""

import _benchmarks  # noqa: F401
import equinox as eqx
import jax
import jax.numpy as jnp
from _gpt import Block
from jaxtyping import Array, Float, Key


class _Convolution(eqx.Module):
    """With a border of zeros, or 1 × 1."""

    weight: Float[Array, "out patch"]
    size: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        into: int,
        out: int,
        size: int = 3,
        stride: int = 1,
        *,
        key: Key[Array, ""],
    ):
        patch = size * size * into
        self.weight = jax.random.normal(key, (out, patch)) * (2 / patch) ** 0.5
        self.size, self.stride = size, stride

    def __call__(
        self, x: Float[Array, "batch h w into"]
    ) -> Float[Array, "batch h2 w2 out"]:
        _, height, width, _ = x.shape
        if self.size > 1:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        parts = [
            x[:, i : i + height : self.stride, j : j + width : self.stride]
            for i in range(self.size)
            for j in range(self.size)
        ]
        return jnp.concatenate(parts, axis=-1) @ self.weight.T


class _GroupNorm(eqx.Module):
    """Over 8 groups of channels; it has no running averages, which would be a state
    beside the optimizer's."""

    scale: Float[Array, " channels"]
    shift: Float[Array, " channels"]

    def __init__(self, channels: int):
        self.scale, self.shift = jnp.ones(channels), jnp.zeros(channels)

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        groups = x.astype(jnp.float32).reshape(x.shape[0], -1, 8, x.shape[-1] // 8)
        mean = jnp.mean(groups, axis=(1, 3), keepdims=True)
        variance = jnp.var(groups, axis=(1, 3), keepdims=True)
        normal = ((groups - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
        return (normal * self.scale + self.shift).astype(x.dtype)


class _Residual(eqx.Module):
    first: _Convolution
    first_norm: _GroupNorm
    second: _Convolution
    second_norm: _GroupNorm
    shortcut: _Convolution | None

    def __init__(self, into: int, out: int, stride: int, *, key: Key[Array, ""]):
        keys = jax.random.split(key, 3)
        self.first = _Convolution(into, out, stride=stride, key=keys[0])
        self.second = _Convolution(out, out, key=keys[1])
        self.first_norm, self.second_norm = _GroupNorm(out), _GroupNorm(out)
        self.shortcut = None
        if into != out:
            self.shortcut = _Convolution(into, out, 1, stride, key=keys[2])

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        hidden = jax.nn.relu(self.first_norm(self.first(x)))
        hidden = self.second_norm(self.second(hidden))
        return jax.nn.relu(hidden + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(eqx.Module):
    """ResNet-18 for small images: a stem of 3 × 3, four stages of two blocks each."""

    stem: _Convolution
    stem_norm: _GroupNorm
    blocks: list[_Residual]
    head: eqx.nn.Linear

    def __init__(self, width: int = 32, per_stage: int = 2, *, key: Key[Array, ""]):
        keys = iter(jax.random.split(key, 4 * per_stage + 2))
        self.stem = _Convolution(1, width, key=next(keys))
        self.stem_norm = _GroupNorm(width)
        self.blocks = []
        into = width
        for stage in range(4):
            for block in range(per_stage):
                out, stride = width * 2**stage, 1 + (stage > 0 and block == 0)
                self.blocks.append(_Residual(into, out, stride, key=next(keys)))
                into = out
        self.head = eqx.nn.Linear(into, 10, key=next(keys))

    def __call__(self, images: Float[Array, "batch 28 28"]) -> Float[Array, "batch 10"]:
        x = jax.nn.relu(self.stem_norm(self.stem(images[..., None])))
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jnp.mean(x, axis=(1, 2)))


class CNN(eqx.Module):
    """Two convolutions of 4 × 4 with a stride of 2, and two linear layers."""

    first: _Convolution
    first_bias: Float[Array, " c"]
    second: _Convolution
    second_bias: Float[Array, " c"]
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, width: int = 16, *, key: Key[Array, ""]):
        keys = jax.random.split(key, 4)
        self.first = _Convolution(1, width, 4, 2, key=keys[0])
        self.second = _Convolution(width, 2 * width, 4, 2, key=keys[1])
        self.first_bias, self.second_bias = jnp.zeros(width), jnp.zeros(2 * width)
        self.hidden = eqx.nn.Linear(49 * 2 * width, 16 * width, key=keys[2])
        self.head = eqx.nn.Linear(16 * width, 10, key=keys[3])

    def __call__(self, images: Float[Array, "batch 28 28"]) -> Float[Array, "batch 10"]:
        x = jax.nn.relu(self.first(images[..., None]) + self.first_bias)
        x = jax.nn.relu(self.second(x) + self.second_bias)
        x = jax.nn.relu(jax.vmap(self.hidden)(x.reshape(len(x), -1)))
        return jax.vmap(self.head)(x)


class ViT(eqx.Module):
    """A vision transformer with patches of 4 × 4 and the mean of all at the end. Its
    layers are stacked."""

    embed: eqx.nn.Linear
    position: Float[Array, "time width"]
    blocks: Block
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(
        self, width: int = 192, layers: int = 6, heads: int = 3, *, key: Key[Array, ""]
    ):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Linear(16, width, key=keys[0])
        self.position = 0.02 * jax.random.normal(keys[1], (49, width))
        make = lambda key: Block(width, heads, is_causal=False, key=key)
        self.blocks = eqx.filter_vmap(make)(jax.random.split(keys[2], layers))
        self.norm = eqx.nn.LayerNorm(width)
        self.head = eqx.nn.Linear(width, 10, key=keys[3])

    def __call__(self, images: Float[Array, "batch 28 28"]) -> Float[Array, "batch 10"]:
        patches = images.reshape(-1, 7, 4, 7, 4).swapaxes(2, 3).reshape(-1, 49, 16)
        layers, static = eqx.partition(self.blocks, eqx.is_array)

        def one(patches: Float[Array, "time 16"]) -> Float[Array, " 10"]:
            x = jax.vmap(self.embed)(patches) + self.position
            step = lambda x, layer: (eqx.combine(layer, static)(x), None)
            x, _ = jax.lax.scan(step, x, layers)
            return self.head(jnp.mean(jax.vmap(self.norm)(x), axis=0))

        return jax.vmap(one)(patches)
