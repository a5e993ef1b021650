"""The operations of ordinary JAX that kernels replace by fewer instructions.

Each rule gives the results of an operation, or `None` to leave it as it is.
"""

from functools import partial
from typing import Any, TYPE_CHECKING

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..._common.arithmetic import WITHOUT_FRACTION
from .values import apply, Field, Value
from .words import Words


if TYPE_CHECKING:
    from .arithmetic import Arithmetic


def _floats(eqn: Any, *values: Value) -> list[Array]:
    """These values in the shape of the result."""
    shape = eqn.outvars[0].aval.shape
    return [jnp.broadcast_to(jnp.asarray(x.array, jnp.float32), shape) for x in values]


#
# Of arrays of float32
#


def _divide(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    if arithmetic.reciprocal is None:
        return None
    x, y = operands
    inverse = Value(arithmetic.reciprocal(*_floats(eqn, y)))
    return [Value(None, lambda: x.array * inverse.array)]


def _take_root(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    del eqn
    root = arithmetic.square_root
    return None if root is None else [Value(root(operands[0].array))]


def _take_sign(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    del eqn
    sign = arithmetic.sign
    return None if sign is None else [Value(sign(operands[0].array))]


def _round(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    del arithmetic
    if eqn.params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        return None
    (x,) = operands
    rounded = x.scaled or (x, 1.0)
    return [Value(None, partial(apply, eqn, operands), rounded=rounded)]


def _multiply(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    del arithmetic
    scaled = None
    for x, y in (operands, operands[::-1]):
        factor = y.constant
        if factor is not None and np.frexp(factor)[0] == 0.5:
            scaled = (x, float(factor))
    return [Value(None, partial(apply, eqn, operands), scaled=scaled)]


#
# Of bits
#


def _width(eqn: Any) -> int:
    """Of an element of the first operand, in bytes."""
    return eqn.invars[0].aval.dtype.itemsize


def _shift(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    del arithmetic
    x, distance = operands[0], operands[1].constant
    if distance is None or _width(eqn) != 4:
        return None
    first = int(distance)
    return [
        Value(
            None, partial(apply, eqn, operands), field=Field(x.array, first, 32 - first)
        )
    ]


def _mask(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    del arithmetic
    x, mask = operands[0], operands[1].constant
    if mask is None or _width(eqn) != 4:
        return None
    field = x.field or Field(x.array, 0, 32)
    bits = int(mask).bit_length()
    if int(mask) != 2**bits - 1 or bits > field.bits:
        return None
    return [Value(None, partial(apply, eqn, operands), field=field._replace(bits=bits))]


def _subtract(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    del arithmetic
    field, y = operands[0].field, operands[1]
    if field is None or y.constant is None:
        return None
    if int(y.constant) != 2 ** (field.bits - 1):
        return None
    return [Value(None, partial(apply, eqn, operands), centered=field)]


def _exclusive_or(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    del arithmetic, eqn
    x, y = operands
    if x.words is None or y.constant is None:
        return None
    return [Value.of(x.words ^ int(y.constant))]


def _bitcast(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    del arithmetic
    words = operands[0].words
    if words is None:
        return None
    return [Value.of(words.bitcast(eqn.params["new_dtype"]))]


def _convert(
    arithmetic: "Arithmetic", eqn: Any, operands: list[Value]
) -> list[Value] | None:
    (x,), dtype = operands, eqn.params["new_dtype"]
    only_words = arithmetic.only_words
    bits = 8 * dtype.itemsize
    if bits == 32 and x.words is not None:
        return [Value(x.words.widen().astype(dtype))]
    if x.rounded is not None and dtype in (jnp.int8, jnp.uint8):
        number, factor = x.rounded
        if only_words:
            return [Value.of(Words.of_rounded(number.array, factor, dtype))]
        return [Value(_rounded_to_byte(number, factor, dtype))]
    if not jnp.issubdtype(dtype, jnp.integer):
        return None
    if bits == 32:
        return [Value(None, partial(apply, eqn, operands), field=x.field)]
    # A conversion to fewer bits keeps the lowest.
    if x.centered is not None and x.centered.bits == bits:
        narrow = _narrow(arithmetic, x.centered, dtype)
        if only_words:
            return [Value.of(narrow ^ 2 ** (bits - 1))]
        return [Value(narrow ^ jnp.iinfo(dtype).min)]
    if x.field is not None and x.field.bits >= bits and only_words:
        return [Value.of(_narrow(arithmetic, x.field, dtype))]
    return None


def _narrow(arithmetic: "Arithmetic", field: Field, dtype: Any) -> Any:
    """The lowest bits of a field, as a narrow dtype."""
    source = lax.bitcast_convert_type(field.source, jnp.int32)
    if arithmetic.only_words:
        return Words.of_bits(source, field.first, dtype)
    return lax.shift_right_logical(source, np.int32(field.first)).astype(dtype)


def _rounded_to_byte(x: Value, factor: float, dtype: Any) -> Array:
    """`round(x * factor)` as a byte, of numbers that fit: the addition that leaves no
    bits for a fraction rounds, and puts the integer into the lowest byte."""
    large = WITHOUT_FRACTION / np.float32(factor)
    byte = lax.bitcast_convert_type(x.array + large, jnp.int32).astype(jnp.int8)
    return byte if dtype == jnp.int8 else lax.bitcast_convert_type(byte, dtype)


def byte_times(byte: Value, factor: Value) -> Value:
    """The product of bytes and integers, by one of floats."""
    wide = byte.array if byte.words is None else byte.words.widen()
    product = wide.astype(jnp.float32) * factor.array.astype(jnp.float32)
    return Value(product.astype(jnp.int32))


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
}
RULES_OF_BITS = {
    lax.shift_right_logical_p: _shift,
    lax.and_p: _mask,
    lax.sub_p: _subtract,
    lax.xor_p: _exclusive_or,
    lax.bitcast_convert_type_p: _bitcast,
    lax.convert_element_type_p: _convert,
}
