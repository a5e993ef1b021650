"""What the kernels of a program take, by the parts of a step that they belong to."""

import collections
import glob
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax


# For each part, how the names of its kernels begin; of the first that fits.
PARTS = {
    "first pass": ("flashquinox_momentum",),
    "second pass": ("flashquinox_",),
    "matrix products": (
        "nvjet",
        "cublas",
        "cutlass",
        "sm90_",
        "sm80_",
        "gemm",
        "void cu",
    ),
    "exchanges": ("nccl",),
}
# Norms, sums and transposes of the iteration; copies; and all else.
OTHERS = "other kernels"
# No kernel runs.
IDLE = "idle"


def part_of(kernel: str) -> str:
    for part, starts in PARTS.items():
        if kernel.lower().startswith(starts):
            return part
    return OTHERS


def parts(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """The milliseconds of each part in a step, of which one call of `run` has so many:
    means over GPUs. Where parts overlap, both count."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path, *_) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        devices = list(_kernels(path))
    if not devices:
        raise RuntimeError("the profile has no GPU")
    total: dict[str, float] = collections.defaultdict(float)
    kernels: dict[str, float] = collections.defaultdict(float)
    share = 1e6 * steps * len(devices)
    for events in devices:
        for name, start, end in events:
            total[part_of(name)] += (end - start) / share
            kernels[f"{part_of(name)}: {name}"] += (end - start) / share
        total[IDLE] += _idle([x[1:] for x in events]) / share
    longest = sorted(kernels.items(), key=lambda x: -x[1])[:40]
    return {"parts": dict(total), "kernels": dict(longest)}


def _kernels(path: str) -> Iterable[list[tuple[str, float, float]]]:
    """For each GPU, the names of kernels, with the nanoseconds of start and end."""
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        if "GPU" not in plane.name:
            continue
        found = [
            (event.name, event.start_ns, event.start_ns + event.duration_ns)
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
        if found:
            yield found


def _idle(spans: list[tuple[float, float]]) -> float:
    """How long nothing runs between the first and the last."""
    idle, until = 0.0, None
    for start, end in sorted(spans):
        if until is not None and start > until:
            idle += start - until
        until = end if until is None else max(until, end)
    return idle


def text_of(found: dict[str, float]) -> str:
    names = [*PARTS, OTHERS, IDLE]
    return ", ".join([f"{x} {found[x]:.3f}" for x in names if x in found])
