"""Models in safetensors files, by the dotted paths of their leaves."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .._common.path_checks import check_is_file, check_path
from .._common.target import is_key, Target
from .._model.trained import is_trainable
from .._model.trees import dotted_name, flatten, is_array, Leaf, Model
from .._optimizer.call_checks import check_given
from .._optimizer.leaf_checks import check_floating_dtype
from .._optimizer.states import open_states
from .._storage.split import decode_stored


# The dtypes of safetensors files, and their names in NumPy.
_DTYPES = {
    "BOOL": "bool",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


def save_safetensors(
    path: str | os.PathLike[str],
    model: PyTree,
    state: PyTree = None,
    *,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes the arrays of a model to a safetensors file, under their dotted paths,
    such as `layers.0.weight`.

    The file appears when it is complete. Arrays in any sharding are gathered on the
    host, one by one. With several processes, all of them make the same call, and the
    first one writes.

    ??? Example

        ```python
        save_safetensors("model.safetensors", model)  # bfloat16
        save_safetensors("float32.safetensors", model, state)  # master weights
        ```

    **Arguments:**

    - `path`: of the file. An existing file is replaced.
    - `model`: any pytree. Random keys, and leaves that are no arrays, are not written.
    - `state`: its optimizer state, or that of a wrapper, such as `optax.chain`. If
        given, master weights are written, as [`flashquinox.master_weights`][] gives
        them.
    - `dtype`: if given, floating-point arrays are cast to it.

    **Raises:**

    `FileNotFoundError` or `IsADirectoryError` if there can be no file at `path`;
    `OSError` if it cannot be written, as on a full disk: an existing file is unchanged;
    `TypeError` if an array has no value, or a dtype that these files do not have;
    `ValueError` if two leaves have the same path, or the state is not one of this
    model; `ImportError` without the package `safetensors`.
    """
    call = "save_safetensors"
    package = _package(call)
    if dtype is not None:
        dtype = check_floating_dtype(f"{call}(dtype=...)", dtype)
    check_path(call, "path", path)
    check_given(call, model)
    if jax.process_index() == 0:
        _check_path(call, os.fspath(path))
    if state is None:
        leaves, _ = flatten(model)
        corrections: list[Any] = [None for _ in leaves]
    else:
        opened = open_states(call, model, state)
        leaves, corrections = opened.leaves, opened.corrections
    corrections_of = dict(zip((leaf.path for leaf in leaves), corrections, strict=True))
    named = _named(call, leaves)
    for leaf in named.values():
        _check_value(call, leaf)

    arrays = {}
    for name, leaf in named.items():
        x = leaf.value
        if state is not None and is_trainable(x):
            x = decode_stored(jnp.asarray(x), corrections_of[leaf.path])
        if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(dtype)
        if str(x.dtype) not in _DTYPES.values():
            raise TypeError(
                f"`{call}`: the array at `{leaf.name}` is {x.dtype}, which these files "
                "do not have. Cast it, or take it out of the model."
            )
        arrays[name] = _to_host(x)
    if jax.process_index() == 0:
        try:
            with _complete_or_absent(os.fspath(path)) as temporary:
                package.numpy.save_file(arrays, temporary)
        except (OSError, package.SafetensorError) as error:
            raise OSError(
                f"`{call}`: {os.fspath(path)} could not be written ({error}). If there "
                "was such a file, it is as it was."
            ) from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{call}: {path}")


