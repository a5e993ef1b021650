"""The C++ compiler of this machine, and the programs that it has compiled."""

import contextlib
import ctypes
import functools
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import threading

import jax

from ..cpp import disk_cache


_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    "-std=c++17",
    # Vectors alone: with `-O2`, AdamW takes half as long again to compile, and with
    # `-O3` twice as long, and no step is faster (4096 x 4096, GCC 12, a Xeon).
    "-O1",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    # For this machine alone: `_machine` is a part of the names of files.
    "-mcpu=native" if platform.machine() == "arm64" else "-march=native",
    # A product and a sum are one operation, as XLA and GPUs have them. No function
    # sets `errno`, and no operation traps: else compilers make no vectors of them.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-w",
)
_HANDLER = "flashquinox_step"
_lock = threading.Lock()
_libraries: dict[str, ctypes.CDLL] = {}


class CompilationError(Exception):
    """The text is what the compiler said."""


@functools.cache
def command() -> tuple[str, ...]:
    """How to call the compiler.

    **Raises:**

    `ImportError` if it is not there.
    """
    if sys.platform not in ("linux", "darwin"):
        raise ImportError(f"there are no programs for {sys.platform}")
    chosen = os.environ.get("CXX")
    for text in (chosen,) if chosen else _COMPILERS:
        name, *arguments = shlex.split(text)
        found = shutil.which(name)
        if found is not None:
            return found, *arguments, *_FLAGS, f"-I{jax.ffi.include_dir()}"
    raise ImportError(f"no {chosen or ' or '.join(_COMPILERS)} on PATH")


def target_of(source: str) -> str:
    """The name of the custom call that runs a program.

    **Raises:**

    `CompilationError` if the compiler refuses it.
    """
    head = f'#define NAME {_HANDLER}\n#include "xla/ffi/api/c_api.h"\n'
    name = name_of(head + source)
    # XLA takes one function of a name, as long as the process lives.
    with _lock:
        if name not in _libraries:
            library = loaded(head + source, name)
            handler = jax.ffi.pycapsule(getattr(library, _HANDLER))
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
            _libraries[name] = library
    return name


def name_of(text: str) -> str:
    """The name of a program: another one for each text, compiler and machine."""
    return disk_cache.name_of("step", text, _header(), *command(), _machine())


def loaded(text: str, name: str) -> ctypes.CDLL:
    """A program, compiled by the first process that needs it.

    **Raises:**

    `CompilationError` if the compiler refuses it.
    """
    make = functools.partial(_compile, text)
    try:
        return disk_cache.cached(name, ".so", make, lambda path: ctypes.CDLL(str(path)))
    except OSError as error:
        raise CompilationError(str(error)) from error


def _compile(text: str, made: pathlib.Path) -> None:
    # Where compilers look for the linker, even if nothing is set.
    path = {"PATH": os.environ.get("PATH", os.defpath)}
    done = subprocess.run(
        [*command(), "-x", "c++", "-", "-o", str(made)],
        input=text.encode(),
        capture_output=True,
        env=os.environ | path,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").splitlines()
        errors = [line for line in said if "error" in line]
        raise CompilationError((errors or said or ["it failed"])[0])


@functools.cache
def _header() -> str:
    """What XLA's custom calls are, in this version of it."""
    path = pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    return path.read_text(encoding="utf-8")


@functools.cache
def _machine() -> str:
    """What a compiled program runs on: the processor with its instructions."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        if sys.platform == "darwin":
            # It fails where it does not know all of them.
            asked = ["sysctl", "machdep.cpu", "hw.optional"]
            done = subprocess.run(asked, capture_output=True, text=True)
            lines = done.stdout.splitlines()
        else:
            text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
            names = ("model name", "flags", "Features", "CPU part")
            lines = sorted({x for x in text.splitlines() if x.startswith(names)})
    return "\n".join([platform.platform(), platform.processor(), *lines])
