"""New states in host memory."""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.core
import jax.tree_util as jtu
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from .. import _compat
from .._common import memory
from .._common.host_memory import free_bytes, pool_bytes, POOL_VARIABLE
from .._model.trees import Leaf
from .._sharding import new_arrays, state_specs


# Leaves with fewer elements stay on the device: all biases and norms of a model are few
# bytes there, and a copy of its own for each would take longer than its bytes do.
_SMALL = 2**14


def is_worth_it(leaf: Leaf) -> bool:
    """Whether the state of a leaf is large enough for host memory."""
    return leaf.value.size >= _SMALL


def check_has_host_memory(call: str, leaves: Sequence[Leaf]) -> None:
    """The devices of a model must be able to read host memory."""
    devices = {
        device
        for leaf in leaves
        if isinstance(leaf.value, jax.Array)
        and not isinstance(leaf.value, jax.core.Tracer)
        for device in leaf.value.devices()
    } or {_compat.traced_device()}
    for device in devices:
        if not memory.has_host_memory(device):
            raise ValueError(
                f'`{call}`: `state_memory="{memory.HOST_KIND}"` needs memory of the '
                f"host that the device can read, and JAX has none for the platform "
                f"{device.platform!r} ({device.device_kind}). Pass "
                '`state_memory="device"`, or leave it out.'
            )


def make(
    call: str,
    makers: Sequence[Callable[[], PyTree]],
    leaves: Sequence[Leaf],
    shardings: Sequence[NamedSharding | None],
) -> list[PyTree]:
    """What each of these makes for a leaf that has not been trained, in host memory
    from the start. All of it is zero but for the parameters of codecs that learn, which
    stay on the device."""
    shapes = [eqx.filter_eval_shape(maker) for maker in makers]
    places = [
        _places(leaf, x, sharding)
        for leaf, x, sharding in zip(leaves, shapes, shardings, strict=True)
    ]
    pairs = zip(jtu.tree_leaves(shapes), jtu.tree_leaves(places), strict=True)
    _check_fits(call, [pair for pair in pairs if pair[0].ndim > 0])

    return [new_arrays.at(x, there) for x, there in zip(shapes, places, strict=True)]


def moved(tree: PyTree) -> PyTree:
    """What a maker made inside of `jit`, in host memory."""
    return jtu.tree_map(lambda x: memory.to_host(x) if x.ndim > 0 else x, tree)


def _places(leaf: Leaf, shapes: PyTree, sharding: NamedSharding | None) -> PyTree:
    """Where each array of the state of a leaf goes."""
    if sharding is not None:
        there = state_specs.of_arrays(shapes, sharding)
        return jtu.tree_map(lambda x: x.with_memory_kind(memory.HOST_KIND), there)
    device = _compat.traced_device()
    if isinstance(leaf.value, jax.Array):
        (device,) = leaf.value.devices()
    here = SingleDeviceSharding(device, memory_kind=memory.HOST_KIND)
    return jtu.tree_map(lambda _: here, shapes)


def _check_fits(
    call: str, arrays: Sequence[tuple[jax.ShapeDtypeStruct, Sharding]]
) -> None:
    """One error before anything is allocated, if the host has not as much memory."""
    needed = sum(
        math.prod(there.shard_shape(x.shape))
        * x.dtype.itemsize
        * len(there.addressable_devices)
        for x, there in arrays
    )
    platforms = {d.platform for _, there in arrays for d in there.addressable_devices}
    limits = {"this host has": free_bytes()}
    remedy = 'Use fewer bits, more hosts, or `state_memory="device"`.'
    if "gpu" in platforms:
        limits["XLA gives GPUs"] = pool_bytes()
    for who, most in limits.items():
        if most is None or needed <= most:
            continue
        if who == "XLA gives GPUs":
            remedy = (
                f"Set the environment variable {POOL_VARIABLE} to at least "
                f"{math.ceil(needed / 2**30) + 1}, before JAX starts."
            )
        raise MemoryError(
            f"`{call}`: the state needs {needed:,} bytes of host memory "
            f"({needed / 1e9:.1f} GB), and {who} {most:,} ({most / 1e9:.1f} GB). "
            f"{remedy}"
        )
