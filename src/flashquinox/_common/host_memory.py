"""How much memory a host has left."""

import os
from pathlib import Path


# XLA's pool of host memory for GPUs, in GiB, and the variable that sets it.
POOL_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_POOL = 64


def free_bytes() -> int | None:
    """The bytes that this process can still allocate: those that the system, and the
    control group that it is in, have left. `None` if that is not known."""
    found = [x for x in (_of_system(), _of_control_group()) if x is not None]
    return min(found, default=None)


def pool_bytes() -> int:
    """The most bytes of host memory that XLA gives to the arrays of GPUs."""
    text = os.environ.get(POOL_VARIABLE, "")
    return (int(text) if text.isdecimal() else _POOL) * 2**30


def _of_system() -> int | None:
    # "MemAvailable:   12345 kB", of Linux.
    for line in _lines("/proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _of_control_group() -> int | None:
    # Of versions 2 and 1.
    for folder, most, used, cached in (
        ("", "max", "current", "inactive_file"),
        ("memory/", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
    ):
        path = f"/sys/fs/cgroup/{folder}memory."
        found = [_lines(f"{path}{name}") for name in (most, used)]
        if not all(found) or not found[0][0].isdecimal():
            continue
        limit, taken = (int(lines[0]) for lines in found)
        # Files that were read, which make room when it is needed.
        for line in _lines(f"{path}stat"):
            name, _, number = line.partition(" ")
            taken -= int(number) if name == cached else 0
        return max(0, limit - taken)
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
