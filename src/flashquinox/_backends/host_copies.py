"""Copies of layers between host memory and a device that the device's own kernels make,
because XLA would copy whole stacks. They run beside what is computed between their
beginning and their end.

A layer that is read and one that is written at the same time must not be the same.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Int32, ScalarLike

from .. import _compat
from .._common import memory
from .._storage.tpu_memory import memory_order, TILE_ROWS


Arrays = list[Array]


class Reads(NamedTuple):
    """Layers that are being read."""

    parts: Arrays
    semaphores: Any


class Writes(NamedTuple):
    """Layers that are being written."""

    parts: Arrays
    semaphores: Any


def needs_kernels(stack: Array) -> bool:
    """Whether kernels copy the layers of an array in host memory, in programs for the
    device that is traced for. See `tpu/host_copies.py`."""
    if not (
        memory.is_on_host(stack)
        and _compat.traced_device().platform == "tpu"
        # Kernels of earlier versions take no arrays in host memory.
        and jax.__version_info__ >= (0, 11)
        and stack.ndim > 2
        and stack.dtype.itemsize == 1
    ):
        return False
    order = memory_order(stack.shape, stack.dtype.itemsize)
    return order[0] == 0 and stack.shape[order[-2]] % TILE_ROWS == 0


def start_reads(layer: ScalarLike, stacks: Arrays) -> tuple[Arrays, Reads]:
    """Begins to read a layer of each stack, before anything is written to these."""
    *parts, semaphores = _calls().start_reads(jnp.int32(layer), stacks)
    stacks, parts, semaphores = lax.optimization_barrier((stacks, parts, semaphores))
    return stacks, Reads(parts, semaphores)


def finish_reads(stacks: Arrays, reads: Reads) -> tuple[Arrays, Arrays]:
    """The stacks, and the layers that were read."""
    parts = _calls().finish_reads(stacks, reads.parts, reads.semaphores)
    return lax.optimization_barrier((stacks, parts))


def start_writes(
    layer: ScalarLike, stacks: Arrays, parts: Arrays
) -> tuple[Arrays, Writes]:
    """Begins to write a layer of each stack."""
    (semaphores,) = _calls().make_semaphores(stacks)
    parts = lax.optimization_barrier(parts)
    layer = jnp.int32(layer)
    stacks = _calls().start_writes(layer, stacks, parts, semaphores)
    return stacks, Writes(parts, semaphores)


def finish_writes(stacks: Arrays, writes: Writes) -> Arrays:
    return _calls().finish_writes(stacks, writes.parts, writes.semaphores)


class _Calls(NamedTuple):
    start_reads: _compat.KernelCall
    finish_reads: _compat.KernelCall
    make_semaphores: _compat.KernelCall
    start_writes: _compat.KernelCall
    finish_writes: _compat.KernelCall


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
            )
            for name in _Calls._fields
        ]
    )


class _Elsewhere:
    """The same in programs that are traced for a TPU and compiled for another platform:
    all is copied at the beginning. Semaphores are `None`."""

    def start_reads(self, layer: Int32[Array, ""], stacks: Arrays) -> list[Any]:
        parts = [lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in stacks]
        return [*memory.to_device(parts), None]

    def finish_reads(self, stacks: Arrays, parts: Arrays, semaphores: Any) -> Arrays:
        del stacks, semaphores
        return parts

    def make_semaphores(self, stacks: Arrays) -> list[None]:
        del stacks
        return [None]

    def start_writes(
        self, layer: Int32[Array, ""], stacks: Arrays, parts: Arrays, semaphores: Any
    ) -> Arrays:
        del semaphores
        update = lambda x, y: lax.dynamic_update_index_in_dim(x, y, layer, 0)
        return [
            update(x, memory.where(y, x)) for x, y in zip(stacks, parts, strict=True)
        ]

    def finish_writes(self, stacks: Arrays, parts: Arrays, semaphores: Any) -> Arrays:
        del parts, semaphores
        return stacks
