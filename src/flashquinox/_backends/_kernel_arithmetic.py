"""Ordinary JAX in the fewest instructions of a device.

Division and square root are long guarded sequences, built around single instructions of
limited accuracy; rounding, and conversions to 8 bits, are slow, or not there at all.
This traces a function and evaluates it with shorter ones, so that rules and codecs are
written once, in plain `jax.numpy`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._arithmetic import (
    BYTE_TIMES,
    CANONICAL_PATTERN,
    ROUNDED_QUOTIENT,
    ROUNDED_ROOT,
)
from ._tpu_words import Words


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What a device does in few instructions. `None` leaves an operation as it is."""

    # A division is the product with it.
    reciprocal: Callable[[Array], Array] | None = None
    square_root: Callable[[Array], Array] | None = None
    # Of arrays of one shape. These two are no approximations.
    rounded_quotient: Callable[[Array, Array], Array] = lax.div
    rounded_root: Callable[[Array], Array] = lax.sqrt
    sign: Callable[[Array], Array] | None = None
    # To the nearest integer, halves to even, where that is not a byte afterwards.
    round: Callable[[Array], Array] | None = None
    # x y + z.
    multiply_add: Callable[[Array, Array, Array], Array] | None = None
    # An array of narrow integers or floats in 32 bits. `None` for other dtypes.
    widen: Callable[[Array], Array | None] | None = None
    # The byte with an index, from the lowest, of an array of 32-bit integers, as an
    # 8-bit dtype.
    byte_of: Callable[[Array, int, Any], Array] | None = None
    # The bits of numbers that arithmetic has made, with one pattern for NaN.
    canonical_pattern: Callable[[Array], Array] | None = None
    # Whether there are no instructions for bytes, nor for products of integers.
    only_words: bool = False

    @property
    def exact(self) -> "Arithmetic":
        """The same without approximations."""
        return Arithmetic(only_words=self.only_words)

    def evaluate(self, function: Callable, *args: Any) -> Any:
        """`function(*args)`, of arrays (and [`Words`][], which are leaves) in trees."""
        leaves, structure = jtu.tree_flatten(args)
        shapes = [
            jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Words) else x
            for x in leaves
        ]
        traced, out_shape = jax.make_jaxpr(
            lambda *leaves: function(*jtu.tree_unflatten(structure, leaves)),
            return_shape=True,
        )(*shapes)
        outs = self._evaluate(
            traced.jaxpr,
            [_Value(x) for x in traced.consts],
            [_Value.of(x) for x in leaves],
        )
        return jtu.tree_unflatten(
            jtu.tree_structure(out_shape),
            [out.array if out.words is None else out.words for out in outs],
        )

    def _evaluate(
        self, jaxpr: Any, consts: Sequence["_Value"], args: Sequence["_Value"]
    ) -> list["_Value"]:
        inputs = zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
        values = dict(inputs)

        def read(atom: Any) -> _Value:
            return _Value(atom.val) if isinstance(atom, jex.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            inner = _called(eqn)
            if inner is None:
                results = self._apply(eqn, operands)
            elif (named := self._named(eqn, operands)) is not None:
                results = [named]
            else:
                consts = [_Value(x) for x in inner.consts]
                results = self._evaluate(inner.jaxpr, consts, operands)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _named(self, eqn: Any, operands: list["_Value"]) -> "_Value | None":
        """The result of a function that has another one here."""
        name = eqn.params.get("name")
        if name == BYTE_TIMES and self.only_words:
            return _byte_times(*operands)
        if name == CANONICAL_PATTERN and self.canonical_pattern is not None:
            pattern = self.canonical_pattern(operands[0].array)
            return _Value(lax.bitcast_convert_type(pattern, jnp.uint32))
        if name == ROUNDED_QUOTIENT:
            x, y = jnp.broadcast_arrays(*(operand.array for operand in operands))
            return _Value(self.rounded_quotient(x, y))
        if name == ROUNDED_ROOT:
            return _Value(self.rounded_root(operands[0].array))
        return None

    def _apply(self, eqn: Any, operands: list["_Value"]) -> list["_Value"]:
        aval = eqn.outvars[0].aval
        rules = _rules_of_bits
        if aval.dtype == jnp.float32 and aval.ndim > 0:
            rules = _rules_of_floats | rules

        def default() -> list[Any]:
            arrays = [operand.array for operand in operands]
            results = eqn.primitive.bind(*arrays, **eqn.params)
            return results if eqn.primitive.multiple_results else [results]

        rule = rules.get(eqn.primitive.name)
        if rule is not None:
            op = _Operation(self, eqn, lambda: default()[0])
            value = rule(op, *operands)
            if value is not None:
                return [value]
        return [_Value(x) for x in default()]


@dataclasses.dataclass
class _Value:
    """An array, or how to make it, and what is known of it."""

    _array: Any
    _make: Callable[[], Array] | None = None
    # Of an array of a narrow dtype.
    words: Words | None = None
    # x and y, of an array that is x * y.
    factors: tuple["_Value", "_Value"] | None = None
    # x and c, of an array that is x * c with a power of two c.
    scaled: tuple["_Value", float] | None = None
    # The same, of an array that is x * c rounded to integers.
    rounded: tuple["_Value", float] | None = None
    # Of an array that holds some bits of another one.
    field: "_Field | None" = None
    # The same, of an array that is a field of n bits less 2^(n - 1).
    centered: "_Field | None" = None

    @staticmethod
    def of(x: Any) -> "_Value":
        if isinstance(x, Words):
            return _Value(None, lambda: x.widen().astype(x.dtype), words=x)
        return _Value(x)

    @staticmethod
    def later(make: Callable[[], Array], **known: Any) -> "_Value":
        return _Value(None, make, **known)

    @property
    def array(self) -> Any:
        if self._make is not None:
            self._array, self._make = self._make(), None
        return self._array

    @property
    def constant(self) -> Any:
        """The number, if it is one. No array."""
        known = self._make is None and not isinstance(self._array, jax.Array)
        return self._array if known and np.ndim(self._array) == 0 else None


@dataclasses.dataclass(frozen=True)
class _Field:
    """Bits of the elements of an array: from `first` upward."""

    source: Array
    first: int
    bits: int


@dataclasses.dataclass(frozen=True)
class _Operation:
    """One of a function, to be replaced."""

    arithmetic: Arithmetic
    eqn: Any
    default: Callable[[], Array]

    @property
    def width(self) -> int:
        """Of an element of the first operand, in bytes."""
        return self.eqn.invars[0].aval.dtype.itemsize

    def floats(self, *values: _Value) -> list[Array]:
        """Of the shape of the result."""
        shape = self.eqn.outvars[0].aval.shape
        return [
            jnp.broadcast_to(jnp.asarray(x.array, jnp.float32), shape) for x in values
        ]

    def but(self, **known: Any) -> _Value:
        """The operation as it is, and what is known of its result."""
        return _Value.later(self.default, **known)


# Each gives the value of an operation, or `None` to leave it as it is.


def _divide(op: _Operation, x: _Value, y: _Value) -> _Value | None:
    reciprocal = op.arithmetic.reciprocal
    if reciprocal is None:
        return None
    inverse = _Value(reciprocal(*op.floats(y)))
    return _Value.later(lambda: x.array * inverse.array, factors=(x, inverse))


def _take_root(op: _Operation, x: _Value) -> _Value | None:
    root = op.arithmetic.square_root
    return None if root is None else _Value(root(x.array))


def _take_sign(op: _Operation, x: _Value) -> _Value | None:
    sign = op.arithmetic.sign
    return None if sign is None else _Value(sign(x.array))


def _round(op: _Operation, x: _Value) -> _Value | None:
    if op.eqn.params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        return None
    own = op.arithmetic.round
    make = op.default if own is None else lambda: own(x.array)
    return _Value.later(make, rounded=x.scaled or (x, 1.0))


def _multiply(op: _Operation, *operands: _Value) -> _Value | None:
    scaled = None
    for x, y in (operands, operands[::-1]):
        factor = y.constant
        if factor is not None and np.frexp(factor)[0] == 0.5:
            scaled = (x, float(factor))
    return op.but(factors=operands, scaled=scaled)


def _add(op: _Operation, *operands: _Value) -> _Value | None:
    multiply_add = op.arithmetic.multiply_add
    if multiply_add is None:
        return None
    for product, other in (operands[::-1], operands):
        if product.factors is not None:
            return _Value(multiply_add(*op.floats(*product.factors, other)))
    return None


def _shift(op: _Operation, x: _Value, distance: _Value) -> _Value | None:
    if distance.constant is None or op.width != 4:
        return None
    first = int(distance.constant)
    return op.but(field=_Field(x.array, first, 32 - first))


def _mask(op: _Operation, x: _Value, mask: _Value) -> _Value | None:
    if mask.constant is None or op.width != 4:
        return None
    field = x.field or _Field(x.array, 0, 32)
    bits = int(mask.constant).bit_length()
    if int(mask.constant) != 2**bits - 1 or bits > field.bits:
        return None
    return op.but(field=_Field(field.source, field.first, bits))


def _subtract(op: _Operation, x: _Value, y: _Value) -> _Value | None:
    if x.field is None or y.constant is None:
        return None
    if int(y.constant) != 2 ** (x.field.bits - 1):
        return None
    return op.but(centered=x.field)


def _exclusive_or(op: _Operation, x: _Value, y: _Value) -> _Value | None:
    del op
    if x.words is None or y.constant is None:
        return None
    return _Value.of(x.words ^ int(y.constant))


def _bitcast(op: _Operation, x: _Value) -> _Value | None:
    if x.words is None:
        return None
    return _Value.of(x.words.bitcast(op.eqn.params["new_dtype"]))


def _convert(op: _Operation, x: _Value) -> _Value | None:
    dtype = op.eqn.params["new_dtype"]
    only_words = op.arithmetic.only_words
    bits = 8 * dtype.itemsize
    if bits == 32:
        wide = _widen(op, x)
        if wide is not None:
            return _Value(wide.astype(dtype))
    if x.rounded is not None and dtype in (jnp.int8, jnp.uint8):
        number, factor = x.rounded
        if only_words:
            return _Value.of(Words.of_rounded(number.array, factor, dtype))
        return _Value(_round_to_byte(op, number, factor, dtype))
    if not jnp.issubdtype(dtype, jnp.integer):
        return None
    if bits == 32:
        return op.but(field=x.field)
    # A conversion to fewer bits keeps the lowest.
    if x.centered is not None and x.centered.bits == bits:
        narrow = _narrow(op, x.centered, dtype)
        if only_words:
            return _Value.of(narrow ^ 2 ** (bits - 1))
        return _Value(narrow ^ jnp.iinfo(dtype).min)
    if x.field is not None and x.field.bits >= bits and only_words:
        return _Value.of(_narrow(op, x.field, dtype))
    return None


def _widen(op: _Operation, x: _Value) -> Array | None:
    if x.words is not None:
        return x.words.widen()
    widen = op.arithmetic.widen
    return None if widen is None or np.ndim(x.array) == 0 else widen(x.array)


def _narrow(op: _Operation, field: _Field, dtype: Any) -> Any:
    """The lowest bits of a field, as a narrow dtype."""
    source = lax.bitcast_convert_type(field.source, jnp.int32)
    if op.arithmetic.only_words:
        return Words.of_bits(source, field.first, dtype)
    byte_of = op.arithmetic.byte_of
    if byte_of is not None and dtype.itemsize == 1 and field.first % 8 == 0:
        return byte_of(source, field.first // 8, dtype)
    return lax.shift_right_logical(source, np.int32(field.first)).astype(dtype)


_rules_of_floats = {
    "div": _divide,
    "sqrt": _take_root,
    "sign": _take_sign,
    "round": _round,
    "mul": _multiply,
    "add": _add,
}
_rules_of_bits = {
    "shift_right_logical": _shift,
    "and": _mask,
    "sub": _subtract,
    "xor": _exclusive_or,
    "bitcast_convert_type": _bitcast,
    "convert_element_type": _convert,
}


def _byte_times(byte: _Value, factor: _Value) -> _Value:
    """By a product of floats."""
    wide = byte.array if byte.words is None else byte.words.widen()
    product = wide.astype(jnp.float32) * factor.array.astype(jnp.float32)
    return _Value(product.astype(jnp.int32))


def _called(eqn: Any) -> Any:
    """The jaxpr of a function that is only called. `None` for other equations."""
    if eqn.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
        return eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    return None


def _round_to_byte(op: _Operation, x: _Value, factor: float, dtype: Any) -> Array:
    """`round(x * factor)` as a byte, of numbers that fit: the addition that leaves no
    bits for a fraction rounds, and puts the integer into the lowest byte."""
    magic = np.float32(1.5 * 2.0**23 / factor)
    multiply_add = op.arithmetic.multiply_add
    if x.factors is None or multiply_add is None:
        shifted = x.array + magic
    else:
        shifted = multiply_add(*op.floats(*x.factors, _Value(magic)))
    byte = lax.bitcast_convert_type(shifted, jnp.int32).astype(jnp.int8)
    return byte if dtype == jnp.int8 else lax.bitcast_convert_type(byte, dtype)
