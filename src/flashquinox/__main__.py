"""Flashquinox on the command line: `flashquinox`, or `python -m flashquinox`."""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

import flashquinox as fq

from ._memory import architectures
from ._memory.plan import MOST_DEVICES
from ._storage.storage import AUTO_BITS


class Parser(argparse.ArgumentParser):
    """Wrong arguments are one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


#
# Arguments
#


_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_SIZES = {"": 1.0, "B": 1.0}
_SIZES |= {f"{x}B": 1000.0 ** (i + 1) for i, x in enumerate("KMGT")}
_SIZES |= {f"{x}IB": 1024.0 ** (i + 1) for i, x in enumerate("KMGT")}


def quantity(units: dict[str, float], example: str, least: float, text: str) -> int:
    """A number of these units."""
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
    # Python itself reads no more than some thousands of digits.
    number = int(text) if text.isdecimal() and len(text) <= 20 else 0
    if not 1 <= number <= MOST_DEVICES:
        raise argparse.ArgumentTypeError(
            f"takes a whole number from 1 to {MOST_DEVICES}; got {text!r}"
        )
    return number


def config(text: str) -> Path:
    # `Path` takes nothing for the directory that one is in.
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
    if len(names) > 2 or not set(names) <= set(fq.MomentCodecs.names()):
        raise argparse.ArgumentTypeError(
            f"takes one of {', '.join(fq.MomentCodecs.names())}, or two with a comma "
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


_PLAN = """Will it fit? Prints what each device holds in training: weights, corrections,
moments, scales and gradients, with and without gradient release, beside mixed precision
with float32 master weights and moments. Allocates nothing, and needs no accelerator."""

_DESCRIPTION = """Flashquinox on the command line.

    %(prog)s plan --model llama-3.1-8b --devices 8 --optimizer adamw

`%(prog)s plan --help` has more.
"""

# `%(prog)s` is the command itself, `plan` included.
_EXAMPLES = f"""\
examples:
  %(prog)s --model llama-3.1-8b --devices 8 --optimizer adamw
  %(prog)s --params 7e9 --optimizer lion --device-memory 80GB
  %(prog)s --config path/to/model --devices 16 --plot plan.png

models:
  {", ".join(list(architectures.PRESETS)[:4])}
  {", ".join(list(architectures.PRESETS)[4:7])}
  {", ".join(list(architectures.PRESETS)[7:])}
