"""Leaves of models that many people train, by their shapes."""

import math


Shapes = dict[str, tuple[int, ...]]


def gpt2() -> Shapes:
    """The leaves of GPT-2 124M, with the head tied to the embedding."""
    width, layers = 768, 12
    shapes: Shapes = {"token": (50257, width), "position": (1024, width)}
    for i in range(layers):
        for name, out, into in (
            ("query_key_value", 3 * width, width),
            ("attention_out", width, width),
            ("mlp_up", 4 * width, width),
            ("mlp_down", width, 4 * width),
        ):
            shapes |= {f"{i}.{name}": (out, into), f"{i}.{name}.bias": (out,)}
        for name in ("attention_norm", "mlp_norm"):
            shapes |= {f"{i}.{name}": (width,), f"{i}.{name}.bias": (width,)}
    return shapes | {"norm": (width,), "norm.bias": (width,)}


def llama(
    layers: int = 16,
    width: int = 2048,
    hidden: int = 8192,
    keys: int = 512,
    vocabulary: int = 128256,
    tied_head: bool = True,
) -> Shapes:
    """The leaves of a Llama with stacked layers; of Llama 3.2 1B by default."""
    shapes = {
        "token": (vocabulary, width),
        "query": (layers, width, width),
        "key": (layers, keys, width),
        "value": (layers, keys, width),
        "out": (layers, width, width),
        "gate": (layers, hidden, width),
        "up": (layers, hidden, width),
        "down": (layers, width, hidden),
        "attention_norm": (layers, width),
        "mlp_norm": (layers, width),
        "norm": (width,),
    }
    return shapes if tied_head else shapes | {"head": (vocabulary, width)}


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
