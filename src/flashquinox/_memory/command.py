"""`flashquinox plan`: prints, draws or writes the plan of a known model."""

import argparse
import dataclasses
import importlib.util
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from .._optimizer.accumulate import accumulate, AccumulatingOptimizer
from .._optimizer.catalog import OPTIMIZERS
from .._optimizer.ema import ema
from .._optimizer.optimizer import Optimizer
from .._storage.storage import Storage
from . import architectures
from .adapters import with_adapters
from .plan import memory_plan
from .report import MemoryPlan


def run_plan(settings: argparse.Namespace) -> None:
    """Runs the command. `ValueError` and `TypeError` are wrong arguments."""
    if settings.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "--plot: needs Matplotlib, which is not installed: "
            'pip install "flashquinox[plot]"'
        )
    name, shapes = shapes_of(settings)
    model = architectures.structs(shapes, jnp.dtype(settings.dtype))
    parts: dict[str, Any] = {}
    if settings.lora is not None:
        model, parts["trainable"] = with_adapters(model, settings.lora, settings.base)
        name += f", LoRA of rank {settings.lora}"
        name += f" on {settings.base}" if settings.base else ""
    if "blocks" in shapes:
        for part in ("blocks", "prologue", "epilogue"):
            parts[part] = getattr(architectures, part)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = memory_plan(
            model,
            make_optimizer(settings),
            settings.devices,
            ema=ema(0.999) if settings.ema else None,
            **parts,
        )
    devices = "1 device" if plan.devices == 1 else f"{plan.devices} devices"
    title = f"{name}, {settings.optimizer}, {settings.dtype}, {devices}"
    if settings.plot is not None:
        from .plot import draw

        try:
            draw(plan, title, settings.plot, settings.device_memory)
        except OSError as error:
            raise ValueError(f"--plot: {settings.plot}: {error.strerror}") from error
    written = [] if settings.plot is None else [str(settings.plot)]
    if settings.json:
        found = {"title": title} | as_json(plan) | {"written": written}
        if settings.offload:
            found["transfer_seconds"] = plan.step.transfer_seconds(
                settings.host_bandwidth
            )
        print(json.dumps(found, indent=1))
        return
    trained = " trained" if settings.lora is not None else ""
    print(f"{title}: {plan.parameters:,}{trained} parameters\n")
    print(plan.table(settings.device_memory, settings.host_bandwidth))
    straddling = sum("hold no whole groups" in str(x.message) for x in caught)
    if straddling > 0:
        print(
            f"Of {straddling} weights, no device has whole groups: every step gathers "
            "them."
        )
    for path in written:
        print(f"Wrote {path}.")


def shapes_of(settings: argparse.Namespace) -> tuple[str, architectures.Shapes]:
    """The name and the shapes of the chosen model."""
    if settings.base is not None and settings.lora is None:
        raise ValueError("--base: only with --lora, as a quantized base is not trained")
    if settings.lora is not None and settings.params is not None:
        raise ValueError("--lora: needs a model with layers; pass --model or --config")
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
        # From `json` or `from_config`, or of a file that is no text.
        except ValueError as error:
            reason = str(error)
        raise ValueError(f"--config: {path}: {reason}")
    # Every row is a group, and every device gets the same number of rows.
    rows = math.ceil(settings.params / settings.group_size / settings.devices)
    shape = rows * settings.devices, settings.group_size
    return "matrices", {"matrices": shape}


def make_optimizer(
    settings: argparse.Namespace,
) -> Optimizer | AccumulatingOptimizer:
    storage = Storage(
        master_weight_bits=settings.master_weight_bits,
        moments=settings.moments,
        group_size=settings.group_size,
    )
    arguments: dict[str, Any] = {"storage": storage}
    if settings.offload:
        arguments["state_memory"] = "pinned_host"
    if settings.momentum is not None:
        if settings.optimizer not in ("sgd", "sgdw"):
            raise ValueError("--momentum: only of sgd and sgdw")
        arguments["momentum"] = settings.momentum
    if settings.optimizer == "muon" and settings.params is None:
        arguments["weight_dimension_numbers"] = architectures.dimension_numbers
    make: Callable[..., Optimizer] = OPTIMIZERS[settings.optimizer]
    optim = make(1e-3, **arguments)
    # How many does not change the bytes.
    bits = settings.accumulate
    return optim if bits is None else accumulate(optim, every=2, bits=bits)


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """All fields of a plan, and the totals of its columns."""
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
