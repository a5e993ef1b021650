"""The files of one checkpoint. Orbax writes them. They are read by tensorstore, the
library in which Orbax stores arrays, because it stops at the first error."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import Sharding

from .directory import ARRAYS, MANIFEST


# How much is read at a time. It bounds the memory that reading takes on the host beside
# the arrays themselves.
_BATCH_BYTES = 2**30


def begin_to_write(
    path: str, arrays: dict[str, Any], manifest: dict[str, Any], at_last: Callable
) -> Callable[[], None]:
    """Copies arrays to the host and begins to write them. `at_last` is called in one of
    the processes, after all files are written and before the checkpoint appears.

    **Returns:**

    A function that waits until the checkpoint appears, or raises the error of the save.
    """
    items: dict[str, Any] = {MANIFEST: ocp.args.JsonSave(manifest)}
    # Orbax refuses arrays without elements, and trees without arrays.
    arrays = {name: x for name, x in arrays.items() if x.size > 0}
    if arrays:
        items[ARRAYS] = ocp.args.PyTreeSave(arrays)
    # A new checkpointer each time: one that has failed once may fail again.
    checkpointer = ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(),
        # Folders are there before anything can fail: nothing makes them afterwards.
        async_options=ocp.options.AsyncOptions(
            post_finalization_callback=at_last, create_directories_asynchronously=False
        ),
    )
    ends = contextlib.ExitStack()
    ends.enter_context(_without_logs("absl", path))
    # Also after a failure: it may still write metadata, where all is removed then.
    ends.callback(checkpointer.close)
    try:
        checkpointer.save(path, args=ocp.args.Composite(**items))
    except BaseException:
        ends.close()
        raise

    def finish() -> None:
        with ends:
            checkpointer.wait_until_finished()

    return finish


def read(
    path: str,
    stored: dict[str, jax.ShapeDtypeStruct],
    shardings: dict[str, Sharding | None],
) -> dict[str, Any]:
    """The arrays of a checkpoint, by their names: of these shardings, or NumPy arrays
    where there is no sharding."""
    base = path if "://" in path else {"driver": "file", "path": path}
    folder = tensorstore.KvStore.open(base).result() / f"{ARRAYS}/"
    arrays: dict[str, Any] = {}
    batch: dict[str, Sharding | None] = {}
    size = 0
    for name, sharding in shardings.items():
        if stored[name].size == 0:
            # Arrays without elements are not stored.
            arrays[name] = np.zeros(stored[name].shape, stored[name].dtype)
            continue
        batch[name] = sharding
        size += stored[name].size * stored[name].dtype.itemsize
        if size > _BATCH_BYTES:
            arrays |= _read_batch(folder, stored, batch)
            batch, size = {}, 0
    return arrays | _read_batch(folder, stored, batch)


def _read_batch(
    folder: tensorstore.KvStore,
    stored: dict[str, jax.ShapeDtypeStruct],
    shardings: dict[str, Sharding | None],
) -> dict[str, Any]:
    opening = {
        name: tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {
                    "driver": "ocdbt",
                    "base": folder.spec().to_json(),
                    "path": f"{name}/",
                },
            },
            read=True,
        )
        for name in shardings
    }
    reading = {}
    for name, sharding in shardings.items():
        store = opening[name].result()
        like = stored[name]
        if store.shape != like.shape or store.dtype.numpy_dtype != like.dtype:
            raise ValueError(
                f"`{name}` is {store.dtype.name} of shape {store.shape}, not "
                f"{like.dtype} of shape {like.shape}"
            )
        reading[name] = {
            str(index): (store[index] if index else store).read()
            for index in _indices(sharding, store.shape)
        }
    return {
        name: _assemble(sharding, stored[name].shape, reading[name])
        for name, sharding in shardings.items()
    }


def _indices(sharding: Sharding | None, shape: tuple[int, ...]) -> list[Any]:
    """The parts of an array that this process has."""
    if sharding is None:
        return [()]
    return list(sharding.addressable_devices_indices_map(shape).values())


def _assemble(
    sharding: Sharding | None, shape: tuple[int, ...], parts: dict[str, Any]
) -> Any:
    values = {index: np.asarray(part.result()) for index, part in parts.items()}
    if sharding is None:
        return values["()"]
    return jax.make_array_from_callback(
        shape, sharding, lambda index: values[str(index)]
    )


@contextlib.contextmanager
def _without_logs(logger: str, text: str) -> Iterator[None]:
    """Hides the log records of a logger that contain this text: the same errors are
    also raised."""
    unlike = lambda record: text not in record.getMessage()
    logging.getLogger(logger).addFilter(unlike)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(unlike)
