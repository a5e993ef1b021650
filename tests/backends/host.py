"""The kernels for GPUs on CPUs: their programs, compiled by the C++ compiler that there
is, in which one thread has a whole group."""

import ctypes
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from flashquinox._backends import platforms
from flashquinox._backends.base import Update
from flashquinox._backends.cpp.view import View
from flashquinox._backends.cpu import compiler
from flashquinox._backends.gpu.backend import Gpu
from flashquinox._backends.gpu.kernel import update_leaves
from flashquinox._backends.gpu.source import Kernel
from flashquinox._backends.gpu.threads import THREADS, Threads
from flashquinox._common import memory

from ..kernels import has_cpp_compiler


class HostGpu(Gpu):
    """Interpreted on devices of other platforms."""

    is_interpreted: ClassVar[bool] = has_cpp_compiler

    def load(self) -> Update:
        def update(*args: Any, interpret: bool = False) -> Any:
            if interpret:
                return update_leaves(_run, _whole_groups, *args)
            return super(HostGpu, self).load()(*args)

        return update


def install() -> None:
    """From now on, `backend="gpu"` is this one."""
    others, ours = platforms.named, HostGpu()
    platforms.named = lambda name: ours if name == "gpu" else others(name)


def _whole_groups(views: Sequence[View]) -> Threads:
    return Threads(views[0].group_size, 1)


def _run(kernel: Kernel, *operands: jax.Array) -> list[jax.Array]:
    states = kernel.states(len(operands))
    # Those that XLA knows as results.
    known = [i for i in states if not memory.is_on_host(operands[i])]
    first = kernel.own_results(operands)
    assert len(known) + len(first) == max(1, kernel.results)

    def launch(*values: Any) -> list[np.ndarray]:
        # Kernels write where they have read.
        arrays = [np.array(x) for x in values]
        stack = [np.empty(x.shape, x.dtype) for x in first]
        every = [*arrays, *stack, *[arrays[i] for i in known]]
        pointers = [x.ctypes.data for x in every]
        arguments = (ctypes.c_void_p * len(pointers))(*pointers)
        blocks = kernel.blocks * kernel.members
        _compiled(kernel.source, kernel.name).launch(arguments, blocks, THREADS)
        return stack + [arrays[i] for i in states]

    results = first + [
        jax.ShapeDtypeStruct(operands[i].shape, operands[i].dtype) for i in states
    ]
    new = jax.pure_callback(launch, results, *memory.to_device(operands))
    stack, new = list(new[: len(first)]), list(new[len(first) :])
    stack = [] if kernel.fresh is None else stack
    return stack + memory.where(new, [operands[i] for i in states])


@functools.cache
def _compiled(source: str, name: str) -> ctypes.CDLL:
    """Compiled by the first process that needs it."""
    shim = pathlib.Path(__file__).with_name("host.h").read_text(encoding="utf-8")
    backends = pathlib.Path(platforms.__file__).parent
    ours, conversions = [
        (backends / "cpu" / name).read_text(encoding="utf-8")
        for name in ("host.h", "program.h")
    ]
    launch = f"""
extern "C" __attribute__((visibility("default")))
void launch(void** arguments, unsigned blocks, unsigned threads) {{
  launch_all({name}, arguments, blocks, threads);
}}
"""
    prelude, head, body = source.partition('\nextern "C"')
    text = "".join([ours, shim, prelude, conversions, head, body, launch])
    return compiler.loaded(text, compiler.name_of(text))
