"""The operations of ordinary JAX that kernels replace, and what is known of values.

A product that is added to, or a number that is rounded and then made a byte, is one
instruction. So a value knows how it was made.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .words import Words


@dataclasses.dataclass
class Value:
    """An array, or how to make it, and what is known of it."""

    _array: Any
    _make: Callable[[], Array] | None = None
    # Of an array of a narrow dtype.
    words: Words | None = None
    # x and y, of an array that is x * y.
    factors: tuple["Value", "Value"] | None = None
    # x and c, of an array that is x * c with a power of two c.
    scaled: tuple["Value", float] | None = None
    # The same, of an array that is x * c rounded to integers.
    rounded: tuple["Value", float] | None = None
    # Of an array that holds some bits of another one.
    field: "_Field | None" = None
    # The same, of an array that is a field of n bits less 2^(n - 1).
    centered: "_Field | None" = None

    @staticmethod
    def of(x: Any) -> "Value":
        if isinstance(x, Words):
            return Value(None, lambda: x.widen().astype(x.dtype), words=x)
        return Value(x)

    @staticmethod
    def of_constant(x: Any) -> "Value":
        """An array that a function closes over: if it is not traced, as numbers."""
        is_known = not isinstance(x, jax.core.Tracer) and _is_numeric(x)
        return Value(np.asarray(x)[()] if is_known else x)

    @staticmethod
    def later(make: Callable[[], Array], **known: Any) -> "Value":
        return Value(None, make, **known)

    @property
    def array(self) -> Any:
        if self._make is not None:
            self._array, self._make = self._make(), None
        return self._array

    def part(self, index: int) -> "Value":
        """One along the first axis."""
        x = self.array
        if isinstance(x, jax.Array):
            return Value(lax.index_in_dim(x, index, keepdims=False))
        return Value(np.asarray(x)[index])

    @property
    def constant(self) -> Any:
        """The number, if it is one. No array."""
        known = self._make is None and not isinstance(self._array, jax.Array)
        return self._array if known and np.ndim(self._array) == 0 else None


def _is_numeric(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return False
    return jnp.issubdtype(dtype, np.number) or dtype == jnp.bool_


def filled(x: Any) -> Any:
    """The same array. A constant whose elements are all the same becomes a number that
    is broadcast."""
    if isinstance(x, jax.Array) or np.ndim(x) == 0 or not _is_numeric(x):
        return x
    elements = np.unique(np.asarray(x))
    return jnp.broadcast_to(elements[0], np.shape(x)) if len(elements) == 1 else x


@dataclasses.dataclass(frozen=True)
class _Field:
    """Bits of the elements of an array: from `first` upward."""

    source: Array
    first: int
    bits: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """One of a function, to be replaced."""

    # That of the device.
    arithmetic: Any
    eqn: Any
    default: Callable[[], Array]

    @property
    def width(self) -> int:
        """Of an element of the first operand, in bytes."""
        return self.eqn.invars[0].aval.dtype.itemsize

    def floats(self, *values: Value) -> list[Array]:
        """Of the shape of the result."""
        shape = self.eqn.outvars[0].aval.shape
        return [
            jnp.broadcast_to(jnp.asarray(x.array, jnp.float32), shape) for x in values
        ]

    def but(self, **known: Any) -> Value:
        """The operation as it is, and what is known of its result."""
        return Value.later(self.default, **known)


# Each gives the value of an operation, or `None` to leave it as it is.


def _divide(op: Operation, x: Value, y: Value) -> Value | None:
    reciprocal = op.arithmetic.reciprocal
    if reciprocal is None:
        return None
    inverse = Value(reciprocal(*op.floats(y)))
    return Value.later(lambda: x.array * inverse.array, factors=(x, inverse))


def _take_root(op: Operation, x: Value) -> Value | None:
    root = op.arithmetic.square_root
    return None if root is None else Value(root(x.array))


def _take_sign(op: Operation, x: Value) -> Value | None:
    sign = op.arithmetic.sign
    return None if sign is None else Value(sign(x.array))


def _round(op: Operation, x: Value) -> Value | None:
    if op.eqn.params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        return None
    own = op.arithmetic.round
    make = op.default if own is None else lambda: own(x.array)
    return Value.later(make, rounded=x.scaled or (x, 1.0))


def _multiply(op: Operation, *operands: Value) -> Value | None:
    scaled = None
    for x, y in (operands, operands[::-1]):
        factor = y.constant
        if factor is not None and np.frexp(factor)[0] == 0.5:
            scaled = (x, float(factor))
    return op.but(factors=operands, scaled=scaled)


def _add(op: Operation, *operands: Value) -> Value | None:
    multiply_add = op.arithmetic.multiply_add
    if multiply_add is None:
        return None
    for product, other in (operands[::-1], operands):
        if product.factors is not None:
            return Value(multiply_add(*op.floats(*product.factors, other)))
    return None


def _shift(op: Operation, x: Value, distance: Value) -> Value | None:
    if distance.constant is None or op.width != 4:
        return None
    first = int(distance.constant)
    return op.but(field=_Field(x.array, first, 32 - first))


def _mask(op: Operation, x: Value, mask: Value) -> Value | None:
    if mask.constant is None or op.width != 4:
        return None
    field = x.field or _Field(x.array, 0, 32)
    bits = int(mask.constant).bit_length()
    if int(mask.constant) != 2**bits - 1 or bits > field.bits:
        return None
    return op.but(field=_Field(field.source, field.first, bits))


def _subtract(op: Operation, x: Value, y: Value) -> Value | None:
    if x.field is None or y.constant is None:
        return None
    if int(y.constant) != 2 ** (x.field.bits - 1):
        return None
    return op.but(centered=x.field)


def _exclusive_or(op: Operation, x: Value, y: Value) -> Value | None:
    del op
    if x.words is None or y.constant is None:
        return None
    return Value.of(x.words ^ int(y.constant))


def _bitcast(op: Operation, x: Value) -> Value | None:
    if x.words is None:
        return None
    return Value.of(x.words.bitcast(op.eqn.params["new_dtype"]))


def _convert(op: Operation, x: Value) -> Value | None:
    dtype = op.eqn.params["new_dtype"]
    only_words = op.arithmetic.only_words
    bits = 8 * dtype.itemsize
    if bits == 32:
        wide = _widen(op, x)
        if wide is not None:
            return Value(wide.astype(dtype))
    if x.rounded is not None and dtype in (jnp.int8, jnp.uint8):
        number, factor = x.rounded
        if only_words:
            return Value.of(Words.of_rounded(number.array, factor, dtype))
        return Value(_round_to_byte(op, number, factor, dtype))
    if not jnp.issubdtype(dtype, jnp.integer):
        return None
    if bits == 32:
        return op.but(field=x.field)
    # A conversion to fewer bits keeps the lowest.
    if x.centered is not None and x.centered.bits == bits:
        narrow = _narrow(op, x.centered, dtype)
        if only_words:
            return Value.of(narrow ^ 2 ** (bits - 1))
        return Value(narrow ^ jnp.iinfo(dtype).min)
    if x.field is not None and x.field.bits >= bits and only_words:
        return Value.of(_narrow(op, x.field, dtype))
    return None


def _widen(op: Operation, x: Value) -> Array | None:
    if x.words is not None:
        return x.words.widen()
    widen = op.arithmetic.widen
    return None if widen is None or np.ndim(x.array) == 0 else widen(x.array)


def _narrow(op: Operation, field: _Field, dtype: Any) -> Any:
    """The lowest bits of a field, as a narrow dtype."""
    source = lax.bitcast_convert_type(field.source, jnp.int32)
    if op.arithmetic.only_words:
        return Words.of_bits(source, field.first, dtype)
    byte_of = op.arithmetic.byte_of
    if byte_of is not None and dtype.itemsize == 1 and field.first % 8 == 0:
        return byte_of(source, field.first // 8, dtype)
    return lax.shift_right_logical(source, np.int32(field.first)).astype(dtype)


def _polynomial(x: Array, *coefficients: Array) -> Array:
    """By Horner's rule. The coefficient of the highest power is the last one."""
    y = jnp.broadcast_to(coefficients[-1], x.shape)
    for coefficient in coefficients[-2::-1]:
        y = y * x + coefficient
    return y


