"""CUDA C++ for NVIDIA's GPUs: one kernel for many leaves.

The tile function is traced once for leaves that are stored alike, and written as a
program in CUDA C++; NVIDIA's runtime compiler makes PTX of it, which XLA loads. That
needs nothing of JAX but custom calls.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.tree_util as jtu

from ..base import AbstractBackend, grouped, kind_of, LeafStep, Update
from ..cpp.view import View, view_of


class Gpu(AbstractBackend):
    name: ClassVar[str] = "gpu"
    platform: ClassVar[str] = "cuda"
    needs: ClassVar[str | None] = "libnvrtc"
    remedy: ClassVar[str] = (
        'Install NVIDIA\'s runtime compiler, as `pip install "jax[cuda13]"` does'
    )
    prefers_rows: ClassVar[bool] = False
    # Leaves are batched for it: a program for another platform would be worse.
    in_every_program: ClassVar[bool] = False
    is_interpreted: ClassVar[bool] = False
    is_portable: ClassVar[bool] = True
    reads_host_memory: ClassVar[bool] = True

    def load(self) -> Update:
        from . import nvrtc
        from .kernel import run_on_gpu, update_leaves
        from .threads import Threads

        nvrtc.load()
        return functools.partial(update_leaves, run_on_gpu, Threads.of)

    def serves(self, device: Any) -> bool:
        """The kernels need a compute capability of 8.0. Another GPU is a warning."""
        if isinstance(device, jax.sharding.AbstractDevice):
            return device.platform in ("gpu", "cuda")
        if device.platform != "gpu":
            return False
        # Of other makers, it is a name.
        capability = str(getattr(device, "compute_capability", ""))
        known = capability.replace(".", "").isdigit()
        if known and float(capability) >= 8:
            return True
        _warn_of_device(device.device_kind, capability)
        return False

    def view(self, step: LeafStep) -> View | None:
        return view_of(step)

    def batches(
        self, steps: Sequence[LeafStep], views: Sequence[Any]
    ) -> list[list[int]]:
        """Leaves that are stored alike share a kernel."""
        from .kernel import most_leaves

        kinds = []
        for step, view in zip(steps, views, strict=True):
            kind = kind_of(step), view.group_size, view.is_consecutive
            if step.structure.in_stack:
                kind = *kind, step.grad.shape
            kinds.append(kind)
        arrays = lambda i: len(jtu.tree_leaves((steps[i].grad, steps[i].old)))
        return grouped(kinds, lambda i: most_leaves(arrays(i), steps[i].structure))


@functools.cache
def _warn_of_device(kind: str, capability: str) -> None:
    warnings.warn(
        f"flashquinox: no kernels for the GPU {kind!r} (compute capability "
        f"{capability or 'unknown'}): they are for NVIDIA's, from 8.0 on. Steps take "
        "plain XLA: the same results, in more time and memory.",
        stacklevel=2,
    )


BACKEND = Gpu()
