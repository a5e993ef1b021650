"""A run that is cut five times, and once goes on with another number of devices: does
it end as the same run without a cut, bit for bit?

    python benchmarks/evidence/resume.py --out results/evidence/resume

A small byte-level GPT is trained for 60 steps on fake devices of a CPU, its weights and
state divided among them. Every part of a run is a process of its own, which restores
the last checkpoint; the data of a step follow from its number. Cases:

- same devices: four all the time, each with a part of the batch;
- other devices: four, from step 30 to 40 two. Each computes the gradient of the whole
  batch: sums over parts of a batch would depend on the number of parts. The
  layers are wide enough for whole groups of moments on four devices; groups that are
  laid along other axes on another mesh are rounded again.

Compared are the losses of all steps and a checksum of all bits of weights and state.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import _benchmarks  # noqa: F401
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _command_line import Parser, run_main, some_of
from _gpt import loss, StackedGPT
from _runs import Folder
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

import flashquinox as fq
from flashquinox.checkpoint import Checkpoints


STEPS, EVERY = 60, 10
BATCH, CONTEXT = 8, 32
OPTIMIZERS = {
    "adamw": partial(fq.adamw, 1e-3),
    "lion": partial(fq.lion, 1e-4),
    "sgd": partial(fq.sgd, 0.1, momentum=0.9),
}
# Of each part of a run, the number of devices.
CASES = {"same devices": [4, 4, 4, 4, 4, 4], "other devices": [4, 4, 4, 2, 4, 4]}


def windows(step: int) -> np.ndarray:
    """Of a text of random words, which a model can learn. The same for every run."""
    words = np.random.default_rng(0).integers(97, 123, (64, 5)).astype(np.uint8)
    words[:, -1] = 32
    chosen = np.random.default_rng((1, step)).integers(64, size=(BATCH, CONTEXT))
    return words[chosen].reshape(BATCH, -1)[:, : CONTEXT + 1].astype(np.int32)


def checksum(tree: PyTree) -> str:
    crc = 0
    for x in jax.tree.leaves(tree):
        crc = zlib.crc32(np.ascontiguousarray(x).tobytes(), crc)
    return f"{crc:08x}"


def train(
    folder: str, optimizer: str, case: str, first: int, last: int
) -> dict[str, Any]:
    """From the checkpoint of step `first`, which for 0 is the beginning, to `last`."""
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(kind,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    parts = PartitionSpec("devices") if case == "same devices" else PartitionSpec()
    key = jax.random.key(0)
    weights, static = eqx.partition(
        StackedGPT(128, 2, 2, 256, CONTEXT, key=key), eqx.is_inexact_array
    )
    weights = jax.device_put(weights, fq.fsdp_shardings(weights, mesh))
    optim = OPTIMIZERS[optimizer]()
    weights, state = fq.prepare(weights, optim)

    @jax.jit
    def gradient(weights: PyTree, batch: Any) -> tuple[Any, PyTree]:
        of = lambda weights: loss(eqx.combine(weights, static), batch)
        return jax.value_and_grad(of)(weights)

    step = jax.jit(optim.step, donate_argnums=(0, 1))
    losses = []
    with Checkpoints(folder) as checkpoints:
        if first:
            weights, state = checkpoints.restore(weights, state, step=first)
        for number in range(first, last):
            batch = jax.device_put(windows(number), NamedSharding(mesh, parts))
            # Whole before the program begins: XLA would divide products as it divides
            # weights, and their sums with them.
            value, grads = gradient(jax.device_put(weights, everywhere), batch)
            weights, state = step(weights, state, grads)
            losses.append(float(jnp.asarray(value)).hex())
        checkpoints.save(last, weights, state)
    return {
        "devices": jax.device_count(),
        "losses": losses,
        "checksum": checksum((weights, state)),
    }


def in_a_process(devices: int, *arguments: object) -> dict[str, Any]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, "--part", json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run(optimizer: str, case: str, devices: Sequence[int], every: int) -> Any:
    """Losses and checksum of a run with a cut after each part."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            in_a_process(n, folder, optimizer, case, i * every, (i + 1) * every)
            for i, n in enumerate(devices)
        ]
    losses = [x for part in parts for x in part["losses"]]
    return losses, parts[-1]["checksum"]


def compare(optimizer: str, case: str) -> dict[str, Any]:
    devices = CASES[case]
    losses, whole = run(optimizer, case, devices[:1], STEPS)
    of_parts, cut = run(optimizer, case, devices, EVERY)
    return {
        "optimizer": optimizer,
        "case": case,
        "devices": devices,
        "steps": STEPS,
        "first loss": float.fromhex(losses[0]),
        "last loss": float.fromhex(losses[-1]),
        "checksum without a cut": whole,
        "checksum with cuts": cut,
        "equal losses": sum(x == y for x, y in zip(losses, of_parts, strict=True)),
        "result": {"equal": float(whole == cut and losses == of_parts)},
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument(
        "--optimizers",
        type=partial(some_of, OPTIMIZERS),
        default=list(OPTIMIZERS),
        help=f"(default: {','.join(OPTIMIZERS)})",
    )
    parser.add_argument("--part", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        print(json.dumps(train(*arguments.part)))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    folder = Folder(arguments.out)
    for optimizer in arguments.optimizers:
        for case in CASES:
            name = f"{optimizer}-{case.replace(' ', '-')}"
            if folder.begin(name):
                folder.end(name, compare(optimizer, case))


if __name__ == "__main__":
    run_main(main)
