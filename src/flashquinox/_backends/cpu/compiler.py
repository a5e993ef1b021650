"""The C++ compiler of this machine, and the programs that it has compiled.

They are kept on disk for all processes of a user: in the folder where JAX keeps what
XLA has compiled, if that is set, or else with the user's other caches.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

import jax


_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    "-std=c++17",
    # Vectors, without what takes as long to compile again (`-O3`), and makes steps no
    # faster.
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    # For this machine alone: `_machine` is a part of the names of files.
    "-march=native" if platform.machine() != "arm64" else "-mcpu=native",
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


class CompilationError(Exception):
    """The text is what the compiler said."""


def find() -> str:
    """The compiler.

    **Raises:**

    `ImportError` if it is not there.
    """
    if sys.platform not in ("linux", "darwin"):
        raise ImportError(f"there are none for {sys.platform}")
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise ImportError(f"no {chosen or ' or '.join(_COMPILERS)} on PATH")


@functools.lru_cache(maxsize=1024)
def target_of(source: str) -> str:
    """The name of the custom call that runs a program.

    **Raises:**

    `CompilationError` if the compiler refuses it.
    """
    text = "\n".join(
        [
            f"#define NAME {_HANDLER}",
            '#include "xla/ffi/api/c_api.h"',
            source,
        ]
    )
    described = "\0".join([text, _header(), *_command(), _machine()])
    key = hashlib.sha256(described.encode()).hexdigest()[:32]
    name = f"{_HANDLER}_{key}"
    handler = getattr(_loaded(text, name), _HANDLER)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def _loaded(text: str, name: str) -> ctypes.CDLL:
    errors = []
    for folder in _folders():
        library = folder / f"{name}.so"
        try:
            if not library.exists():
                _compile(text, library)
            return ctypes.CDLL(str(library))
        except OSError as error:
            # It cannot be written to, or nothing may be executed from there.
            errors.append(str(error))
    raise CompilationError("; ".join(errors))


def _compile(text: str, library: pathlib.Path) -> None:
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Another process may do the same.
    part = library.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    try:
        command = [*_command(), "-x", "c++", "-", "-o", str(part)]
        # Where compilers look for the linker, even if nothing is set.
        path = {"PATH": os.environ.get("PATH", os.defpath)}
        done = subprocess.run(
            command, input=text.encode(), capture_output=True, env=os.environ | path
        )
        if done.returncode != 0:
            raise CompilationError(done.stderr.decode(errors="replace"))
        part.replace(library)
    finally:
        part.unlink(missing_ok=True)


def _command() -> list[str]:
    return [find(), *_FLAGS, f"-I{jax.ffi.include_dir()}"]


def _folders() -> Iterator[pathlib.Path]:
    """Where compiled programs may be."""
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore
    if chosen and "://" not in chosen:
        yield pathlib.Path(chosen) / "flashquinox"
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        yield pathlib.Path(caches) / "flashquinox"
    yield _folder_of_process()


@functools.cache
def _folder_of_process() -> pathlib.Path:
    folder = tempfile.TemporaryDirectory(prefix="flashquinox-")
    # Until the process ends.
    _folder_of_process.__dict__["kept"] = folder
    return pathlib.Path(folder.name)


@functools.cache
def _header() -> str:
    """What XLA's custom calls are, in this version of it."""
    path = pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    return path.read_text(encoding="utf-8")


@functools.cache
def _machine() -> str:
    """What a compiled program runs on: the processor with its instructions."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "Features", "CPU part")
    known = {x for x in lines if x.startswith(names)}
    return "\n".join([platform.platform(), platform.processor(), *sorted(known)])
