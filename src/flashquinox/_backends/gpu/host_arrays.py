"""Arrays in host memory that kernels for GPUs read and write over PCIe.

The results of one custom call are in one memory: XLA takes them all to be in that of
its operands. So a kernel of weights on the device and moments in host memory has the
weights alone as results. What it does to the moments, two kernels tell XLA, each of
which has the moments as operands and, in the same memory, as results:

- `lend`: of arrays that the caller keeps, XLA makes a copy for it, and the kernel
  between gets that. It is the only other reader of what `lend` gives.
- `give_back` waits for a result of the kernel, and everything that uses the new arrays
  waits for it. Until then they are in use, so that XLA puts nothing else there.

XLA might still move the arrays in between, as it does not know that they are written
to. So `give_back` compares their addresses with those that they had after `lend`. If
they differ, the program ends with an error of CUDA's, and no update is lost in silence.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from ..._common import memory
from . import nvrtc
from .launch import Launch, launch


# What kernels see of an address, and how many 32-bit words XLA sees of it: JAX may have
# no 64-bit types.
_ADDRESS, _WORDS = "unsigned long long", 2


def lend(
    arrays: Sequence[Shaped[Array, "..."]],
) -> tuple[list[Shaped[Array, "..."]], Int32[Array, " words"] | None]:
    """The same arrays for a kernel that changes them, and their addresses."""
    if not arrays:
        return [], None
    opened = _renewed("flashquinox_lend", "", arrays, [])
    name = "flashquinox_addresses"
    body = " ".join([f"to[{i}] = ({_ADDRESS})p{i};" for i in range(len(arrays))])
    source = _source(name, [*_pointers(len(arrays)), f"{_ADDRESS}* to"], body)
    like = jax.ShapeDtypeStruct((_WORDS * len(arrays),), jnp.int32)
    kernel = Launch(name, source, 1, 1)
    # Two of them at different times would be of different arrays.
    (addresses,) = launch(kernel, opened, {}, fresh={0: like}, writes_operands=True)
    return opened, addresses


def give_back(
    arrays: Sequence[Shaped[Array, "..."]],
    addresses: Int32[Array, " words"] | None,
    after: Sequence[Shaped[Array, "..."]],
) -> list[Shaped[Array, "..."]]:
    """The arrays that `lend` gave, as XLA shall see them from here on: once those of
    `after` are computed."""
    if addresses is None:
        return []
    moved = [f"from[{i}] != ({_ADDRESS})p{i}" for i in range(len(arrays))]
    body = f"if ({' || '.join(moved)}) __trap();"
    return _renewed("flashquinox_give_back", body, arrays, [addresses, *after])


def _renewed(
    name: str,
    body: str,
    arrays: Sequence[Shaped[Array, "..."]],
    others: Sequence[Shaped[Array, "..."]],
) -> list[Shaped[Array, "..."]]:
    numbers = range(len(others))
    kinds = [f"const {_ADDRESS}* from" if i == 0 else f"void* o{i}" for i in numbers]
    results = [f"void* q{i}" for i in range(len(arrays))]
    source = _source(name, [*_pointers(len(arrays)), *kinds, *results], body)
    aliases = {i: i for i in range(len(arrays))}
    new = launch(Launch(name, source, 1, 1), [*arrays, *others], aliases)
    return memory.to_host(list(new))


def _pointers(number: int) -> list[str]:
    return [f"void* p{i}" for i in range(number)]


def _source(name: str, parameters: Sequence[str], body: str) -> str:
    return f'extern "C" __global__ void {name}({", ".join(parameters)}) {{{body}}}\n'


def clear_if(
    flag: Int32[Array, ""],
    arrays: Sequence[Shaped[Array, "..."]],
    after: Shaped[Array, "..."],
) -> list[Shaped[Array, "..."]]:
    """Zeros in the place of these arrays, if a flag is not zero, once `after` is
    computed."""
    found: list[Shaped[Array, "..."]] = []
    most = nvrtc.most_pointers() // 2 - 2
    for first in range(0, len(arrays), most):
        here = arrays[first : first + most]
        body = "if (*flag == 0) return;"
        for i, x in enumerate(here):
            size = x.size * x.dtype.itemsize
            body += f" clear((char*)p{i}, {size}ull);"
        numbers = range(len(here))
        parameters = [*_pointers(len(here)), "const int* flag", "void* after"]
        parameters += [f"void* q{i}" for i in numbers]
        name = "flashquinox_clear"
        kernel = Launch(name, _CLEAR + _source(name, parameters, body), 256, 128)
        new = launch(kernel, [*here, flag, after], {i: i for i in numbers})
        found += memory.to_host(list(new))
    return found


# Arrays begin at multiples of 16 bytes.
_CLEAR = """
__device__ void clear(char* to, unsigned long long size) {
  const unsigned long long first = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned long long threads = gridDim.x * blockDim.x;
  for (unsigned long long i = first; i < size / 16; i += threads)
    ((int4*)to)[i] = make_int4(0, 0, 0, 0);
  for (unsigned long long i = size / 16 * 16 + first; i < size; i += threads)
    to[i] = 0;
}
"""