# Operations that Pallas does not have, by others.
COMPOSITIONS = {
    "one_minus_square": lambda x: (1 + x) * (1 - x),
    "polynomial": _polynomial,
}
RULES_OF_FLOATS = {
    lax.div_p: _divide,
    lax.sqrt_p: _take_root,
    lax.sign_p: _take_sign,
    lax.round_p: _round,
    lax.mul_p: _multiply,
    lax.add_p: _add,
}
RULES_OF_BITS = {
    lax.shift_right_logical_p: _shift,
    lax.and_p: _mask,
    lax.sub_p: _subtract,
    lax.xor_p: _exclusive_or,
    lax.bitcast_convert_type_p: _bitcast,
    lax.convert_element_type_p: _convert,
}


def byte_times(byte: Value, factor: Value) -> Value:
    """By a product of floats."""
    wide = byte.array if byte.words is None else byte.words.widen()
    product = wide.astype(jnp.float32) * factor.array.astype(jnp.float32)
    return Value(product.astype(jnp.int32))


def _round_to_byte(op: Operation, x: Value, factor: float, dtype: Any) -> Array:
    """`round(x * factor)` as a byte, of numbers that fit: the addition that leaves no
    bits for a fraction rounds, and puts the integer into the lowest byte."""
    magic = np.float32(1.5 * 2.0**23 / factor)
    multiply_add = op.arithmetic.multiply_add
    if x.factors is None or multiply_add is None:
        shifted = x.array + magic
    else:
        shifted = multiply_add(*op.floats(*x.factors, Value(magic)))
    byte = lax.bitcast_convert_type(shifted, jnp.int32).astype(jnp.int8)
    return byte if dtype == jnp.int8 else lax.bitcast_convert_type(byte, dtype)
