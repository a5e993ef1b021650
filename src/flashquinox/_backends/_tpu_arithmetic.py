"""Ordinary JAX in the fewest instructions of a TPU's vector unit.

Division and square root are long guarded sequences there, built around single
instructions of limited accuracy; so are rounding, and conversions to 8 bits. This
traces a function and evaluates it with shorter ones, so that rules and codecs are
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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32


# JAX moved it.
_pallas_reciprocal = (pltpu if hasattr(pltpu, "reciprocal") else pl).reciprocal


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a generation of TPUs divides and takes square roots."""

    # `None` leaves division and the square root as they are.
    reciprocal: Callable[[Array], Array] | None
    square_root: Callable[[Array], Array] | None

    @staticmethod
    def of(generation: int | None) -> "Arithmetic":
        """That of a generation (4, 5, 6, 7); of an unknown one, what all can do.

        All have an instruction for reciprocals. Its relative error is at most 2^-15 in
        the oldest. From the sixth on, `rsqrt` is one instruction without guards.
        Before, logarithms and powers are; the relative error of the root is 5e-5, half
        of the logarithm's absolute one.
        """
        if generation is not None and generation >= 6:
            return Arithmetic(_reciprocal, lambda x: _reciprocal(lax.rsqrt(x)))
        return Arithmetic(_reciprocal, lambda x: lax.exp2(0.5 * jnp.log2(x)))

    @staticmethod
    def exact() -> "Arithmetic":
        """Where no TPU is at hand."""
        return Arithmetic(None, None)

    def evaluate(self, function: Callable, *args: Any) -> Any:
        """`function(*args)`, of arrays in trees."""
        leaves, structure = jtu.tree_flatten(args)
        traced, out_shape = jax.make_jaxpr(
            lambda *leaves: function(*jtu.tree_unflatten(structure, leaves)),
            return_shape=True,
        )(*leaves)
        outs = self._evaluate(
            traced.jaxpr,
            [_Value(x) for x in traced.consts],
            [_Value(x) for x in leaves],
        )
        return jtu.tree_unflatten(
            jtu.tree_structure(out_shape), [out.array for out in outs]
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
            if inner is not None:
                consts = [_Value(x) for x in inner.consts]
                results = self._evaluate(inner.jaxpr, consts, operands)
            else:
                results = self._apply(eqn, operands)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: Any, operands: list["_Value"]) -> list["_Value"]:
        name, params, aval = eqn.primitive.name, eqn.params, eqn.outvars[0].aval
        elementwise = aval.dtype == jnp.float32 and aval.ndim > 0

        def default() -> list[_Value]:
            arrays = [operand.array for operand in operands]
            results = eqn.primitive.bind(*arrays, **params)
            if not eqn.primitive.multiple_results:
                results = [results]
            return [_Value(x) for x in results]

        if name == "div" and elementwise and self.reciprocal is not None:
            x, y = (operand.array for operand in operands)
            y = self.reciprocal(jnp.broadcast_to(y, aval.shape))
            return [_Value(x * y)]
        if name == "sqrt" and elementwise and self.square_root is not None:
            return [_Value(self.square_root(operands[0].array))]
        if name == "sign" and elementwise:
            # 2^126 times the smallest normal number is 1.
            x = operands[0].array * np.float32(2.0**126)
            return [_Value(jnp.clip(x, -1, 1))]
        if name == "round" and elementwise and _is_to_even(params):
            x = operands[0].product or (operands[0].array, 1.0)
            return [_Value.later(lambda: default()[0].array, rounded=x)]
        if name == "mul" and elementwise:
            for x, y in (operands, operands[::-1]):
                if _is_power_of_two(y):
                    product = (x.array, float(y.array))
                    return [_Value.later(lambda: default()[0].array, product=product)]
        if name == "and":
            for mask in (0xFF, 0xFFFF):
                if operands[1].is_constant(mask):
                    (result,) = default()
                    bits = operands[0].array, mask
                    return [dataclasses.replace(result, low_bits=bits)]
        if name == "sub" and operands[0].low_bits is not None:
            x, mask = operands[0].low_bits
            if operands[1].is_constant((mask + 1) // 2):
                (result,) = default()
                return [dataclasses.replace(result, centered=(x, mask))]
        if name == "convert_element_type":
            (operand,), dtype = operands, params["new_dtype"]
            if operand.rounded is not None and dtype in (jnp.int8, jnp.uint8):
                return [_Value(_round_to_byte(*operand.rounded, dtype))]
            if operand.low_bits is not None and dtype == jnp.int32:
                (result,) = default()
                return [dataclasses.replace(result, low_bits=operand.low_bits)]
            if operand.centered is not None and dtype in (jnp.int8, jnp.int16):
                x, mask = operand.centered
                least = jnp.iinfo(dtype).min
                if mask + 1 == -2 * least:
                    # The conversion keeps just those bits.
                    narrow = lax.bitcast_convert_type(x, jnp.int32).astype(dtype)
                    return [_Value(narrow ^ least)]
        return default()


@dataclasses.dataclass
class _Value:
    """An array, or how to make it, and what is known of it."""

    _array: Any
    _make: Callable[[], Array] | None = None
    # x and c, of an array that is x * c with a power of two c.
    product: tuple[Array, float] | None = None
    # The same, of an array that is x * c rounded to integers.
    rounded: tuple[Array, float] | None = None
    # x and m, of an array that is x & m, for a mask of low bits.
    low_bits: tuple[Array, int] | None = None
    # The same, of an array that is x & m, less (m + 1) / 2.
    centered: tuple[Array, int] | None = None

    @staticmethod
    def later(make: Callable[[], Array], **known: Any) -> "_Value":
        return _Value(None, make, **known)

    @property
    def array(self) -> Any:
        if self._make is not None:
            self._array, self._make = self._make(), None
        return self._array

    def is_constant(self, *values: int) -> bool:
        known = self._make is None and not isinstance(self._array, jax.Array)
        return known and np.ndim(self._array) == 0 and int(self._array) in values


def _called(eqn: Any) -> Any:
    """The jaxpr of a function that is only called."""
    if eqn.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
        return eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    return None


def _is_to_even(params: dict[str, Any]) -> bool:
    return params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN


def _is_power_of_two(value: _Value) -> bool:
    if value._make is not None or isinstance(value._array, jax.Array):
        return False
    return np.ndim(value._array) == 0 and bool(np.frexp(value._array)[0] == 0.5)


def _reciprocal(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return _pallas_reciprocal(x, approx=True)


def _round_to_byte(x: Float32[Array, "*shape"], factor: float, dtype: Any) -> Array:
    """`round(x * factor)` as a byte, of numbers that fit: the addition that leaves no
    bits for a fraction rounds, and puts the integer into the lowest byte."""
    shifted = x + np.float32(1.5 * 2.0**23 / factor)
    byte = lax.bitcast_convert_type(shifted, jnp.int32).astype(jnp.int8)
    return byte if dtype == jnp.int8 else lax.bitcast_convert_type(byte, dtype)
