"""Arithmetic that backends may replace by instructions of their device.

In a traced program, each of these functions is a primitive of its own. A kernel
recognizes it by identity, because a user's function may have the same name.
"""

import functools
from collections.abc import Callable
from typing import ClassVar

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import (
    Array,
    Float,
    Float32,
    Int8,
    Int32,
    Integer,
    Shaped,
    UInt8,
    UInt32,
)

from .. import _compat


# Beside it, a float32 has no bits for a fraction: a sum with it is rounded to an
# integer, whose lowest bits are its own.
WITHOUT_FRACTION = np.float32(1.5 * 2.0**23)
_INFINITY, _QUIET_NAN = np.int32(0x7F80_0000), np.int32(0x7FC0_0000)
_MAGNITUDE, _SIGN = np.int32(0x7FFF_FFFF), np.int32(-(2**31))


class Replaceable:
    """An elementwise function that is a primitive in traced programs. Where no backend
    replaces it, the function itself is compiled. `dtype` is that of its results, or
    `None` if they have that of its first argument: else, the function would be traced
    for it in every process."""

    _known: ClassVar[dict[_compat.Primitive, "Replaceable"]] = {}

    def __init__(self, function: Callable[..., Array], dtype: DTypeLike | None = None):
        self.function = function
        name = f"flashquinox{getattr(function, '__name__', '')}"
        self._primitive = _compat.operation(name, function, dtype)
        self._known[self._primitive] = self

    def __call__(self, *args: Array) -> Array:
        return self._primitive.bind(*jnp.broadcast_arrays(*args))

    @classmethod
    def of(cls, primitive: _compat.Primitive) -> "Replaceable | None":
        """The function that this primitive stands for. `None` for other primitives."""
        return cls._known.get(primitive)


@functools.partial(Replaceable, dtype=jnp.int32)
def byte_times(
    byte: Shaped[Array, "*#shape"], factor: Int32[Array, "*#shape"]
) -> Int32[Array, "*shape"]:
    """`byte * factor`, for 8-bit integers and factors of at most 16 significant bits.
    The product is also exact in float32, for devices that cannot multiply integers."""
    return byte.astype(jnp.int32) * factor


@functools.partial(Replaceable, dtype=jnp.uint32)
def canonical_pattern(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The bits of a float32, with the same pattern for all NaNs."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & _MAGNITUDE
    # Without a `where`: of that, compilers for CPUs make a choice for each element
    # once the pattern is cut to 16 bits, one after another.
    is_nan = lax.shift_right_logical(_INFINITY - magnitude, np.int32(31))
    magnitude = jnp.minimum(magnitude | (is_nan << 22), _QUIET_NAN)
    pattern = magnitude | (bits & _SIGN & (is_nan - 1))
    return lax.bitcast_convert_type(pattern, jnp.uint32)


@functools.partial(Replaceable, dtype=jnp.int8)
def nearest_int8(x: Float[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """The nearest `int8`, of two the even one, and 0 for NaN."""
    return _nearest_byte(x, jnp.int8)


@functools.partial(Replaceable, dtype=jnp.uint8)
def nearest_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The nearest `uint8`, of two the even one, and 0 for NaN."""
    return _nearest_byte(x, jnp.uint8)


def _nearest_byte(
    x: Float[Array, "*shape"], dtype: DTypeLike
) -> Integer[Array, "*shape"]:
    if x.dtype != jnp.float32:
        return jnp.round(x).astype(dtype)
    # In fewer operations than a conversion of floats takes on a CPU. Without the first
    # one, compilers would round a product and the sum at once.
    info = jnp.iinfo(dtype)
    inside = jnp.clip(x, np.float32(info.min), np.float32(info.max))
    bits = lax.bitcast_convert_type(inside + WITHOUT_FRACTION, jnp.int32)
    return jnp.where(jnp.isnan(x), 0, bits).astype(dtype)


@Replaceable
def rounded_quotient(
    x: Float[Array, "*#shape"], y: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """`x / y` rounded to nearest on every backend. An ordinary `/` may be approximate
    in kernels, even for simple fractions, which often lie halfway between two codes."""
    return x / y


@Replaceable
def accurate_quotient(
    x: Float[Array, "*#shape"], y: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """`x / y`, as accurate as is cheap on every backend: where a curve is steep, an
    error of two units in the last place shows in one code out of some thousands."""
    return x / y


@Replaceable
def rounded_root(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`sqrt(x)` rounded to nearest on every backend."""
    return jnp.sqrt(x)
