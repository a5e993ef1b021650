"""Leaves of models that people train, by their published shapes, each in the order in
which its framework keeps them.

"Equinox" is the order of fields: matrices are (out, in), convolutions (out, in, height,
width) with biases (out, 1, 1). "Flax" is the order of sorted names, as in dictionaries:
matrices are (in, out), convolutions (height, width, in, out).
"""

import dataclasses
import itertools
from collections.abc import Callable

from _models import count, gpt2, llama, resnet50, Shapes


@dataclasses.dataclass(frozen=True)
class Model:
    title: str
    # Who published the shapes.
    source: str
    shapes: Callable[[], Shapes]
    # Millions of parameters, to as many digits as were published. `None` for leaves
    # that are no model.
    published: str | None

    def leaves(self) -> Shapes:
        shapes = self.shapes()
        if self.published is not None:
            digits = len(self.published.partition(".")[2])
            found = f"{count(shapes) / 1e6:.{digits}f}"
            if found != self.published:
                raise ValueError(
                    f"{self.title} has {self.published} million parameters by "
                    f"{self.source}, but {found} by the shapes here."
                )
        return shapes


#
# What models are made of
#


def _inside(name: str, shapes: Shapes) -> Shapes:
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def _linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name: str, out: int, into: int, size: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out, into, size, size)}
    return weight | ({f"{name}.bias": (out, 1, 1)} if bias else {})


def _attention(name: str, width: int, key_bias: bool = True) -> Shapes:
    shapes = _linear("key", width, width, bias=key_bias)
    for part in ("value", "query", "out"):
        shapes |= _linear(part, width, width)
    return _inside(name, shapes)


def _mlp(width: int) -> Shapes:
    return _linear("mlp_up", 4 * width, width) | _linear("mlp_down", width, 4 * width)


def _dense(name: str, into: tuple[int, ...], out: tuple[int, ...]) -> Shapes:
    """Of Flax, where several axes may be inputs or outputs."""
    return {f"{name}.bias": out, f"{name}.kernel": (*into, *out)}


def _as_flax(shapes: Shapes) -> Shapes:
    return dict(sorted(shapes.items(), key=lambda item: item[0].split(".")))


#
# Images
#


def resnet50_flax() -> Shapes:
    """Of Flax's example of ImageNet."""
    shapes: Shapes = {}

    def conv(block: str, number: str, out: int, into: int, size: int) -> None:
        conv, norm = (
            (f"Conv_{number}", f"BatchNorm_{number}")
            if number.isdecimal()
            else (f"conv_{number}", f"norm_{number}")
        )
        kernel = {f"{conv}.kernel": (size, size, into, out)}
        norms = {f"{norm}.bias": (out,), f"{norm}.scale": (out,)}
        shapes.update(_inside(block, kernel | norms))

    shapes["conv_init.kernel"] = (7, 7, 3, 64)
    shapes["bn_init.bias"] = shapes["bn_init.scale"] = (64,)
    into, number = 64, 0
    for blocks, width in [(3, 64), (4, 128), (6, 256), (3, 512)]:
        for block in range(blocks):
            name = f"BottleneckResNetBlock_{number}"
            conv(name, "0", width, into, 1)
            conv(name, "1", width, width, 3)
            conv(name, "2", 4 * width, width, 1)
            if block == 0:
                conv(name, "proj", 4 * width, into, 1)
            into, number = 4 * width, number + 1
    return _as_flax(shapes | _dense("Dense_0", (into,), (1000,)))


def convnext_tiny() -> Shapes:
    widths = (96, 192, 384, 768)
    shapes = _conv("down.0.conv", 96, 3, 4) | _norm("down.0.norm", 96)
    for i, (into, out) in enumerate(itertools.pairwise(widths)):
        shapes |= _norm(f"down.{i + 1}.norm", into)
        shapes |= _conv(f"down.{i + 1}.conv", out, into, 2)
    for i, (blocks, width) in enumerate(zip((3, 3, 9, 3), widths, strict=True)):
        block = {"gamma": (width,)} | _conv("depthwise", width, 1, 7)
        block |= _norm("norm", width) | _mlp(width)
        for j in range(blocks):
            shapes |= _inside(f"stages.{i}.{j}", block)
    return shapes | _norm("norm", 768) | _linear("head", 1000, 768)


