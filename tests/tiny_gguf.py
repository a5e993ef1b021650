"""A tiny model of the Llama architecture with random weights, in a GGUF file as that of
SmolLM2: blocks of 4-bit codes, norms in float32, a vocabulary with merges."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel


WIDTH, LAYERS, HIDDEN, HEADS, KEY_HEADS = 64, 2, 128, 4, 2


def vocabulary() -> tuple[list[str], list[str]]:
    """A control token, all bytes, and what the merges give."""
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d")]
    tokens = ["<|end|>", *sorted(ByteLevel.alphabet()), *map("".join, pairs)]
    return tokens, [" ".join(pair) for pair in pairs]


def write(path: Path, architecture: str = "llama") -> None:
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)

    def matrix(name: str, out: int, into: int) -> None:
        values = random.normal(size=(out, into)).astype(np.float32) / into**0.5
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    keys = WIDTH * KEY_HEADS // HEADS
    matrix("token_embd", len(tokens), WIDTH)
    for i in range(LAYERS):
        for name, out, into in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", keys, WIDTH),
            ("attn_v", keys, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", HIDDEN, WIDTH),
            ("ffn_up", HIDDEN, WIDTH),
            ("ffn_down", WIDTH, HIDDEN),
        ):
            matrix(f"blk.{i}.{name}", out, into)
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
    norm("output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
