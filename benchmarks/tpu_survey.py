"""Compiles the step of leaves of random shapes, with the real compiler for TPUs, and
prints those of which something is copied. No TPU is needed.

    python benchmarks/tpu_survey.py --chips v5e --shapes 2000 --seed 1

Shapes have 1 to 5 axes and 16 Ki to 64 Mi elements. The lengths of axes are those that
models have, powers of two, primes and any others, and often 1 and 2. Many leaves are
one program. Where it accesses more bytes than it must, halves of it are compiled, and
so on, until it is known which leaves do.

- accessed: bytes, over the elements of a leaf, without 40 kB of a program and 3 kB of a
  kernel: the compiler counts 512 bytes for each number that a step needs;
- must: gradient, weight, correction, codes and scales, of which each is read once, and
  all but the gradient written once;
- what is copied, and bytes of temporaries and of results that are not in place.
"""

import dataclasses
import itertools
import math
import random
import time
from functools import partial
from typing import Any

import _tpu
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from _command_line import (
    Parser,
    positive_integer,
    run_main,
    some_of,
    versions,
    write_json,
)

import flashquinox as fq


Shape = tuple[int, ...]

_COMMON = (
    *(3, 4, 5, 7, 8, 9, 12, 14, 16, 17, 24, 31, 32, 33, 40, 48, 49, 64, 77, 80, 96),
    *(100, 127, 128, 129, 192, 196, 197, 256, 257, 320, 384, 500, 512, 640, 768, 1000),
    *(1001, 1024, 1152, 1280, 1536, 2048, 2560, 3072, 4095, 4096, 5120, 8191, 8192),
    *(11008, 14336, 30522, 32000, 32003, 50257, 65536, 100_003, 128_256, 1_048_576),
)
_PRIMES = (3, 5, 7, 11, 13, 19, 37, 61, 97, 113, 131, 251, 509, 1021, 2039, 4093, 8209)
_LEAST, _MOST = 2**14, 2**26
_CHIPS = "v5e", "v5p", "v6e", "tpu7x"

OPTIMIZERS = {
    "adamw": lambda: fq.adamw(1e-3, weight_decay=0.01, backend="tpu"),
    "lion": lambda: fq.lion(1e-3, backend="tpu"),
    "sgdw": lambda: fq.sgdw(1e-3, momentum=0.9, backend="tpu"),
}
# Numbers of a program, and of each kernel in it, in bytes.
_NUMBERS = 40 * 1024, 6 * 512
# Copies of fewer elements are not counted.
_LEAST_COPIED = _LEAST // 32


def random_shapes(seed: int, count: int) -> list[Shape]:
    """All different."""
    rng = random.Random(seed)

    def length() -> int:
        kind = rng.choices(
            ("short", "common", "any", "power", "prime"), (3, 4, 2, 1, 1)
        )
        match kind[0]:
            case "short":
                return rng.choice((1, 2))
            case "common":
                return rng.choice(_COMMON)
            case "any":
                return int(2 ** rng.uniform(1, 14))
            case "power":
                return 2 ** rng.randint(1, 14)
        return rng.choice(_PRIMES)

    found: dict[Shape, None] = {}
    while len(found) < count:
        axes = rng.choices(range(1, 6), (1, 8, 10, 10, 6))[0]
        shape = tuple([length() for _ in range(axes)])
        if _LEAST <= math.prod(shape) <= _MOST:
            found[shape] = None
    return list(found)


@dataclasses.dataclass(frozen=True)
class Setting:
    chip: str
    optimizer: str
    dtype: str


