"""Kernels that copy parts of arrays between host memory and a TPU's own.

XLA copies parts of arrays in host memory by itself, but those of 8-bit integers only if
their tiles have 8 rows. Where the rows of such an array are a multiple of 32, its tiles
have 32: XLA then brings the whole array into the other order first, and back after it.

One kernel begins copies, and another one waits for them. What is computed in between
runs beside them. So that nothing else happens to an array that is on its way:

- what is written to is an operand of both kernels, and their result, in its place;
- what is read is an operand of both;
- parts stay in the device's main memory (`HBM`), from which XLA moves nothing;
- kernels with results in host memory have no others, as XLA would take these to be
  there too. So semaphores of writes come from a kernel of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..._storage.tpu_memory import Axes, memory_order, TILE_ROWS


Arrays = list[Array]

_HOST = pl.BlockSpec(memory_space=jax.memory.Space.Host)
_DEVICE = pl.BlockSpec(memory_space=pltpu.HBM)
_NUMBER = pl.BlockSpec(memory_space=pltpu.SMEM)
_SEMAPHORES = pl.BlockSpec(memory_space=pltpu.SEMAPHORE)


def start_reads(start: Arrays, arrays: Arrays, *, first: int, length: int) -> list[Any]:
    """Begins to read a part of each array: so much of the first axis, from `first` or,
    if there is one, from the number in `start`. Returns what it is read to, and
    semaphores."""
    lying, count = _lying(arrays), len(arrays)

    def kernel(*refs: Any) -> None:
        number, refs = _number(start, first, refs)
        semaphores = refs[2 * count]
        for i in range(count):
            part = _part(refs[i], number, length)
            pltpu.make_async_copy(part, refs[count + i], semaphores.at[i]).start()

    *parts, semaphores = _call(
        kernel,
        "start_reads",
        [*_numbers(start), *[(x, _HOST) for x in lying]],
        [
            *[(pltpu.HBM((length, *x.shape[1:]), x.dtype), _DEVICE) for x in lying],
            (_semaphores_of(arrays), _SEMAPHORES),
        ],
    )
    return [_standing(x, _order(y)) for x, y in zip(parts, arrays, strict=True)] + [
        semaphores
    ]


def finish_reads(arrays: Arrays, parts: Arrays, semaphores: Any) -> list[Any]:
    """Waits for what was begun. Returns the parts."""
    count = len(arrays)

    def kernel(*refs: Any) -> None:
        arrays, semaphores = refs[:count], refs[2 * count]
        for i, part in enumerate(refs[2 * count + 1 :]):
            copy = pltpu.make_async_copy(
                _part(arrays[i], 0, part.shape[0]), part, semaphores.at[i]
            )
            copy.wait()

    lying = _lying(parts, arrays)
    new = _call(
        kernel,
        "finish_reads",
        [
            *[(x, _HOST) for x in _lying(arrays)],
            *[(x, _DEVICE) for x in lying],
            (semaphores, _SEMAPHORES),
        ],
        [(pltpu.HBM(x.shape, x.dtype), _DEVICE) for x in lying],
        aliases={count + i: i for i in range(count)},
    )
    return [_standing(x, _order(y)) for x, y in zip(new, arrays, strict=True)]


def make_semaphores(arrays: Arrays) -> list[Any]:
    """Semaphores for copies of parts of as many arrays."""
    kernel = lambda *_: None
    return _call(kernel, "semaphores", [], [(_semaphores_of(arrays), _SEMAPHORES)])


def start_writes(
    start: Arrays, arrays: Arrays, parts: Arrays, semaphores: Any, *, first: int
) -> list[Any]:
    """Begins to write parts of the arrays. Returns the arrays."""
    count = len(arrays)

    def kernel(*refs: Any) -> None:
        number, refs = _number(start, first, refs)
        parts, semaphores = refs[count : 2 * count], refs[2 * count]
        for i, array in enumerate(refs[2 * count + 1 :]):
            place = _part(array, number, parts[i].shape[0])
            pltpu.make_async_copy(parts[i], place, semaphores.at[i]).start()

    return _write(kernel, "start_writes", _numbers(start), arrays, parts, semaphores)


def finish_writes(arrays: Arrays, parts: Arrays, semaphores: Any) -> list[Any]:
    """Waits for what was begun. Returns the arrays."""
    count = len(arrays)

    def kernel(*refs: Any) -> None:
        parts, semaphores = refs[count : 2 * count], refs[2 * count]
        for i, array in enumerate(refs[2 * count + 1 :]):
            copy = pltpu.make_async_copy(
                parts[i], _part(array, 0, parts[i].shape[0]), semaphores.at[i]
            )
            copy.wait()

    return _write(kernel, "finish_writes", [], arrays, parts, semaphores)


def tie(arrays: Arrays, after: Arrays) -> list[Any]:
    """The same arrays, all of them once each is computed, and these others are."""
    lying = [jnp.transpose(x, _order(x)) for x in arrays]
    new = _call(
        lambda *_: None,
        "tie",
        [*[(x, _HOST) for x in lying], *[(x, _DEVICE) for x in after]],
        [(jax.typeof(x), _HOST) for x in lying],
        aliases={i: i for i in range(len(arrays))},
    )
    return [_standing(x, _order(y)) for x, y in zip(new, arrays, strict=True)]


def _write(
    kernel: Callable[..., None],
    name: str,
    first: list[tuple[Any, Any]],
    arrays: Arrays,
    parts: Arrays,
    semaphores: Any,
) -> list[Any]:
    lying = _lying(arrays)
    on_device = [
        pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in _lying(parts, arrays)
    ]
    new = _call(
        kernel,
        name,
        [
            *first,
            *[(x, _HOST) for x in lying],
            *[(x, _DEVICE) for x in on_device],
            (semaphores, _SEMAPHORES),
        ],
        [(jax.typeof(x), _HOST) for x in lying],
        aliases={len(first) + i: i for i in range(len(arrays))},
    )
    return [_standing(x, _order(y)) for x, y in zip(new, arrays, strict=True)]


def _call(
    kernel: Callable[..., None],
    name: str,
    operands: Sequence[tuple[Any, Any]],
    results: Sequence[tuple[Any, Any]],
    aliases: dict[int, int] | None = None,
) -> list[Any]:
    """A kernel of these operands and results, each with where it is."""
    new = pl.pallas_call(
        kernel,
        out_shape=[x for x, _ in results],
        in_specs=[spec for _, spec in operands],
        out_specs=[spec for _, spec in results],
        input_output_aliases=aliases or {},
        # XLA neither repeats nor removes them.
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
        name=f"flashquinox_{name}",
    )(*[x for x, _ in operands])
    return list(new)


def _semaphores_of(arrays: Arrays) -> Any:
    return pltpu.SemaphoreType.DMA((len(arrays),))


def _numbers(start: Arrays) -> list[tuple[Any, Any]]:
    return [(x.reshape(1), _NUMBER) for x in start]


def _number(start: Arrays, first: int, refs: Any) -> tuple[Any, Any]:
    """Where parts begin, and the other references of a kernel."""
    return (refs[0][0], refs[1:]) if start else (first, refs)


def _part(ref: Any, start: Any, length: int) -> Any:
    """So much of the first axis. Where that is an axis of rows, parts are whole tiles:
    see `needs_kernels`."""
    if len(ref.shape) == 2 and not isinstance(start, int):
        start = pl.multiple_of(start, TILE_ROWS)
    return ref.at[pl.ds(start, length)]


#
# Arrays with their axes in the order of memory: transpositions that move nothing
#


def _order(array: Array) -> Axes:
    return memory_order(array.shape, array.dtype.itemsize)


def _lying(arrays: Arrays, like: Arrays | None = None) -> Arrays:
    """In the order of these arrays or, of parts of arrays, of those."""
    pairs = zip(arrays, like or arrays, strict=True)
    return [jnp.transpose(x, _order(y)) for x, y in pairs]


def _standing(x: Array, order: Axes) -> Array:
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(x, inverse)
