"""Arrays in host memory that kernels for GPUs read and write over PCIe.

The results of one custom call are in one memory: XLA takes them all to be in that of
its operands. So a kernel of weights on the device and moments in host memory has the
weights alone as results. What it does to the moments, kernels that do nothing tell XLA:
one before it and one after it, each of which has the moments as operands and, in the
same memory, as results.

- Of arrays that the caller keeps, XLA makes a copy for the first one, and the kernel
  between them gets that. It is the only reader of what the first one gives.
- The second one waits for a result of the kernel, and everything that uses the new
  arrays waits for the second one.
"""

from collections.abc import Sequence

from jaxtyping import Array, Shaped

from ..._common import memory
from .launch import Launch, launch


def renewed(
    arrays: Sequence[Shaped[Array, "..."]], after: Sequence[Shaped[Array, "..."]] = ()
) -> list[Shaped[Array, "..."]]:
    """The same arrays, in the same memory, as XLA shall see them from here on: once
    those of `after` are computed."""
    if not arrays:
        return []
    pointers = 2 * len(arrays) + len(after)
    arguments = ", ".join(f"void* p{i}" for i in range(pointers))
    name = "flashquinox_host_arrays"
    source = f'extern "C" __global__ void {name}({arguments}) {{}}\n'
    aliases = {i: i for i in range(len(arrays))}
    new = launch(Launch(name, source, 1, 1), [*arrays, *after], aliases)
    return memory.to_host(list(new))