def compile_leaves(setting: Setting, shapes: list[Shape]) -> dict[str, Any]:
    """The step of a model of these leaves."""
    params = [jax.ShapeDtypeStruct(x, jnp.dtype(setting.dtype)) for x in shapes]
    optim = OPTIMIZERS[setting.optimizer]()
    state = jax.eval_shape(optim.init, params)
    compiled = _tpu.compile_for(
        setting.chip, optim.step, params, state, params, donate=(0, 1)
    ).compiled
    memory: Any = compiled.memory_analysis()
    text: str = compiled.as_text()
    kernels = text.count('custom_call_target="tpu_custom_call"')
    size = sum(map(math.prod, shapes))
    bytes_of = lambda x: sum([a.size * a.dtype.itemsize for a in jtu.tree_leaves(x)])
    accessed = compiled.cost_analysis()["bytes accessed"]
    must = 3 * bytes_of(params) + 2 * bytes_of(state)
    numbers = _NUMBERS[0] + _NUMBERS[1] * kernels
    return {
        "shapes": shapes,
        "accessed": (accessed - numbers) / size,
        "must": must / size,
        "excess bytes": max(0, int(accessed - numbers - must)),
        "temporary bytes": memory.temp_size_in_bytes,
        "bytes not aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "kernels": kernels,
        "copied": _tpu.moved(text, _LEAST_COPIED, "copy|transpose|copy-start"),
    }


def is_as_it_must_be(row: dict[str, Any], chip: str) -> bool:
    leaves = len(row["shapes"])
    # For v5p, the compiler has as much for each kernel, whatever is in it.
    most = 200_000 * row["kernels"] if chip == "v5p" else 2**16
    return (
        not row["excess bytes"]
        and not row["copied"]
        and row["temporary bytes"] <= most
        # The table of results, and the count of steps.
        and row["bytes not aliased"] <= 1024 + 64 * leaves
    )


def survey(setting: Setting, shapes: list[Shape]) -> list[dict[str, Any]]:
    """Of leaves that are one program; those of single leaves where something is not as
    it must be."""
    try:
        row = compile_leaves(setting, shapes)
    except Exception as error:
        row = {"shapes": shapes, "error": f"{type(error).__name__}: {error}"[:500]}
    if "error" not in row and is_as_it_must_be(row, setting.chip):
        return []
    if len(shapes) == 1:
        print(f"    {setting}: {row}", flush=True)
        return [dataclasses.asdict(setting) | row]
    middle = len(shapes) // 2
    halves = shapes[:middle], shapes[middle:]
    found = [row for half in halves for row in survey(setting, half)]
    # What no leaf does alone.
    return found or [dataclasses.asdict(setting) | row]


def main() -> None:
    parser = Parser(__doc__)
    every = lambda names: {"type": partial(some_of, names), "default": [*names][:1]}
    parser.add_argument("--chips", **every(_CHIPS))
    parser.add_argument("--optimizers", **every(OPTIMIZERS))
    parser.add_argument("--dtypes", **every(["bfloat16", "float32"]))
    parser.add_argument("--shapes", type=positive_integer, default=1000)
    parser.add_argument("--leaves", type=positive_integer, default=20, help="a program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_json()
    arguments = parser.parse_args()
    _tpu.set_up()
    there = versions("jax", "jaxlib", "libtpu", "flashquinox")
    print(", ".join(f"{k} {v}" for k, v in there.items()))
    shapes = random_shapes(arguments.seed, arguments.shapes)
    parts = range(0, len(shapes), arguments.leaves)
    rows, counts = [], {}
    settings = itertools.product(
        arguments.chips, arguments.optimizers, arguments.dtypes
    )
    for setting in itertools.starmap(Setting, settings):
        start, found = time.perf_counter(), []
        for first in parts:
            found += survey(setting, shapes[first : first + arguments.leaves])
        rows += found
        seconds = time.perf_counter() - start
        name = f"{setting.chip} {setting.optimizer} {setting.dtype}"
        counts[name] = len(found)
        print(
            f"{name}: {len(shapes)} shapes, {len(found)} not as they must be"
            f" ({seconds:.0f} s)",
            flush=True,
        )
    write_json(
        arguments.json, versions=there, shapes=len(shapes), counts=counts, rows=rows
    )


if __name__ == "__main__":
    run_main(main)
