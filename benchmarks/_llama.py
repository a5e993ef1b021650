"""A Llama with stacked layers, shared by the benchmarks."""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

import flashquinox as fq


@dataclasses.dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    hidden: int
    heads: int
    key_heads: int
    vocabulary: int


SIZES = {
    # Llama 3.2 1B has as many parameters, but a quarter of them in its embedding.
    "1.2B": Sizes(24, 2048, 5632, 32, 4, 32000),
    "8B": Sizes(32, 4096, 14336, 32, 8, 128256),
}


# 2048 times 128,256 logits in float32 are a gigabyte.
_TOKENS_OF_LOGITS = 2048


class Block(eqx.Module):
    attention_norm: Float[Array, " width"]
    query: Float[Array, "width width"]
    key: Float[Array, "keys width"]
    value: Float[Array, "keys width"]
    out: Float[Array, "width width"]
    mlp_norm: Float[Array, " width"]
    gate: Float[Array, "hidden width"]
    up: Float[Array, "hidden width"]
    down: Float[Array, "width hidden"]
    heads: int = eqx.field(static=True)

    def __init__(self, sizes: Sizes, key: Key[Array, ""], dtype: Any):
        width, hidden = sizes.width, sizes.hidden
        keys = width // sizes.heads * sizes.key_heads
        draw = _Draw(key, dtype)
        self.attention_norm = jnp.ones(width, dtype)
        self.query, self.out = draw(width, width), draw(width, width)
        self.key, self.value = draw(keys, width), draw(keys, width)
        self.mlp_norm = jnp.ones(width, dtype)
        self.gate, self.up = draw(hidden, width), draw(hidden, width)
        self.down = draw(width, hidden)
        self.heads = sizes.heads

    def __call__(
        self, x: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time width"]:
        y = _normalized(x, self.attention_norm)
        size = x.shape[-1] // self.heads
        split = lambda y: y.reshape(*y.shape[:-1], -1, size)
        mixed = jax.nn.dot_product_attention(
            _rotated(split(y @ self.query.T)),
            _rotated(split(y @ self.key.T)),
            split(y @ self.value.T),
            is_causal=True,
            implementation=_attention(),
        )
        x = x + mixed.reshape(x.shape) @ self.out.T
        y = _normalized(x, self.mlp_norm)
        return x + (jax.nn.silu(y @ self.gate.T) * (y @ self.up.T)) @ self.down.T


class Llama(eqx.Module):
    embedding: Float[Array, "vocabulary width"]
    blocks: Block
    norm: Float[Array, " width"]
    head: Float[Array, "vocabulary width"]

    def __init__(self, sizes: Sizes, key: Key[Array, ""], dtype: Any):
        keys = jax.random.split(key, 3)
        self.embedding = _Draw(keys[0], dtype)(sizes.vocabulary, sizes.width)
        self.head = _Draw(keys[1], dtype)(sizes.vocabulary, sizes.width)
        self.norm = jnp.ones(sizes.width, dtype)
        make = lambda key: Block(sizes, key, dtype)
        # One layer at a time.
        self.blocks = jax.lax.map(make, jax.random.split(keys[2], sizes.layers))


class _Draw:
    """Random weights, of inputs along the last axis."""

    def __init__(self, key: Key[Array, ""], dtype: Any):
        self._key, self._dtype = key, dtype

    def __call__(self, *shape: int) -> Array:
        self._key, key = jax.random.split(self._key)
        drawn = jax.random.normal(key, shape, self._dtype)
        return drawn * jnp.asarray(shape[-1] ** -0.5, self._dtype)


def _attention() -> Literal["cudnn"] | None:
    """On a GPU the fused attention that people train with: XLA's own keeps the scores
    of all pairs of tokens."""
    return "cudnn" if jax.default_backend() == "gpu" else None


def _normalized(
    x: Float[Array, "batch time width"], scale: Float[Array, " width"]
) -> Float[Array, "batch time width"]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale


def _rotated(
    x: Float[Array, "batch time heads size"],
) -> Float[Array, "batch time heads size"]:
    time, size = x.shape[1], x.shape[-1]
    frequency = 500000.0 ** (-jnp.arange(0, size, 2) / size)
    angle = (jnp.arange(time)[:, None] * frequency)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1).astype(x.dtype)


def _epilogue(
    model: Llama,
    x: Float[Array, "batch time width"],
    batch: Int[Array, "batch time_plus_1"],
    key: None,
) -> Float[Array, ""]:
    """The logits of all tokens would take more memory than the layers: one chunk of
    tokens has them at a time, in the backward pass too."""
    tokens = batch[:, 1:]
    chunks, rest = divmod(tokens.size, _TOKENS_OF_LOGITS)
    if rest:
        chunks = 1

    @jax.checkpoint
    def of_chunk(
        chunk: tuple[Float[Array, "tokens width"], Int[Array, " tokens"]],
    ) -> Float[Array, ""]:
        x, tokens = chunk
        logits = _normalized(x, model.norm) @ model.head.T
        log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(log_probabilities, tokens[:, None], -1))

    split = (x.reshape(chunks, -1, x.shape[-1]), tokens.reshape(chunks, -1))
    return jnp.mean(jax.lax.map(of_chunk, split))


# The mean cross-entropy of the next token, in nats.
loss = fq.LayeredLoss(
    blocks=lambda model: model.blocks,
    prologue=lambda model, batch, key: model.embedding[batch[:, :-1]],
    block=lambda block, x, batch, key: block(x),
    epilogue=_epilogue,
)
