"""Kernels that copy layers of stacks between host memory and a TPU's own.

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
from jaxtyping import Array, Int32

from ..._storage.tpu_memory import Axes, memory_order


Arrays = list[Array]

_HOST = pl.BlockSpec(memory_space=jax.memory.Space.Host)
_DEVICE = pl.BlockSpec(memory_space=pltpu.HBM)
_NUMBER = pl.BlockSpec(memory_space=pltpu.SMEM)
_SEMAPHORES = pl.BlockSpec(memory_space=pltpu.SEMAPHORE)


def start_reads(layer: Int32[Array, ""], stacks: Arrays) -> list[Any]:
    """Begins to read a layer of each stack. Returns what it is read to, and
    semaphores."""
    lying, count = _lying(stacks), len(stacks)

    def kernel(layer: Any, *refs: Any) -> None:
        semaphores = refs[2 * count]
        for i in range(count):
            part = refs[i].at[layer[0]]
            pltpu.make_async_copy(part, refs[count + i], semaphores.at[i]).start()

    *parts, semaphores = _call(
        kernel,
        "start_reads",
        [(layer.reshape(1), _NUMBER), *[(x, _HOST) for x in lying]],
        [
            *[(pltpu.HBM(x.shape[1:], x.dtype), _DEVICE) for x in lying],
            (_semaphores_of(stacks), _SEMAPHORES),
        ],
    )
    return [*_standing_parts(parts, stacks), semaphores]


def finish_reads(stacks: Arrays, parts: Arrays, semaphores: Any) -> list[Any]:
    """Waits for what was begun. Returns the parts."""
    count = len(stacks)

    def kernel(*refs: Any) -> None:
        stacks, semaphores = refs[:count], refs[2 * count]
        for i, part in enumerate(refs[2 * count + 1 :]):
            copy = pltpu.make_async_copy(stacks[i].at[0], part, semaphores.at[i])
            copy.wait()

    lying = _lying_parts(parts, stacks)
    new = _call(
        kernel,
        "finish_reads",
        [
            *[(x, _HOST) for x in _lying(stacks)],
            *[(x, _DEVICE) for x in lying],
            (semaphores, _SEMAPHORES),
        ],
        [(pltpu.HBM(x.shape, x.dtype), _DEVICE) for x in lying],
        aliases={count + i: i for i in range(count)},
    )
    return _standing_parts(new, stacks)


def make_semaphores(stacks: Arrays) -> list[Any]:
    """Semaphores for copies of as many stacks."""
    kernel = lambda *_: None
    return _call(kernel, "semaphores", [], [(_semaphores_of(stacks), _SEMAPHORES)])


def start_writes(
    layer: Int32[Array, ""], stacks: Arrays, parts: Arrays, semaphores: Any
) -> list[Any]:
    """Begins to write parts to a layer of each stack. Returns the stacks."""
    count = len(stacks)

    def kernel(layer: Any, *refs: Any) -> None:
        parts, semaphores = refs[count : 2 * count], refs[2 * count]
        for i, stack in enumerate(refs[2 * count + 1 :]):
            place = stack.at[layer[0]]
            pltpu.make_async_copy(parts[i], place, semaphores.at[i]).start()

    number = (layer.reshape(1), _NUMBER)
    return _write(kernel, "start_writes", [number], stacks, parts, semaphores)


def finish_writes(stacks: Arrays, parts: Arrays, semaphores: Any) -> list[Any]:
    """Waits for what was begun. Returns the stacks."""
    count = len(stacks)

    def kernel(*refs: Any) -> None:
        parts, semaphores = refs[count : 2 * count], refs[2 * count]
        for i, stack in enumerate(refs[2 * count + 1 :]):
            copy = pltpu.make_async_copy(parts[i], stack.at[0], semaphores.at[i])
            copy.wait()

    return _write(kernel, "finish_writes", [], stacks, parts, semaphores)


def _write(
    kernel: Callable[..., None],
    name: str,
    first: list[tuple[Any, Any]],
    stacks: Arrays,
    parts: Arrays,
    semaphores: Any,
) -> list[Any]:
    lying = _lying(stacks)
    on_device = [
        pltpu.with_memory_space_constraint(x, pltpu.HBM)
        for x in _lying_parts(parts, stacks)
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
        aliases={len(first) + i: i for i in range(len(stacks))},
    )
    return [_standing(x, _order(y)) for x, y in zip(new, stacks, strict=True)]


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


def _semaphores_of(stacks: Arrays) -> Any:
    return pltpu.SemaphoreType.DMA((len(stacks),))


#
# Arrays with their axes in the order of memory: transpositions that move nothing
#


def _order(stack: Array) -> Axes:
    order = memory_order(stack.shape, stack.dtype.itemsize)
    assert order[0] == 0
    return order


def _lying(stacks: Arrays) -> Arrays:
    return [jnp.transpose(x, _order(x)) for x in stacks]


def _lying_parts(parts: Arrays, stacks: Arrays) -> Arrays:
    pairs = zip(parts, stacks, strict=True)
    return [jnp.transpose(x, _of_part(_order(y))) for x, y in pairs]


def _standing_parts(parts: Arrays, stacks: Arrays) -> Arrays:
    pairs = zip(parts, stacks, strict=True)
    return [_standing(x, _of_part(_order(y))) for x, y in pairs]


def _standing(x: Array, order: Axes) -> Array:
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(x, inverse)


def _of_part(order: Axes) -> Axes:
    """That of one layer."""
    return tuple([axis - 1 for axis in order[1:]])