"""


def program() -> str:
    """This program, as it was called."""
    called = Path(sys.argv[0]).stem if sys.argv else ""
    return "flashquinox" if called == "flashquinox" else "python -m flashquinox"


def parser() -> Parser:
    # Of plain text on every Python, also where help has colors.
    new = partial(Parser, formatter_class=argparse.RawDescriptionHelpFormatter)
    top = new(prog=program(), description=_DESCRIPTION)
    version = f"flashquinox {fq.__version__}"
    top.add_argument("--version", action="version", version=version)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
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
        choices=("adamw", "adam", "lion", "sgd", "sgdw"),
        help="adamw (the default), adam, lion, sgd or sgdw",
        metavar="NAME",
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
        help=f"how moments are stored: {', '.join(fq.MomentCodecs.names())}, or a pair "
        "with a comma (flashquinox)",
    )
    add(
        "--group-size",
        type=whole,
        default=fq.Storage().group_size,
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
    plan.set_defaults(run=run_plan, fail=plan.error)
    return top


#
# The plan
#


def shapes_of(settings: argparse.Namespace) -> tuple[str, architectures.Shapes]:
    """The name of the model that is asked for, and its shapes."""
    if settings.model is not None:
        if settings.model not in architectures.PRESETS:
            names = ", ".join(architectures.PRESETS)
            raise ValueError(f"--model: takes one of {names}; got {settings.model!r}")
        return settings.model, architectures.PRESETS[settings.model]
    if settings.config is not None:
        path = settings.config
        is_directory = path.is_dir()
        try:
            path = path / "config.json" if is_directory else path
            config = json.loads(path.read_text(encoding="utf-8"))
            return str(settings.config), architectures.from_config(config)
        except FileNotFoundError as error:
            reason = error.strerror
            if is_directory:
                path = settings.config
                reason = (
                    "there is no config.json in this directory. Pass the directory of "
                    "a model that has one, or the file itself."
                )
        except OSError as error:
            reason = error.strerror
        except RecursionError:
            reason = "its lists are nested too deeply: it is no config of Transformers"
        # Of `json` and of `from_config`; also what is no text.
        except ValueError as error:
            reason = str(error)
        raise ValueError(f"--config: {path}: {reason}")
    # Whole groups, and the same on each device.
    rows = math.ceil(settings.params / settings.group_size / settings.devices)
    shape = rows * settings.devices, settings.group_size
    return "matrices", {"matrices": shape}


def make_optimizer(settings: argparse.Namespace) -> fq.Optimizer:
    storage = fq.Storage(
        master_weight_bits=settings.master_weight_bits,
        moments=settings.moments,
        group_size=settings.group_size,
    )
    arguments: dict[str, Any] = {"storage": storage}
    if settings.momentum is not None:
        if settings.optimizer not in ("sgd", "sgdw"):
            raise ValueError("--momentum: only of sgd and sgdw")
        arguments["momentum"] = settings.momentum
    make: Callable[..., fq.Optimizer] = getattr(fq, settings.optimizer)
    return make(1e-3, **arguments)


def run_plan(settings: argparse.Namespace) -> None:
    if settings.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "--plot: needs Matplotlib, which is not installed: "
            'pip install "flashquinox[plot]"'
        )
    name, shapes = shapes_of(settings)
    parts = {}
    if "blocks" in shapes:
        for part in ("blocks", "prologue", "epilogue"):
            parts[part] = getattr(architectures, part)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = fq.memory_plan(
            architectures.structs(shapes, jnp.dtype(settings.dtype)),
            make_optimizer(settings),
            settings.devices,
            **parts,
        )
    devices = "1 device" if plan.devices == 1 else f"{plan.devices} devices"
    title = f"{name}, {settings.optimizer}, {settings.dtype}, {devices}"
    if settings.plot is not None:
        from ._memory.plot import draw

        try:
            draw(plan, title, settings.plot, settings.device_memory)
        except OSError as error:
            raise ValueError(f"--plot: {settings.plot}: {error.strerror}") from error
    written = [] if settings.plot is None else [str(settings.plot)]
    if settings.json:
        found = {"title": title} | as_json(plan) | {"written": written}
        print(json.dumps(found, indent=1))
        return
    print(f"{title}: {plan.parameters:,} parameters\n")
    print(plan.table(settings.device_memory))
    straddling = sum("hold no whole groups" in str(x.message) for x in caught)
    if straddling > 0:
        print(
            f"Of {straddling} weights, no device has whole groups: every step gathers "
            "them."
        )
    for path in written:
        print(f"Wrote {path}.")


def as_json(plan: fq.MemoryPlan) -> dict[str, Any]:
    """All fields, and what follows from them."""
    of = lambda x: (
        dataclasses.asdict(x)
        | {
            "total": x.total,
            "bytes_per_parameter": x.bytes_per_parameter,
        }
    )
    columns = {key.replace(" ", "_"): of(x) for key, x in plan.columns().items()}
    return {
        "parameters": plan.parameters,
        "devices": plan.devices,
        "whole": plan.whole,
        "on_each_device": columns,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    # Nothing is computed: an accelerator would be taken from who needs it.
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    if sys.stdout is None:
        print(f"{program()}: error: the output is closed", file=sys.stderr)
        sys.exit(1)
    try:
        try:
            settings = parser().parse_args(arguments)
            try:
                settings.run(settings)
            except (ValueError, TypeError) as error:
                settings.fail(str(error))
        finally:
            # Of help too: later, nobody could catch what comes of it.
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        # Of the output. Python would flush again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # If a pipe is closed, whoever read has seen enough.
        if not isinstance(error, BrokenPipeError):
            print(f"{program()}: error: {error.strerror}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
