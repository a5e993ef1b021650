"""NVIDIA's runtime compiler, which JAX's packages for CUDA come with."""

import ctypes
import functools
import importlib.util
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..cpp import disk_cache


# Every later GPU runs what was compiled for an earlier one. The kernels have
# instructions for bfloat16, which are there from this one on.
_ARCHITECTURE = "compute_80"
# The compiler writes down its own version of PTX, and drivers refuse one that is later
# than theirs. These have all instructions of the kernels: that of CUDA 12.1, from which
# on a kernel may have more than 4096 bytes of arguments, and that of CUDA 12.0.
_VERSIONS = ((12010, "8.1", 32764), (0, "8.0", 4096))
# What makes the compiler faster, and the version from which it knows that. The first
# takes declarations away that kernels do not use. The second takes optimizations away,
# many of which are made of PTX in any case: of AdamW, Lion and SGD, what GPUs execute
# has as many instructions, within 1 %.
_FASTER = (((12, 4), "--minimal"), ((12, 9), "--Ofast-compile=min"))


class CompilationError(Exception):
    """The text is the compiler's log, and the program."""


@functools.lru_cache(maxsize=256)
def compiled(source: str, architecture: str = _ARCHITECTURE) -> bytes:
    """A program in CUDA C++ as PTX, or, for a real architecture such as `"sm_90"`, in
    its instructions: compiled by the first process of a user that needs it.

    **Raises:**

    - `ImportError` if there is no compiler.
    - `CompilationError` if the program is wrong.
    """
    options = (f"--gpu-architecture={architecture}", "--std=c++17", *_faster())
    name = disk_cache.name_of("kernel", source, *options, _ptx_version(), *_compiler())
    make = functools.partial(_compile, source, options)
    ending = ".cubin" if architecture.startswith("sm") else ".ptx"
    write = lambda path: path.write_bytes(make())
    try:
        return disk_cache.cached(name, ending, write, pathlib.Path.read_bytes)
    except OSError:
        return make()


def _compile(source: str, options: Sequence[str]) -> bytes:
    library, program = load(), ctypes.c_void_p()
    create = library.nvrtcCreateProgram
    if create(ctypes.byref(program), source.encode(), None, 0, None, None):
        raise CompilationError("the compiler cannot be started")
    try:
        array = (ctypes.c_char_p * len(options))(*[x.encode() for x in options])
        failed = library.nvrtcCompileProgram(program, len(options), array)
        read = functools.partial(_read, library, program)
        if failed:
            log = read("nvrtcGetProgramLog").decode()
            raise CompilationError(f"{log}\n{source}")
        if options[0].startswith("--gpu-architecture=sm"):
            return read("nvrtcGetCUBIN")
        version = f".version {_ptx_version()}".encode()
        ptx = read("nvrtcGetPTX").rstrip(b"\0")
        return re.sub(rb"^\.version .*$", version, ptx, count=1, flags=re.MULTILINE)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def load() -> ctypes.CDLL:
    """The compiler.

    **Raises:**

    `ImportError` if it is not there.
    """
    errors = []
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            errors.append(str(error))
    raise ImportError("; ".join(errors))


@functools.cache
def _faster() -> tuple[str, ...]:
    known = _compiler_version()
    return tuple([option for version, option in _FASTER if known >= version])


@functools.cache
def _compiler_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    load().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _compiler() -> Iterator[str]:
    """What tells the compiler from others: its version, and its size, as that has no
    third number."""
    yield from map(str, _compiler_version())
    path = pathlib.Path(load()._name)
    if path.is_file():
        yield str(path.stat().st_size)


def most_pointers() -> int:
    """How many arguments a kernel has at most. XLA passes no more than 1024."""
    return min(1024, _limits()[1] // 8)


def _ptx_version() -> str:
    return _limits()[0]


@functools.cache
def _limits() -> tuple[str, int]:
    """The version of PTX for the driver of this machine, and how many bytes of
    arguments a kernel has there. Without a driver, kernels are for another machine,
    which is taken to have a recent one."""
    number = ctypes.c_int(_VERSIONS[0][0])
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        pass
    (found, *_) = [x for x in _VERSIONS if number.value >= x[0]]
    return found[1:]


def _candidates() -> Iterator[str]:
    """Where the compiler may be: in NVIDIA's packages, then in CUDA."""
    # Of CUDA 12, each library is a package; of CUDA 13, all are one.
    for package in ("nvidia.cuda_nvrtc", "nvidia.cu13"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in (found and found.submodule_search_locations) or ():
            paths = pathlib.Path(folder).glob("lib/libnvrtc.so.*")
            yield from sorted(str(x) for x in paths if ".alt." not in x.name)
    yield from ("libnvrtc.so.13", "libnvrtc.so.12")


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, name: str) -> bytes:
    size = ctypes.c_size_t()
    size_of: Callable[..., Any] = getattr(library, f"{name}Size")
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, name)(program, buffer)
    return buffer.raw
