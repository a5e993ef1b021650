"""Where an array that is read from a file goes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding

from .errors import CheckpointError
from .memory import HOST_KIND
from .meshes import mesh_text


class Target(NamedTuple):
    """The kind of array that a leaf is restored to.

    - `shape`, `dtype`: of the stored array. For random keys, this is their data.
    - `numpy_type`: the type of a NumPy array or scalar; `None` for a JAX array.
    - `sharding`: of a JAX array. `None` for JAX's default device.
    - `key_impl`: the implementation of random keys; `None` for other arrays.
    """

    shape: tuple[int, ...]
    dtype: Any
    numpy_type: type | None
    sharding: Sharding | None
    key_impl: Any

    @staticmethod
    def of(call: str, name: str, like: Any) -> "Target":
        if isinstance(like, (np.ndarray, np.generic)):
            return Target(like.shape, like.dtype, type(like), None, None)
        sharding = like.sharding
        if isinstance(like, jax.Array) and not like.committed:
            sharding = None
        if isinstance(sharding, NamedSharding):
            sharding = _concrete(call, name, sharding)
        if sharding is not None:
            _check_divisible(call, name, like.shape, sharding)
        shape, dtype, key_impl = like.shape, like.dtype, None
        if is_key(like):
            key_impl, data = _key_data(like)
            shape, dtype = data.shape, data.dtype
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise CheckpointError(
                f"`{call}`: `{name}` is to be a JAX array of {dtype}, which JAX does "
                "not have by default. Set `jax_enable_x64`, or pass a NumPy array."
            )
        return Target(shape, dtype, None, sharding, key_impl)

    def sharding_of_read(self, automatic: bool = False) -> Sharding | None:
        """The sharding in which to read the array; `None` to read a NumPy array first.
        With `automatic`, for arrays that are computed with, all axes of the mesh are
        automatic, and the memory is that of the device."""
        sharding = self.sharding
        if sharding is None:
            return None
        if jax.process_count() > 1 and sharding.is_fully_addressable:
            # Each process has this array for itself.
            return None
        if not automatic:
            # An array that is read into host memory of one device would have the type
            # of one on the device.
            one = not isinstance(sharding, NamedSharding)
            return None if one and sharding.memory_kind == HOST_KIND else sharding
        if not isinstance(sharding, NamedSharding):
            return sharding.with_memory_kind(None)  # pyright: ignore
        mesh = sharding.mesh
        assert isinstance(mesh, Mesh)
        types = (AxisType.Auto,) * len(mesh.axis_names)
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
        return NamedSharding(mesh, sharding.spec)

    def put(self, value: Any) -> Any:
        """Puts a value that was read where the leaf was."""
        if self.numpy_type is not None:
            value = np.asarray(value)
            return value if issubclass(self.numpy_type, np.ndarray) else value[()]
        if self.sharding is None:
            value = jnp.asarray(value)
        else:
            value = jax.device_put(value, self.sharding)
        if self.key_impl is not None:
            value = jax.random.wrap_key_data(value, impl=self.key_impl)
        return value


def _concrete(call: str, name: str, sharding: NamedSharding) -> NamedSharding:
    """The sharding on the mesh that is set. `jax.eval_shape` gives shardings on
    abstract meshes, which have no devices."""
    if not isinstance(sharding.mesh, AbstractMesh):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.abstract_mesh.shape_tuple != sharding.mesh.shape_tuple:
        raise CheckpointError(
            f"`{call}`: the sharding of `{name}` names no devices, only the axes "
            f"{dict(sharding.mesh.shape)} of a mesh. Restore in "
            "`with jax.set_mesh(mesh):`, with a mesh of these axes."
        )
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _check_divisible(
    call: str, name: str, shape: tuple[int, ...], sharding: Sharding
) -> None:
    """The sharding must divide this shape evenly. JAX does not check that for a
    `jax.ShapeDtypeStruct`."""
    try:
        sharding.shard_shape(shape)
    except (ValueError, IndexError):
        how = f"{sharding}"
        if isinstance(sharding, NamedSharding):
            how = f"{sharding.spec} on {mesh_text(sharding.mesh)}"
        raise CheckpointError(
            f"`{call}`: `{name}`, of shape {shape}, cannot be sharded by {how}: an "
            "axis must be a multiple of the parts it is divided into. Give the leaf to "
            "restore to another `sharding`: along another axis, over fewer devices, or "
            "`PartitionSpec()` for all of it on every device."
        ) from None


def _key_data(key: Any) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The implementation of random keys, and the shape of their data."""
    impls = []

    def data(key):
        impls.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    shape = jax.eval_shape(data, jax.ShapeDtypeStruct(key.shape, key.dtype))
    return impls[0], shape


def is_key(x: Any) -> bool:
    """Whether an array holds random keys, as `jax.random.key` makes them."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
