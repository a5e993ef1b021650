"""Kernels as custom calls of XLA, which loads them and puts addresses into their
arguments."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Shaped

from . import nvrtc


class Launch(NamedTuple):
    """A program in CUDA C++, and the threads that run it."""

    name: str
    source: str
    blocks: int
    threads: int


def launch(
    kernel: Launch,
    operands: Sequence[Shaped[Array, "..."]],
    aliases: Mapping[int, int],
    fresh: Mapping[int, jax.ShapeDtypeStruct] = MappingProxyType({}),
    writes_operands: bool = False,
) -> Sequence[Shaped[Array, "..."]]:
    """Runs a kernel, whose results are operands that it changes: `aliases` are the
    numbers of these operands, and those of the results. `fresh` are results in memory
    of their own. `writes_operands`: it also changes operands that are no results, so
    that it must run once and no more."""
    likes: dict[int, Any] = dict(fresh)
    likes |= {result: operands[number] for number, result in aliases.items()}
    results = [likes[i] for i in range(len(likes))]
    call = jax.ffi.ffi_call(
        "__gpu$xla.gpu.ptx",
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        input_output_aliases=dict(aliases),
        has_side_effect=writes_operands,
    )
    return call(
        *operands,
        name=kernel.name,
        kernel_type="ptx",
        kernel_data=nvrtc.compiled(kernel.source).decode(),
        grid_x=kernel.blocks,
        grid_y=1,
        grid_z=1,
        block_x=kernel.threads,
        block_y=1,
        block_z=1,
        shared_mem_bytes=0,
        output_indices=tuple(range(len(operands), len(operands) + len(results))),
    )
