"""Ordinary JAX in the fewest instructions of a device.

Division and square root are long guarded sequences, built around single instructions of
limited accuracy; rounding, and conversions to 8 bits, are slow, or not there at all.
This traces a function and evaluates it with shorter ones, so that rules and codecs are
written once, in plain `jax.numpy`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .. import _compat as compat
from .._common.arithmetic import (
    byte_times,
    canonical_pattern,
    Replaceable,
    rounded_quotient,
    rounded_root,
)
from . import kernel_operations as operations
from .kernel_operations import Operation, Value
from .words import Words


# A loop of so few turns, and no more, is written out.
_MOST_TURNS = 16


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
        traced = compat.Function.of(traced)
        outs = self._call(traced, [Value.of(x) for x in leaves])
        return jtu.tree_unflatten(
            jtu.tree_structure(out_shape),
            [out.array if out.words is None else out.words for out in outs],
        )

    def _call(self, function: compat.Function, args: Sequence[Value]) -> list[Value]:
        return compat.evaluate(function, args, Value.of_constant, Value, self._results)

    def _arrays(
        self, function: compat.Function, consts: Sequence[Value], *args: Array
    ) -> list[Array]:
        """The same of arrays, as a function that is traced needs it."""
        results = self._call(function, [*consts, *map(Value, args)])
        avals = [atom.aval for atom in function.jaxpr.outvars]
        return [
            jnp.asarray(x.array, aval.dtype)
            for x, aval in zip(results, avals, strict=True)
        ]

    def _results(self, eqn: Any, operands: list[Value]) -> list[Value]:
        function = Replaceable.of(eqn.primitive)
        if function is not None:
            result = self._replaced(function, operands)
            if result is not None:
                return [result]
            return self._composed(function.function, eqn, operands)
        composition = operations.COMPOSITIONS.get(eqn.primitive.name)
        if composition is not None:
            return self._composed(composition, eqn, operands)
        called = compat.called(eqn)
        if called is not None:
            return self._call(called, operands)
        match eqn.primitive.name:
            case "cond":
                return self._branch(compat.Branches.of(eqn, operands))
            case "while":
                return self._repeat(compat.While.of(eqn, operands))
            case "scan":
                return self._scan(compat.Scan.of(eqn, operands))
        return self._apply(eqn, operands)

    def _composed(
        self, function: Callable, eqn: Any, operands: Sequence[Value]
    ) -> list[Value]:
        """An operation that is a function of others."""
        traced = jax.make_jaxpr(function)(*(atom.aval for atom in eqn.invars))
        return self._call(compat.Function.of(traced), operands)

    def _replaced(
        self, function: Replaceable, operands: Sequence[Value]
    ) -> Value | None:
        """The result of a function that has another one here."""
        if function is byte_times and self.only_words:
            return operations.byte_times(*operands)
        if function is canonical_pattern and self.canonical_pattern is not None:
            pattern = self.canonical_pattern(operands[0].array)
            return Value(lax.bitcast_convert_type(pattern, jnp.uint32))
        if function is rounded_quotient:
            x, y = jnp.broadcast_arrays(*(operand.array for operand in operands))
            return Value(self.rounded_quotient(x, y))
        if function is rounded_root:
            return Value(self.rounded_root(operands[0].array))
        return None

    def _branch(self, cond: compat.Branches) -> list[Value]:
        branches = [
            functools.partial(self._arrays, branch, ()) for branch in cond.branches
        ]
        operands = [jnp.asarray(x.array) for x in cond.operands]
        index = cond.index.array
        if len(branches) == 2:
            results = lax.cond(index != 0, branches[1], branches[0], *operands)
        else:
            results = lax.switch(index, branches, *operands)
        return [Value(x) for x in results]

    def _repeat(self, loop: compat.While) -> list[Value]:
        condition, body = loop.condition, loop.body
        results = lax.while_loop(
            lambda carry: self._arrays(condition, loop.condition_consts, *carry)[0],
            lambda carry: self._arrays(body, loop.body_consts, *carry),
            [jnp.asarray(x.array) for x in loop.carry],
        )
        return [Value(x) for x in results]

    def _scan(self, loop: compat.Scan) -> list[Value]:
        if loop.length <= _MOST_TURNS:
            return self._write_out(loop)
        carried = len(loop.carry)

        def turn(carry: list[Array], xs: list[Array]) -> tuple[Any, Any]:
            results = self._arrays(loop.body, loop.consts, *carry, *xs)
            return results[:carried], results[carried:]

        carry, xs = (
            [jnp.asarray(x.array) for x in part] for part in (loop.carry, loop.xs)
        )
        carry, ys = lax.scan(turn, carry, xs, loop.length, loop.reverse)
        return [Value(x) for x in [*carry, *ys]]

    def _write_out(self, loop: compat.Scan) -> list[Value]:
        """Of a loop over constants, these are numbers then, which kernels can take."""
        carry, found = loop.carry, []
        turns = range(loop.length)
        for turn in reversed(turns) if loop.reverse else turns:
            xs = [x.part(turn) for x in loop.xs]
            results = self._call(loop.body, [*loop.consts, *carry, *xs])
            carry, ys = results[: len(carry)], results[len(carry) :]
            found.append(ys)
        if loop.reverse:
            found.reverse()
        stack = lambda values: jnp.stack([x.array for x in values])
        return [
            *carry,
            *(
                Value.later(functools.partial(stack, values))
                for values in zip(*found, strict=True)
            ),
        ]

    def _apply(self, eqn: Any, operands: list[Value]) -> list[Value]:
        rules = operations.RULES_OF_BITS
        if eqn.outvars:
            aval = eqn.outvars[0].aval
            if aval.dtype == jnp.float32 and aval.ndim > 0:
                rules = operations.RULES_OF_FLOATS | rules

        rule = rules.get(eqn.primitive)
        if rule is not None:
            op = Operation(self, eqn, lambda: _bound(eqn, operands)[0])
            value = rule(op, *operands)
            if value is not None:
                return [value]
        return [Value(x) for x in _bound(eqn, operands)]


def _bound(eqn: Any, operands: Sequence[Value]) -> list[Any]:
    """The operation as it is, of arrays."""
    primitive = eqn.primitive
    arrays = [operand.array for operand in operands]
    params = primitive.get_bind_params(eqn.params)
    if any(np.ndim(x) > 0 for x in arrays):
        if not any(isinstance(x, jax.Array) for x in arrays):
            # Of constants, of which kernels take no arrays.
            with jax.ensure_compile_time_eval():
                results = primitive.bind(*arrays, **params)
            return [np.asarray(x)[()] for x in jtu.tree_leaves(results)]
        arrays = map(operations.filled, arrays)
    results = primitive.bind(*arrays, **params)
    return results if primitive.multiple_results else [results]
