"""Digests, which show whether an array is the one that was saved, bit for bit."""

import zlib
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32


def digest(name: str, x: Shaped[Array | np.ndarray, "*shape"]) -> UInt32[Array, ""]:
    r"""$\sum_i w_i b_i \bmod 2^{32}$, where $b_i$ are the bits of the elements as
    integers, and the weights $w_i$ are odd numbers: a hash of the name and the
    position.

    Every flipped bit changes the sum, because the weights are odd. The sum does not
    depend on the sharding of the array, because addition modulo $2^{32}$ has no order.
    """
    if isinstance(x, np.ndarray) and x.dtype.itemsize > 4:
        # Without `jax_enable_x64`, JAX has no arrays of 64 bits.
        x = np.ascontiguousarray(x).reshape(*x.shape, 1).view(np.uint32)
    seed = np.uint32(zlib.crc32(name.encode()))
    if isinstance(x, jax.Array) and x.sharding.memory_kind == "pinned_host":
        # Waits for each array, because not all of them may fit on the device at once.
        on_device = jax.device_put(x, x.sharding.with_memory_kind("device"))
        return weighted_sum(on_device, seed).block_until_ready()
    return weighted_sum(x, seed)


@jax.jit
def weighted_sum(
    x: Shaped[Array, "*shape"], seed: UInt32[Array, ""]
) -> UInt32[Array, ""]:
    bits = _bits(x)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, length in enumerate(bits.shape):
        along = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * np.uint32(length) + along
    weights = mix(position + seed) | np.uint32(1)
    return jnp.sum(weights * bits.astype(jnp.uint32), dtype=jnp.uint32)


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(x: Shaped[Array, "*shape"]) -> Shaped[Array, "..."]:
    """The bits as unsigned integers of up to 32 bits. Wider elements get another
    axis."""
    dtype: Any = x.dtype
    if dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts = (_bits(part) for part in (lax.real(x), lax.imag(x)))
        parts = [p if p.ndim > x.ndim else jnp.expand_dims(p, -1) for p in parts]
        return jnp.concatenate(parts, axis=-1)
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    width = info(dtype).bits
    if width < 8:
        # Exact, and the same everywhere: numbers of less than 8 bits are bytes on the
        # host, but may be packed on devices.
        x, width = x.astype(jnp.float32), 32
    unsigned = {8: jnp.uint8, 16: jnp.uint16}.get(width, jnp.uint32)
    return lax.bitcast_convert_type(x, unsigned)
