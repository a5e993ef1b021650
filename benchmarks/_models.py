"""Leaves of models that many people train, by their shapes."""

import math

from flashquinox._memory import architectures


Shapes = dict[str, tuple[int, ...]]


def gpt2() -> Shapes:
    """The leaves of GPT-2 124M, with the head tied to the embedding."""
    shapes = dict(architectures.PRESETS["gpt2-124m"])
    blocks = shapes.pop("blocks")
    layers = range(blocks["mlp_up"][0])
    unrolled = {f"{i}.{k}": shape[1:] for i in layers for k, shape in blocks.items()}
    return shapes | unrolled


def llama(
    layers: int = 16,
    width: int = 2048,
    hidden: int = 8192,
    keys: int = 512,
    vocabulary: int = 128256,
    tied_head: bool = True,
) -> Shapes:
    """The leaves of a Llama with stacked layers; of Llama 3.2 1B by default."""
    # Of heads, the shapes have only how wide all of them are.
    shapes = architectures.llama(
        layers,
        width,
        hidden=hidden,
        heads=width,
        key_heads=keys,
        vocabulary=vocabulary,
        tied_head=tied_head,
    )
    blocks = shapes.pop("blocks")
    return shapes | blocks


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
