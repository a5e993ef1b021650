"""How exactly do a bfloat16 weight and its correction bring back a float32?

    python benchmarks/reconstruction.py --json reconstruction.json

For every exponent of float32, subnormal numbers included: positive numbers whose
mantissas are one in each of so many equal parts of all mantissas (--numbers, 262,144 by
default; the place in its part is random). Each is rounded to bfloat16 with a
correction, and decoded to float32 again:

- ours: `flashquinox.ECCWeight`, with a correction of 8 bits (a master weight of 24) and
  of 16 bits (of 32);
- paper: FlashOptim's split with as many bits, e = round(127 (w - h) / (ulp(h) / 2)) and
  h + e ulp(h) / 254, or with 32767 and 65534; exact, and rounded at the end;
- bfloat16: without a correction.

Errors are relative to the number, or, below the normal numbers, to the smallest normal
one. The largest numbers, which bfloat16 rounds to infinity, are left out, and the 128
before them, which our 24 bits do. Negative numbers are split as positive ones are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _command_line import Parser, positive_integer, run_main, versions, write_json

import flashquinox as fq


_EXPONENTS = range(255)
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def numbers(exponent: int, how_many: int, rng: np.random.Generator) -> np.ndarray:
    """Of this exponent's bits; 0 are the subnormal numbers."""
    width = 2**23 // how_many
    mantissas = np.arange(how_many) * width + rng.integers(0, width, how_many)
    patterns = (exponent << 23) + mantissas
    if exponent == 254:
        # Rounded to infinity.
        patterns = patterns[patterns < 0x7F7F7F80]
    return patterns.astype(np.uint32).view(np.float32)


def _nearest_bfloat16(x: np.ndarray) -> np.ndarray:
    """By integers: some CPUs take subnormal numbers for zero."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32)


def paper(x: np.ndarray, bits: int) -> np.ndarray:
    high = _nearest_bfloat16(x).astype(np.float64)
    _, exponent = np.frexp(high)
    smallest = int(jnp.finfo(jnp.bfloat16).minexp)
    exponent = np.where(high == 0, smallest, np.maximum(exponent - 1, smallest))
    half_unit = np.ldexp(1.0, exponent - 8)
    steps = 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(steps * (x - high) / half_unit), -steps - 1, steps)
    return (high + codes / steps * half_unit).astype(np.float32)


@functools.partial(jax.jit, static_argnames="bits")
def _there_and_back(pattern: jax.Array, bits: Any) -> jax.Array:
    x = jax.lax.bitcast_convert_type(pattern, jnp.float32)
    decoded = fq.ECCWeight.encode(x, jnp.bfloat16, bits).decode()
    return jax.lax.bitcast_convert_type(decoded, jnp.uint32)


def ours(x: np.ndarray, bits: int) -> np.ndarray:
    return np.asarray(_there_and_back(x.view(np.uint32), 16 + bits)).view(np.float32)


SPLITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bfloat16": _nearest_bfloat16,
    "paper, 24 bits": lambda x: paper(x, 8),
    "ours, 24 bits": lambda x: ours(x, 8),
    "paper, 32 bits": lambda x: paper(x, 16),
    "ours, 32 bits": lambda x: ours(x, 16),
}


def measure(exponent: int, how_many: int) -> dict[str, dict[str, float]]:
    x = numbers(exponent, how_many, np.random.default_rng(exponent))
    exact = x.astype(np.float64)
    scale = np.maximum(exact, _SMALLEST_NORMAL)
    found = {}
    for name, split in SPLITS.items():
        error = np.abs(split(x).astype(np.float64) - exact) / scale
        found[name] = {
            "largest": float(error.max()),
            "mean": float(error.mean()),
            "exact": float(np.mean(error == 0)),
        }
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--numbers",
        type=positive_integer,
        default=2**18,
        help="of each exponent, a power of two (default: 262144)",
    )
    parser.add_json()
    arguments = parser.parse_args()
    if 2**23 % arguments.numbers:
        parser.error(f"--numbers must be a power of two; got {arguments.numbers}")
    rows = [measure(exponent, arguments.numbers) for exponent in _EXPONENTS]
    print(f"{'':16}{'largest':>12}{'mean':>12}{'exact':>10}  of normal numbers")
    for name in SPLITS:
        normal = [row[name] for row in rows[1:]]
        largest = max(x["largest"] for x in normal)
        mean, exact = (np.mean([x[k] for x in normal]) for k in ("mean", "exact"))
        print(f"{name:16}{largest:12.3e}{mean:12.3e}{exact:10.2%}")
    write_json(
        arguments.json,
        versions=versions("jax", "jaxlib", "numpy", "flashquinox"),
        device=jax.devices()[0].device_kind,
        numbers=arguments.numbers,
        exponents=[x - 127 for x in _EXPONENTS],
        splits={
            name: {
                k: [float(f"{row[name][k]:.4g}") for row in rows]
                for k in ("largest", "mean", "exact")
            }
            for name in SPLITS
        },
    )


if __name__ == "__main__":
    run_main(main)
