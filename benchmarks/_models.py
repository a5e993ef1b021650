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


def resnet50() -> Shapes:
    """The leaves of ResNet-50, convolutions as (out, in, height, width)."""
    shapes: Shapes = {}

    def convolution(name: str, out: int, into: int, size: int) -> None:
        shapes[name] = (out, into, size, size)
        shapes[f"{name}.norm.weight"] = shapes[f"{name}.norm.bias"] = (out,)

    convolution("stem", 64, 3, 7)
    into = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            name = f"{stage}.{block}"
            convolution(f"{name}.1", width, into, 1)
            convolution(f"{name}.2", width, width, 3)
            convolution(f"{name}.3", 4 * width, width, 1)
            if block == 0:
                convolution(f"{name}.shortcut", 4 * width, into, 1)
            into = 4 * width
    return shapes | {"head.weight": (1000, into), "head.bias": (1000,)}


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