def load_safetensors(path: str | os.PathLike[str], like: Model) -> Model:
    """Reads a model from a safetensors file. The inverse of
    [`flashquinox.exchange.save_safetensors`][].

    ??? Example

        ```python
        model = load_safetensors("model.safetensors", model)

        shapes = eqx.filter_eval_shape(fq.cast, model, jnp.float32)
        float32_model = load_safetensors("float32.safetensors", shapes)
        model, state = fq.from_master_weights(float32_model, model, state)
        ```

    **Arguments:**

    - `path`: of the file.
    - `like`: a pytree like the model that was written. Its leaves say where each array
        goes. A `jax.Array`, or a `jax.ShapeDtypeStruct` with a `sharding`, is replaced
        by an array of the same sharding; a `jax.ShapeDtypeStruct` without one, by an
        array on JAX's default device; a NumPy array, by a NumPy array. Values are not
        used.

    **Returns:**

    A pytree like `like`, in which all arrays except random keys come from the file.

    **Raises:**

    `ValueError` if the file is damaged, or does not have exactly these arrays, in these
    shapes and dtypes: the message lists the differences, and nothing is read.
    `FileNotFoundError` or `IsADirectoryError` if there is no such file; `ImportError`
    without the package `safetensors`.
    """
    call = "load_safetensors"
    package = _package(call)
    check_path(call, "path", path)
    check_given(call, like)
    check_is_file(call, path)
    leaves, rebuild = flatten(like)
    named = _named(call, leaves)
    targets = {
        name: Target.of(call, leaf.name, leaf.value) for name, leaf in named.items()
    }
    try:
        file = package.safe_open(path, framework="numpy")
    except package.SafetensorError as error:
        raise ValueError(
            f"`{call}`: {os.fspath(path)} is damaged, or no safetensors file: {error}."
        ) from error
    with file:
        _check_contents(call, path, file, targets)
        new = {
            named[name].path: target.put(file.get_tensor(name))
            for name, target in targets.items()
        }
    return rebuild([new.get(leaf.path, leaf.value) for leaf in leaves])


def _package(call: str) -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f'`{call}` needs safetensors: `pip install "flashquinox[exchange]"`.'
        ) from error
    return safetensors


def _named(call: str, leaves: list[Leaf]) -> dict[str, Leaf]:
    """The leaves that are written to files, by their dotted paths."""
    named: dict[str, Leaf] = {}
    for leaf in leaves:
        if not is_array(leaf.value) or is_key(leaf.value):
            continue
        name = dotted_name(leaf.path)
        if name in named:
            raise ValueError(
                f"`{call}`: both `{named[name].name}` and `{leaf.name}` are called "
                f"{name!r} in a file. Give their containers keys without dots."
            )
        named[name] = leaf
    return named


def _check_path(call: str, path: str) -> None:
    folder = os.path.dirname(path) or os.curdir
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"`{call}`: there is no folder {folder}, where {path} is to be. Make it "
            "first."
        )
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"`{call}`: {path} is a folder. Pass the path of a file."
        )


def _check_value(call: str, leaf: Leaf) -> None:
    if isinstance(leaf.value, jax.core.Tracer | jax.ShapeDtypeStruct):
        raise TypeError(
            f"`{call}`: the array at `{leaf.name}` has no value: it is traced, or a "
            "`jax.ShapeDtypeStruct`. Save the model itself, outside of `jit`."
        )


def _to_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    # Files are in C order.
    return np.asarray(x, order="C")


def _check_contents(
    call: str, path: Any, file: Any, targets: dict[str, Target]
) -> None:
    found = {}
    for name in file.keys():
        tensor = file.get_slice(name)
        dtype = tensor.get_dtype()
        found[name] = _DTYPES.get(dtype, dtype), tuple(tensor.get_shape())
    wanted = {name: (str(x.dtype), x.shape) for name, x in targets.items()}
    differences = [
        f"{name}: {_text(found.get(name))} in the file, {_text(wanted.get(name))} in "
        "the model"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        most = 20
        more = len(differences) - most
        shown = differences[:most] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(
            f"`{call}`: {os.fspath(path)} does not fit the model:\n  "
            + "\n  ".join(shown)
            + "\nPass a model like the one that was saved, in its dtypes "
            "(`flashquinox.cast`)."
        )


def _text(array: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if array is None else f"{array[0]} of shape {array[1]}"


@contextlib.contextmanager
def _complete_or_absent(path: str) -> Iterator[str]:
    """A temporary file to write, which is renamed to `path` when it is complete."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
