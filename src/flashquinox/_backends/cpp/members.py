"""Kernels of the models of an ensemble."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from ..._common import memory


# What is known of a kernel: a `NamedTuple` with, among others, `members`, how many
# models take a step together, and `strides`: of each array of words, how far apart
# those of the models are, or 0 where they share them.
Kernel: TypeAlias = Any
# What runs a kernel, of its arguments: words, then arrays, in which the models lie one
# after the other. It returns the new arrays.
Run: TypeAlias = Callable[..., Sequence[Shaped[Array, "..."]]]


@functools.lru_cache(maxsize=1024)
def launched(run: Run, kernel: Kernel, away: Any = None) -> Run:
    """`run` for a kernel. Under `vmap`, that is one kernel for all models.

    `away` takes the place of that if any operand is in host memory.
    """

    @jax.custom_batching.custom_vmap
    def launch(*args: Array) -> Sequence[Array]:
        return run(kernel, *args)

    @launch.def_vmap
    def _(size: int, is_mapped: Sequence[bool], *args: Array) -> Any:
        if away is not None and memory.any_on_host(args):
            return away(kernel, run, size, is_mapped, args)
        inner = (kernel.members,) if kernel.members > 1 else ()
        words, arrays = len(kernel.strides), len(args) - len(kernel.strides)
        # Words are shared until they are mapped; arrays are each model's own.
        before = [x > 0 for x in kernel.strides] + [kernel.members > 1] * arrays
        own = [x or y for x, y in zip(before, is_mapped, strict=True)]
        own = own[:words] + [True] * arrays
        members = []
        for x, is_own, was_own, mapped in zip(
            args, own, before, is_mapped, strict=True
        ):
            if is_own:
                x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
                if inner and not was_own:
                    shape = size, *inner, *x.shape[1:]
                    x = jnp.broadcast_to(x[:, None], shape)
                if inner:
                    x = x.reshape(-1, *x.shape[2:])
            members.append(x)
        strides = [
            x.shape[-1] if y else 0
            for x, y in zip(members[:words], own[:words], strict=True)
        ]
        joined = kernel._replace(members=size * kernel.members, strides=tuple(strides))
        new = launched(run, joined, away)(*members)
        new = [x.reshape(size, *inner, *x.shape[1:]) for x in new]
        return new, [True] * len(new)

    return launch
