"""How long does `import flashquinox` take, beside what it imports?

    python benchmarks/imports.py
    python benchmarks/imports.py --repeats 20 --json imports.json

Each repeat is a process of its own, which imports JAX, Equinox and Optax, and then this
library. The seconds of both are printed, as the median and the range of the repeats.
They are of CPU time, of which an import needs one core. A first process stores the
bytecode, as pip does when it installs a package.
"""

import os
import statistics
import subprocess
import sys

from _command_line import Parser, positive_integer, run_main, versions, write_json


_PROGRAM = """
import time

start = time.process_time()
import jax, equinox, optax
others = time.process_time()
import flashquinox
end = time.process_time()
print(others - start, end - others)
"""


def measure() -> tuple[float, float]:
    """Seconds of the imports that this library needs, and of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in _UNUSUAL}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    others, own = map(float, done.stdout.split())
    return others, own


# Without stored bytecode, most of the time is Python's compiler's.
_UNUSUAL = ("PYTHONDONTWRITEBYTECODE",)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=positive_integer, default=10)
    parser.add_json()
    settings = parser.parse_args()
    measure()
    rows = [measure() for _ in range(settings.repeats)]
    others, own = zip(*rows, strict=True)
    record = {"others": sorted(others), "flashquinox": sorted(own)}
    for name, seconds in record.items():
        print(
            f"{name:12} {statistics.median(seconds):.3f} s "
            f"({min(seconds):.3f} to {max(seconds):.3f})"
        )
    write_json(
        settings.json,
        versions=versions("jax", "equinox", "optax", "flashquinox"),
        cpu_seconds=record,
    )


if __name__ == "__main__":
    run_main(main)
