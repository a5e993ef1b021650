"""Records of runs, a JSON file each; and until when runs may be begun.

A run whose file is there is not run again, so a program that was stopped goes on where
it was.
"""

import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
from _command_line import command, versions

import flashquinox as fq


# Seconds since 1970, which `jobs.py` sets.
ENDS = "EVIDENCE_ENDS"
# The exit code of a program that left runs for later.
LEFT = 3


class Folder:
    """Where runs of one kind are, such as `results/evidence/gpt2`."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._seconds: list[float] = []
        self._begin = time.perf_counter()

    def file(self, name: str) -> pathlib.Path:
        return self.path / f"{name}.json"

    def has(self, name: str) -> bool:
        return self.file(name).exists()

    def read(self, name: str) -> dict[str, Any]:
        return json.loads(self.file(name).read_text())

    def begin(self, name: str, share: float = 1.0) -> bool:
        """Whether this run is to be run: it is not there. Where it would end too late,
        the program ends here. `share`: its length, in that of a whole run."""
        if self.has(name):
            return False
        ends = float(os.environ.get(ENDS, "inf"))
        # The last run tells best: the first ones compiled.
        expected = share * self._seconds[-1] if self._seconds else 0.0
        if time.time() + expected > ends:
            print(f"{name} would end too late.", flush=True)
            sys.exit(LEFT)
        self._begin = time.perf_counter()
        return True

    def end(self, name: str, record: dict[str, Any], share: float = 1.0) -> None:
        """Writes the record: whoever is stopped here has all of it or none."""
        seconds = time.perf_counter() - self._begin
        self._seconds.append(seconds / share)
        (device, *_) = jax.devices()
        whole = {
            "command": command(),
            "device": device.device_kind,
            "versions": {
                **versions("jax", "jaxlib", "optax", "equinox"),
                "flashquinox": fq.__version__,
            },
            "seconds": round(seconds, 2),
            **record,
        }
        file = self.file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.new")
        new.write_text(json.dumps(whole, indent=1) + "\n")
        new.replace(file)
        print(f"{name}: {_short(record)}, {seconds:.1f} s", flush=True)


def _short(record: dict[str, Any]) -> str:
    result = record["result"]
    means = {
        k: statistics.fmean(x) if isinstance(x, list) else x for k, x in result.items()
    }
    return ", ".join(f"{k} {x:.4f}" for k, x in means.items())


def best_rate(records: dict[float, float], least: bool = True) -> float:
    """The learning rate with the best result: NaN is the worst."""
    sign = 1 if least else -1

    def key(rate: float) -> float:
        x = sign * records[rate]
        return x if x == x else float("inf")

    return min(records, key=key)
