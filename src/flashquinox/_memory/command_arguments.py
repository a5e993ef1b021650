"""The arguments of `flashquinox plan`."""

import argparse
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from .._optimizer.catalog import OPTIMIZERS
from .._storage.moment_codecs import MomentCodecs
from .._storage.storage import AUTO_BITS, Storage
from . import architectures
from .adapters import BASES
from .shardings import MOST_DEVICES


_PLAN = """Will it fit? Prints what each device holds in training: weights, corrections,
moments, scales and gradients, with and without gradient release, beside mixed precision
with float32 master weights and moments. Allocates nothing, and needs no accelerator."""

# `%(prog)s` includes `plan`.
_EXAMPLES = f"""\
examples:
  %(prog)s --model llama-3.1-8b --devices 8 --optimizer adamw
  %(prog)s --params 7e9 --optimizer lion --device-memory 80GB
  %(prog)s --config path/to/model --devices 16 --plot plan.png
  %(prog)s --model llama-3.1-8b --lora 16 --base nf4
  %(prog)s --model llama-3.1-8b --devices 8 --accumulate --ema

models:
  {", ".join(list(architectures.PRESETS)[:4])}
  {", ".join(list(architectures.PRESETS)[4:7])}
  {", ".join(list(architectures.PRESETS)[7:])}
"""


def add_plan(commands: Any) -> argparse.ArgumentParser:
    """Adds the parser of the command to the subparsers of the program."""
    plan = commands.add_parser(
        "plan",
        help="what each device holds in training",
        description=_PLAN,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = plan.add_argument_group("model, one of these").add_mutually_exclusive_group(
        required=True
    )
    model.add_argument("--model", metavar="NAME", help="a model of the list below")
    model.add_argument(
        "--params",
        metavar="N",
        type=partial(quantity, _COUNTS, "7e9 or 7B", 1.0),
        help="so many parameters, in matrices of whole groups: 7e9 or 7B, say",
    )
    model.add_argument(
        "--config",
        metavar="PATH",
        type=config,
        help="a model of Hugging Face's Transformers: its directory, or its "
        "config.json",
    )
    add = plan.add_argument
    add("--devices", metavar="N", type=whole, default=1, help="how many (1)")
    add(
        "--optimizer",
        default="adamw",
        choices=tuple(OPTIMIZERS),
        help=f"one of {', '.join(OPTIMIZERS)} (adamw)",
        metavar="NAME",
    )
    add(
        "--lora",
        type=whole,
        metavar="RANK",
        help="train adapters of this rank on the matrices of the layers, and nothing "
        "else (train all weights)",
    )
    add(
        "--base",
        choices=tuple(BASES),
        metavar="NAME",
        help="with --lora: those matrices as codes and scales: int8 or fp8, one scale "
        "for each row; int4 or nf4, for 128 or 64 elements of it (the dtype of the "
        "weights)",
    )
    add(
        "--accumulate",
        type=int,
        nargs="?",
        const=24,
        choices=(16, 24, 32),
        metavar="BITS",
        help="sum gradients between calls, in 24 bits (the default), 16 or 32",
    )
    add(
        "--ema",
        action="store_true",
        help="keep an average of the weights, in 24 bits",
    )
    add(
        "--offload",
        action="store_true",
        help="keep the state in the memory of the host",
    )
    add(
        "--host-bandwidth",
        metavar="SIZE",
        type=partial(quantity, _SIZES, "40GB", 1e6),
        default=40_000_000_000,
        help="with --offload: what moves in a second, each way at once (40GB)",
    )
    add("--momentum", type=float, metavar="B", help="of sgd and sgdw (none)")
    add(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of weights and gradients: bfloat16 (the default), float16 or float32",
        metavar="DTYPE",
    )
    add(
        "--master-weight-bits",
        type=bits,
        default="auto",
        metavar="N",
        help=f"24, 32 or none ({AUTO_BITS}; none for float32)",
    )
    add(
        "--moments",
        type=codecs,
        default="flashquinox",
        metavar="NAME",
        help=f"how moments are stored: {', '.join(MomentCodecs.names())}, or a pair "
        "with a comma (flashquinox)",
    )
    add(
        "--group-size",
        type=whole,
        default=Storage().group_size,
        metavar="N",
        help="how many elements share a scale (%(default)s)",
    )
    add(
        "--device-memory",
        type=partial(quantity, _SIZES, "80GB or 16GiB", 1e6),
        metavar="SIZE",
        help="of a device, to see what is left of it: 80GB or 16GiB, say",
    )
    add("--plot", type=picture, metavar="FILE.png", help="also draw it to this file")
    add("--json", action="store_true", help="print the figures as JSON, in bytes")
    return plan


#
# Types of arguments
#


_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_SIZES = {"": 1.0, "B": 1.0}
_SIZES |= {f"{x}B": 1000.0 ** (i + 1) for i, x in enumerate("KMGT")}
_SIZES |= {f"{x}IB": 1024.0 ** (i + 1) for i, x in enumerate("KMGT")}


def quantity(units: dict[str, float], example: str, least: float, text: str) -> int:
    """A number, at least `least`, with one of these units behind it."""
    found = re.fullmatch(
        r"([\d_.]+(?:e\+?\d+)?) *([a-z]*)", text.strip(), re.IGNORECASE
    )
    number = math.nan
    if found is not None and found[2].upper() in units:
        try:
            number = float(found[1]) * units[found[2].upper()]
        except ValueError:
            pass
    if not least <= number < 1e18:
        raise argparse.ArgumentTypeError(f"takes {example}, say; got {text!r}")
    return round(number)


def whole(text: str) -> int:
    # `int` raises an error of its own for thousands of digits.
    number = int(text) if text.isdecimal() and len(text) <= 20 else 0
    if not 1 <= number <= MOST_DEVICES:
        raise argparse.ArgumentTypeError(
            f"takes a whole number from 1 to {MOST_DEVICES}; got {text!r}"
        )
    return number


def config(text: str) -> Path:
    # `Path("")` would be the current directory.
    if not text:
        raise argparse.ArgumentTypeError(f"takes a file or a directory; got {text!r}")
    return Path(text)


def bits(text: str) -> int | str | None:
    if text == "auto":
        return text
    if text not in ("24", "32", "none"):
        raise argparse.ArgumentTypeError(f"takes 24, 32 or none; got {text!r}")
    return None if text == "none" else int(text)


def codecs(text: str) -> str | tuple[str, ...]:
    names = tuple(text.split(","))
    if len(names) > 2 or not set(names) <= set(MomentCodecs.names()):
        raise argparse.ArgumentTypeError(
            f"takes one of {', '.join(MomentCodecs.names())}, or two with a comma "
            f"between them; got {text!r}"
        )
    return names[0] if len(names) == 1 else names


def picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(
            f"takes a file that ends in .png, .pdf or .svg; got {text!r}"
        )
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path
