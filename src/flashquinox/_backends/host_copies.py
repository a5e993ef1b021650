"""Copies of parts of arrays between host memory and a device that the device's own
kernels make, because XLA would copy whole arrays. They run beside what is computed
between their beginning and their end.

A part has some of the first axis. Parts that are read and written at the same time must
not overlap.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, ScalarLike

from .. import _compat
from .._common import memory
from .._storage.tpu_memory import memory_order, TILE_ROWS


Arrays = list[Array]


class Reads(NamedTuple):
    """Parts that are being read."""

    parts: Arrays
    semaphores: Any


class Writes(NamedTuple):
    """Parts that are being written."""

    parts: Arrays
    semaphores: Any


def needs_kernels(array: Array, unit: int) -> bool:
    """Whether kernels copy parts of an array in host memory, in programs for the device
    that is traced for. Where parts begin and how long they are is a multiple of `unit`.
    See `tpu/host_copies.py`."""
    if not (array.dtype.itemsize == 1 and _can_be_operand(array)):
        return False
    order = memory_order(array.shape, array.dtype.itemsize)
    return order[0] == 0 and (array.ndim > 2 or unit % TILE_ROWS == 0)


def _can_be_operand(array: Array) -> bool:
    """Whether kernels take an array in host memory as it is, in programs for the device
    that is traced for."""
    if not (
        isinstance(array, jax.core.Tracer)
        and memory.is_on_host(array)
        and _compat.traced_device().platform == "tpu"
        # Kernels of earlier versions take no arrays in host memory.
        and jax.__version_info__ >= (0, 11)
        and array.ndim > 1
    ):
        return False
    rows = array.shape[memory_order(array.shape, array.dtype.itemsize)[-2]]
    return rows % (TILE_ROWS // array.dtype.itemsize) == 0


def in_order(arrays: Arrays, after: Arrays) -> Arrays:
    """The same arrays in host memory. What uses one of them waits for all of them, and
    for these others, on the device.

    XLA for TPUs ignores barriers between copies, and would begin as many of them early
    as there is free memory for. It does not know what a kernel does with them. But an
    array that a kernel returns must be none that XLA writes slices of, or its compiler
    ends.
    """
    taken = [i for i, x in enumerate(arrays) if _can_be_operand(x)]
    if not taken:
        return arrays
    new = list(arrays)
    # Few bytes of each stand for it.
    after = [x.reshape(-1)[:1].astype(jnp.float32) for x in after]
    for i, x in zip(
        taken, _calls().tie([arrays[i] for i in taken], after), strict=True
    ):
        new[i] = x
    return new


def start_reads(start: ScalarLike, length: int, arrays: Arrays) -> tuple[Arrays, Reads]:
    """Begins to read a part of each array, before anything is written to these."""
    traced, first = _start(start)
    *parts, semaphores = _calls().start_reads(
        traced, arrays, first=first, length=length
    )
    arrays, parts, semaphores = lax.optimization_barrier((arrays, parts, semaphores))
    return arrays, Reads(parts, semaphores)


def finish_reads(arrays: Arrays, reads: Reads) -> tuple[Arrays, Arrays]:
    """The arrays, and the parts that were read."""
    parts = _calls().finish_reads(arrays, reads.parts, reads.semaphores)
    return lax.optimization_barrier((arrays, parts))


def start_writes(
    start: ScalarLike, arrays: Arrays, parts: Arrays
) -> tuple[Arrays, Writes]:
    """Begins to write a part of each array."""
    (semaphores,) = _calls().make_semaphores(arrays)
    parts = lax.optimization_barrier(parts)
    traced, first = _start(start)
    arrays = _calls().start_writes(traced, arrays, parts, semaphores, first=first)
    return arrays, Writes(parts, semaphores)


def finish_writes(arrays: Arrays, writes: Writes) -> Arrays:
    return _calls().finish_writes(arrays, writes.parts, writes.semaphores)


def _start(start: ScalarLike) -> tuple[Arrays, int]:
    """Where parts begin: a traced number, if it is one."""
    return ([], start) if isinstance(start, int) else ([jnp.int32(start)], 0)


class _Calls(NamedTuple):
    start_reads: _compat.KernelCall
    finish_reads: _compat.KernelCall
    make_semaphores: _compat.KernelCall
    start_writes: _compat.KernelCall
    finish_writes: _compat.KernelCall
    tie: _compat.KernelCall


@functools.cache
def _calls() -> _Calls:
    # Pallas is imported where it is needed.
    from .tpu import host_copies as kernels

    elsewhere = _Elsewhere()
    return _Calls(
        *[
            _compat.KernelCall(
                f"flashquinox_{name}",
                "tpu",
                getattr(kernels, name),
                getattr(elsewhere, name),
                _semaphores_like,
            )
            for name in _Calls._fields
        ]
    )


def _semaphores_like(aval: Any) -> Any:
    numbers = [jnp.int32(0)] * aval.shape[0]
    return _calls().make_semaphores(numbers)[0]


class _Elsewhere:
    """The same in programs that are traced for a TPU and compiled for another platform:
    all is copied at the beginning. Semaphores are `None`."""

    def tie(self, arrays: Arrays, after: Arrays) -> Arrays:
        del after
        return arrays

    def start_reads(
        self, start: Arrays, arrays: Arrays, *, first: int, length: int
    ) -> list[Any]:
        if start:
            parts = [lax.dynamic_slice_in_dim(x, start[0], length) for x in arrays]
        else:
            parts = [lax.slice_in_dim(x, first, first + length) for x in arrays]
        return [*memory.to_device(parts), None]

    def finish_reads(self, arrays: Arrays, parts: Arrays, semaphores: Any) -> Arrays:
        del arrays, semaphores
        return parts

    def make_semaphores(self, arrays: Arrays) -> list[None]:
        del arrays
        return [None]

    def start_writes(
        self,
        start: Arrays,
        arrays: Arrays,
        parts: Arrays,
        semaphores: Any,
        *,
        first: int,
    ) -> Arrays:
        del semaphores
        number = start[0] if start else first
        parts = [memory.where(x, y) for x, y in zip(parts, arrays, strict=True)]
        return [
            lax.dynamic_update_slice_in_dim(x, y, number, 0)
            for x, y in zip(arrays, parts, strict=True)
        ]

    def finish_writes(self, arrays: Arrays, parts: Arrays, semaphores: Any) -> Arrays:
        del parts, semaphores
        return arrays
