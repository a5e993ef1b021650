"""Kernels for GPUs, in CUDA C++: one for many leaves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int32, Scalar, Shaped

from ..._tile.tile import LeafScalars, StepScalars, StepStructure, TileState
from . import nvrtc, source
from .source import Kernel
from .translation import translation_of
from .view import THREADS, Threads, View


# What runs a kernel, of its arguments but for the new arrays, which it returns.
Run: TypeAlias = Callable[..., Sequence[Shaped[Array, "..."]]]


def update_leaves(
    run: Run,
    threads_of: Callable[[Sequence[View]], Threads],
    structure: StepStructure,
    views: tuple[View, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    """One step of leaves that are stored alike. See `AbstractBackend.load`."""
    words = _Words.of(scalars)
    kernel = Kernel(
        f"flashquinox_{type(structure.rule).__name__.lower()}",
        translation_of(structure, scalars, grads[0], old[0]),
        views,
        threads_of(views),
        words.scalars,
    )
    own = jnp.stack([_word(x) for x in jtu.tree_leaves(list(leaves))])
    arrays = [x.ravel() for x in jtu.tree_leaves(list(zip(grads, old, strict=True)))]
    new = _launched(run, kernel)(words.shared, own, *arrays)
    like, structure_of_all = jtu.tree_flatten(old)
    shaped = [x.reshape(y.shape) for x, y in zip(new, like, strict=True)]
    return structure_of_all.unflatten(shaped)


def most_leaves(arrays: int) -> int:
    """How many leaves share a kernel at most, of so many arrays each. Each launch takes
    time, but the arguments of a kernel are limited."""
    return (nvrtc.most_pointers() - 2) // (2 * arrays - 1)


class _Words(NamedTuple):
    """The scalars of a step in 32-bit words. They are one array: XLA would make every
    further one by another launch."""

    shared: Int32[Array, " words"]
    # What they are in terms of the words of all leaves, and of those of one.
    scalars: tuple[str, ...]

    @staticmethod
    def of(scalars: StepScalars) -> "_Words":
        width = len(jtu.tree_leaves(scalars.leaf))
        shared, texts = [], []
        for path, x in jtu.tree_leaves_with_path(scalars):
            if path[0] == jtu.GetAttrKey("leaf"):
                word = f"own[leaf * {width} + {len(texts) - len(shared)}]"
            else:
                word = f"shared[{len(shared)}]"
                shared.append(_word(x))
            texts.append(source.of_word(word, x.dtype))
        return _Words(jnp.stack(shared), tuple(texts))


def _word(x: Scalar) -> Int32[Array, ""]:
    """A scalar in 32 bits."""
    if x.dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.int32)
    return x.astype(jnp.int32)


@functools.lru_cache(maxsize=1024)
def _launched(run: Run, kernel: Kernel) -> Run:
    """`run` for a kernel. Under `vmap`, that is one kernel for all models."""

    @jax.custom_batching.custom_vmap
    def launch(*args: Array) -> Sequence[Array]:
        return run(kernel, *args)

    @launch.def_vmap
    def _(size: int, is_mapped: Sequence[bool], *args: Array) -> Any:
        inner = (kernel.members,) if kernel.members > 1 else ()
        strides = kernel.shared_stride, kernel.own_stride
        # Words are shared until they are mapped; arrays are each model's own.
        own = [bool(x) or y for x, y in zip(strides, is_mapped[:2], strict=True)]
        own += [True] * (len(args) - 2)
        before = [bool(x) for x in strides] + [kernel.members > 1] * (len(args) - 2)
        members = []
        for x, is_own, was_own, mapped in zip(
            args, own, before, is_mapped, strict=True
        ):
            if is_own:
                shape = x.shape[mapped:]
                x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
                if inner and not was_own:
                    x = jnp.broadcast_to(x[:, None], (size, *inner, *shape))
                x = x.reshape(-1, shape[-1])
            members.append(x)
        strides = [x.shape[-1] if y else 0 for x, y in zip(members, own, strict=True)]
        joined = kernel._replace(
            members=size * kernel.members,
            shared_stride=strides[0],
            own_stride=strides[1],
        )
        new = _launched(run, joined)(*members)
        new = [x.reshape(size, *inner, x.shape[-1]) for x in new]
        return new, [True] * len(new)

    return launch


def run_on_gpu(
    kernel: Kernel,
    shared: Int32[Array, "..."],
    own: Int32[Array, "..."],
    *arrays: Shaped[Array, "..."],
) -> Sequence[Shaped[Array, "..."]]:
    """Launches a kernel. XLA loads it and puts the addresses into its arguments."""
    width = len(kernel.translation.input_types)
    # Beside gradients.
    states = [i for i in range(len(arrays)) if i % width > 0]
    results = range(2 + len(arrays), 2 + len(arrays) + len(states))
    call = jax.ffi.ffi_call(
        "__gpu$xla.gpu.ptx",
        [jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in states],
        input_output_aliases={2 + i: j for j, i in enumerate(states)},
    )
    return call(
        shared,
        own,
        *arrays,
        name=kernel.name,
        kernel_type="ptx",
        kernel_data=nvrtc.compiled(kernel.source).decode(),
        grid_x=kernel.blocks * kernel.members,
        grid_y=1,
        grid_z=1,
        block_x=THREADS,
        block_y=1,
        block_z=1,
        shared_mem_bytes=0,
        output_indices=tuple(results),
    )
