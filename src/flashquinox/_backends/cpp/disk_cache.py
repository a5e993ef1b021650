"""Compiled programs, kept on disk for all processes of a user: in the folder where JAX
keeps what XLA has compiled, if that is set, or else with the user's other caches.

The name of a file tells what it was compiled of, and, at its end, what it has in it:
one that was cut off is compiled again.
"""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import TypeVar

import jax


T = TypeVar("T")

# Of this process, until it ends.
_temporary: list[tempfile.TemporaryDirectory] = []


def name_of(kind: str, *made_of: str) -> str:
    """The name of a program of this kind: another one for each of what it is made of,
    its text, the compiler and the machine."""
    described = "\0".join(made_of)
    return f"flashquinox_{kind}_{hashlib.sha256(described.encode()).hexdigest()[:32]}"


def cached(
    name: str,
    ending: str,
    make: Callable[[pathlib.Path], object],
    use: Callable[[pathlib.Path], T],
) -> T:
    """What `use` makes of the file of a program, which `make` writes in the first
    process that needs it. Where nothing can be kept, a file of this process.

    **Raises:**

    - `OSError` if there is no place for files at all.
    - What `make` raises.
    """
    errors = []
    for find in (_folder_of_user, _folder_of_process):
        # It is not there, cannot be written to, or nothing may be executed from it.
        try:
            folder = find()
            found = _found(folder, name, ending)
            return use(found or _made(folder, name, ending, make))
        except (OSError, RuntimeError) as error:
            errors.append(str(error))
    raise OSError("; ".join(errors))


def _found(folder: pathlib.Path, name: str, ending: str) -> pathlib.Path | None:
    """What was compiled before."""
    for path in sorted(folder.glob(f"{name}-*{ending}")):
        if path.name == _file_of(name, ending, path.read_bytes()):
            return path
    return None


def _made(
    folder: pathlib.Path,
    name: str,
    ending: str,
    make: Callable[[pathlib.Path], object],
) -> pathlib.Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Another process may do the same.
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as part:
        made = pathlib.Path(part) / "made"
        make(made)
        path = folder / _file_of(name, ending, made.read_bytes())
        made.replace(path)
    return path


def _file_of(name: str, ending: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:16]}{ending}"


def _folder_of_user() -> pathlib.Path:
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore
    if chosen and "://" not in chosen:
        return pathlib.Path(chosen) / "flashquinox"
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(caches) / "flashquinox"


def _folder_of_process() -> pathlib.Path:
    if not _temporary:
        _temporary.append(tempfile.TemporaryDirectory(prefix="flashquinox-"))
    return pathlib.Path(_temporary[0].name)