def efficientnet_b0() -> Shapes:
    def conv(name: str, out: int, into: int, size: int) -> Shapes:
        return _conv(name, out, into, size, bias=False) | _norm(f"{name}.norm", out)

    shapes = conv("stem", 32, 3, 3)
    into = 32
    for i, (expansion, out, blocks, size) in enumerate(
        [
            (1, 16, 1, 3),
            (6, 24, 2, 3),
            (6, 40, 2, 5),
            (6, 80, 3, 3),
            (6, 112, 3, 5),
            (6, 192, 4, 5),
            (6, 320, 1, 3),
        ]
    ):
        for j in range(blocks):
            wide = expansion * into
            block = conv("expand", wide, into, 1) if expansion > 1 else {}
            block |= conv("depthwise", wide, 1, size)
            block |= _conv("squeeze", into // 4, wide, 1)
            block |= _conv("excite", wide, into // 4, 1)
            block |= conv("project", out, wide, 1)
            shapes |= _inside(f"{i}.{j}", block)
            into = out
    return shapes | conv("top", 1280, into, 1) | _linear("head", 1000, 1280)


def ddpm() -> Shapes:
    """The UNet of DDPM for images of 256 × 256, with attention at 16 × 16."""
    widths, time = (128, 128, 256, 256, 512, 512), 512

    def residual(out: int, into: int) -> Shapes:
        shapes = _norm("norm1", into) | _conv("conv1", out, into, 3)
        shapes |= _linear("time", out, time) | _norm("norm2", out)
        shapes |= _conv("conv2", out, out, 3)
        return shapes | (_conv("shortcut", out, into, 1) if out != into else {})

    attention = _norm("norm", 512) | _attention("attention", 512)
    shapes = _conv("conv_in", 128, 3, 3)
    shapes |= _linear("time1", time, 128) | _linear("time2", time, time)
    skips, into = [128], 128
    for i, out in enumerate(widths):
        for j in range(2):
            shapes |= _inside(f"down.{i}.residual.{j}", residual(out, into))
            if i == 4:
                shapes |= _inside(f"down.{i}.attention.{j}", attention)
            skips, into = [*skips, out], out
        if i < 5:
            shapes |= _conv(f"down.{i}.conv", out, out, 3)
            skips.append(out)
    shapes |= _inside("middle.residual.0", residual(512, 512))
    shapes |= _inside("middle.attention", attention)
    shapes |= _inside("middle.residual.1", residual(512, 512))
    for i, out in enumerate(reversed(widths)):
        for j in range(3):
            block = residual(out, into + skips.pop())
            shapes |= _inside(f"up.{i}.residual.{j}", block)
            if i == 1:
                shapes |= _inside(f"up.{i}.attention.{j}", attention)
            into = out
        if i < 5:
            shapes |= _conv(f"up.{i}.conv", out, out, 3)
    return shapes | _norm("norm_out", 128) | _conv("conv_out", 3, 128, 3)


def vit_b16() -> Shapes:
    """Of Flax, with axes of heads."""
    width, heads = (768,), (12, 64)
    norm = lambda name: {f"{name}.bias": width, f"{name}.scale": width}
    block = norm("LayerNorm_0") | norm("LayerNorm_2")
    block |= _dense("MlpBlock_3.Dense_0", width, (3072,))
    block |= _dense("MlpBlock_3.Dense_1", (3072,), width)
    attention = _dense("out", heads, width)
    for name in ("key", "query", "value"):
        attention |= _dense(name, width, heads)
    block |= _inside("MultiHeadDotProductAttention_1", attention)
    encoder = norm("encoder_norm") | {"posembed_input.pos_embedding": (1, 197, 768)}
    for i in range(12):
        encoder |= _inside(f"encoderblock_{i}", block)
    shapes = {"cls": (1, 1, 768)} | _inside("Transformer", encoder)
    shapes |= _dense("embedding", (16, 16, 3), width) | _dense("head", width, (1000,))
    return _as_flax(shapes)


#
# Text and sound
#


def clip_text() -> Shapes:
    """The text's half of CLIP with ViT-L/14, as in Stable Diffusion."""
    block = _attention("attention", 768) | _norm("norm1", 768)
    block |= _mlp(768) | _norm("norm2", 768)
    shapes: Shapes = {"token": (49408, 768), "position": (77, 768)}
    for i in range(12):
        shapes |= _inside(f"blocks.{i}", block)
    return shapes | _norm("norm", 768)


def whisper_small() -> Shapes:
    attention = _attention("attention", 768, key_bias=False) | _norm("norm1", 768)
    mlp = _mlp(768) | _norm("norm3", 768)
    across = _attention("across", 768, key_bias=False) | _norm("norm2", 768)
    encoder: Shapes = {}
    for i, into in enumerate((80, 768)):
        encoder |= {f"conv{i}.weight": (768, into, 3), f"conv{i}.bias": (768, 1)}
    encoder["position"] = (1500, 768)
    decoder: Shapes = {"token": (51865, 768), "position": (448, 768)}
    for i in range(12):
        encoder |= _inside(f"blocks.{i}", attention | mlp)
        decoder |= _inside(f"blocks.{i}", attention | across | mlp)
    return _inside("encoder", encoder | _norm("norm", 768)) | _inside(
        "decoder", decoder | _norm("norm", 768)
    )


def llama_unrolled() -> Shapes:
    """Llama 3.2 1B with leaves of its own for each layer."""
    stacked = llama()
    token, norm = stacked.pop("token"), stacked.pop("norm")
    layers = range(next(iter(stacked.values()))[0])
    unrolled = {f"blocks.{i}.{k}": x[1:] for i in layers for k, x in stacked.items()}
    return {"token": token} | unrolled | {"norm": norm}


def qwen() -> Shapes:
    """Qwen 2.5 0.5B as of Flax: (embed, heads, head_dim), with 14 heads that share 2
    keys and values."""
    width, hidden = (896,), (4864,)
    attention: Shapes = {"out.kernel": (14, 64, 896)}
    for name, heads in (("query", 14), ("key", 2), ("value", 2)):
        attention |= _dense(name, width, (heads, 64))
    block = _inside("attention", attention)
    block |= {"mlp.gate.kernel": width + hidden, "mlp.up.kernel": width + hidden}
    block |= {"mlp.down.kernel": hidden + width}
    block |= {"attention_norm.scale": width, "mlp_norm.scale": width}
    shapes: Shapes = {"token.embedding": (151936, 896), "norm.scale": width}
    for i in range(24):
        shapes |= _inside(f"layers_{i}", block)
    return _as_flax(shapes)


def mixtral(layers: int = 4, width: int = 1024, hidden: int = 3584) -> Shapes:
    """Mixtral 8x7B, with all widths divided by 4 and layers by 8 by default: all of it
    would not fit. Experts are an axis."""
    keys = width // 4
    block = _linear("query", width, width, False) | _linear("key", keys, width, False)
    block |= _linear("value", keys, width, False) | _linear("out", width, width, False)
    block |= _linear("router", 8, width, False)
    block |= {"gate": (8, hidden, width), "down": (8, width, hidden)}
    block |= {"up": (8, hidden, width), "norm1": (width,), "norm2": (width,)}
    shapes: Shapes = {"token": (32000, width)}
    for i in range(layers):
        shapes |= _inside(f"blocks.{i}", block)
    return shapes | {"norm": (width,), "head": (32000, width)}


def mamba() -> Shapes:
    width, inner, states, rank = 768, 1536, 16, 48
    block: Shapes = {"A_log": (inner, states), "D": (inner,)}
    block |= _linear("in", 2 * inner, width, bias=False)
    block |= {"conv1d.weight": (inner, 1, 4), "conv1d.bias": (inner, 1)}
    block |= _linear("x", rank + 2 * states, inner, bias=False)
    block |= _linear("dt", inner, rank) | _linear("out", width, inner, bias=False)
    shapes: Shapes = {"token": (50280, width)}
    for i in range(24):
        shapes |= _inside(f"blocks.{i}", block | {"norm": (width,)})
    return shapes | {"norm": (width,)}


def lstm() -> Shapes:
    """The large model of Zaremba et al."""
    shapes: Shapes = {"token": (10000, 1500)}
    for i in range(2):
        cell = {"weight_ih": (6000, 1500), "weight_hh": (6000, 1500), "bias": (6000,)}
        shapes |= _inside(f"cells.{i}", cell)
    return shapes | _linear("head", 10000, 1500)


#
# Small ones
#


def mlp() -> Shapes:
    """`eqx.nn.MLP(784, 10, 128, depth=3)`"""
    sizes = (784, 128, 128, 128, 10)
    shapes: Shapes = {}
    for i, (into, out) in enumerate(itertools.pairwise(sizes)):
        shapes |= _linear(f"layers.{i}", out, into)
    return shapes


def cnn() -> Shapes:
    """Of Flax's example of MNIST."""
    shapes = _dense("Conv_0", (3, 3, 1), (32,)) | _dense("Conv_1", (3, 3, 32), (64,))
    return (
        shapes | _dense("Dense_0", (3136,), (256,)) | _dense("Dense_1", (256,), (10,))
    )


#
# All of them
#


def _alike(number: int, *shape: int) -> Callable[[], Shapes]:
    return lambda: {str(i): shape for i in range(number)}


ZOO: dict[str, Model] = {
    "mlp": Model("MLP", "Equinox", mlp, None),
    "cnn": Model("CNN, HWIO", "flax/examples/mnist", cnn, "0.824458"),
    "efficientnet-b0": Model(
        "EfficientNet-B0", "arXiv:1905.11946, timm", efficientnet_b0, "5.288548"
    ),
    "resnet50": Model(
        "ResNet-50, OIHW", "arXiv:1512.03385, torchvision", resnet50, "25.557032"
    ),
    "resnet50-flax": Model(
        "ResNet-50, HWIO", "flax/examples/imagenet", resnet50_flax, "25.557032"
    ),
    "convnext-t": Model(
        "ConvNeXt-T", "arXiv:2201.03545, timm", convnext_tiny, "28.589128"
    ),
    "lstm": Model("LSTM", "arXiv:1409.2329", lstm, "66"),
    "vit-b16": Model(
        "ViT-B/16, HWIO", "arXiv:2010.11929, vision_transformer", vit_b16, "86.567656"
    ),
    "ddpm": Model("DDPM 256", "arXiv:2006.11239", ddpm, "114"),
    "clip-text": Model("CLIP text", "arXiv:2103.00020", clip_text, "123.060480"),
    "gpt2": Model("GPT-2", "gpt2's config.json", gpt2, "124.439808"),
    "mamba": Model("Mamba 130M", "arXiv:2312.00752", mamba, "129.135360"),
    "whisper-small": Model(
        "Whisper small", "arXiv:2212.04356", whisper_small, "241.734912"
    ),
    "mixtral": Model("Mixtral, 1/4 as wide", "arXiv:2401.04088", mixtral, None),
    "qwen": Model("Qwen 2.5 0.5B", "arXiv:2412.15115", qwen, "494.032768"),
    "llama": Model(
        "Llama 1B", "Llama 3.2's config.json", llama_unrolled, "1235.814400"
    ),
    "llama-stacked": Model(
        "Llama 1B, stacked", "Llama 3.2's config.json", llama, "1235.814400"
    ),
    "8x512x512x3x3": Model(
        "8 of (512, 512, 3, 3)", "", _alike(8, 512, 512, 3, 3), None
    ),
    "16x1000x1001": Model("16 of (1000, 1001)", "", _alike(16, 1000, 1001), None),
    "4096": Model("4096²", "", _alike(1, 4096, 4096), None),
    "16384": Model("16384²", "", _alike(1, 16384, 16384), None),
}
