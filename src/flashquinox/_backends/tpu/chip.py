"""What a kernel needs to know of the TPU that it is traced for."""

import dataclasses

from jax.experimental.pallas import tpu as pltpu

from ..interpreter.arithmetic import Arithmetic
from .arithmetic import arithmetic_of


@dataclasses.dataclass(frozen=True)
class Chip:
    """Where the generation is not known, as when a program is compiled on another
    machine and no abstract mesh tells, this is what works on all."""

    arithmetic: Arithmetic
    vmem_limit: int
    # The bytes of the blocks of all operands together, each in two buffers.
    block_bytes: int

    @staticmethod
    def current() -> "Chip":
        try:
            info = pltpu.get_tpu_info()
        except ValueError:
            return Chip(arithmetic_of(None), 16 * 2**20, 10 * 2**20)
        capacity = info.vmem_capacity_bytes
        # The rest is for XLA, and for the compiler's own use.
        limit = capacity if capacity <= 16 * 2**20 else capacity * 3 // 4
        return Chip(arithmetic_of(info.generation), limit, limit * 5 // 8)
