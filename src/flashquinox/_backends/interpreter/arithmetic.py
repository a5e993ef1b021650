"""Ordinary JAX in the fewest instructions of a device.

In plain XLA, a division or a square root is a long guarded sequence around a single
instruction of limited accuracy; rounding and conversions to 8 bits are slow, or missing
on some devices. An `Arithmetic` evaluates a function with shorter sequences, so that
rules and codecs are written once, in plain `jax.numpy`.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from ... import _compat
from ..._common.arithmetic import (
    byte_times,
    canonical_pattern,
    nearest_int8,
    nearest_uint8,
    Replaceable,
    rounded_quotient,
    rounded_root,
)
from . import control_flow, operations
from .values import results, Value
from .words import Words


# `isinstance(x, Words)`, as a function that is not Python's: it is called for every
# part of every tree.
_is_words = functools.partial(type.__instancecheck__, Words)
# What gives the results of an operation, or `None` to leave it as it is.
Rule: TypeAlias = Callable[["Arithmetic", Any, list[Value]], list[Value] | None]


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What a device does in few instructions. `None` leaves an operation as it is."""

    # A division is the product with it.
    reciprocal: Callable[[Array], Array] | None = None
    square_root: Callable[[Array], Array] | None = None
    sign: Callable[[Array], Array] | None = None
    # The bits of numbers that arithmetic has made, with one pattern for NaN.
    canonical_pattern: Callable[[Array], Array] | None = None
    # Whether there are no instructions for bytes, nor for products of integers.
    only_words: bool = False

    @property
    def exact(self) -> "Arithmetic":
        """The same without approximations."""
        return Arithmetic(only_words=self.only_words)

    def evaluate(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` with this arithmetic: see `trace`."""
        return self.trace(function, *args)(*args)

    def trace(
        self,
        function: Callable[..., Any],
        *args: Any,
        static: Mapping[str, Hashable] | None = None,
        **kwargs: Any,
    ) -> "Program":
        """`function(*args, **kwargs, **static)` with this arithmetic, of trees of
        arrays (and of [`Words`][], which the function takes as arrays): a program for
        these and other arguments of the same structure, shapes and dtypes.

        JAX caches two stages: what the function is in plain JAX, and what it is with
        this arithmetic. So `function` should be one of a module, and depend on nothing
        but its arguments; nothing that was found out about others is found again.
        """
        static = static or {}
        leaves, structure = jtu.tree_flatten((args, kwargs), is_leaf=_is_words)
        shapes = [
            jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Words) else x
            for x in leaves
        ]
        shape_args, shape_kwargs = jtu.tree_unflatten(structure, shapes)
        plain = _jitted(function, tuple(static)).trace(
            *shape_args, **shape_kwargs, **static
        )
        # Numbers that are known now, which some rules ask for.
        constants = tuple(
            [
                None if isinstance(x, jax.Array | Words) else _Constant.of(x)
                for x in leaves
            ]
        )
        arrays = [x for x in leaves if isinstance(x, jax.Array | Words)]
        own = _evaluate.trace(self, plain.jaxpr, constants, arrays)
        return Program(
            _compat.as_function(own.jaxpr),
            jtu.tree_structure(own.out_info),
            jtu.tree_structure(plain.out_info),
        )

    def call(self, function: _compat.Function, args: Sequence[Value]) -> list[Value]:
        """The results of a traced function."""
        jaxpr = function.jaxpr
        constants = [Value.of_constant(x) for x in function.consts]
        variables = [*jaxpr.constvars, *jaxpr.invars]
        values = dict(zip(variables, [*constants, *args], strict=True))
        for eqn in jaxpr.eqns:
            operands = [
                Value(x.val) if isinstance(x, _compat.Literal) else values[x]
                for x in eqn.invars
            ]
            primitive = eqn.primitive
            rule = _rule_of(primitive)
            if primitive in operations.RULES_OF_FLOATS:
                aval = eqn.outvars[0].aval
                if aval.dtype != jnp.float32 or not aval.shape:
                    rule = None
            found = None if rule is None else rule(self, eqn, operands)
            if found is None:
                arrays = [x.held if x.make is None else x.array for x in operands]
                constant_arrays = [
                    x
                    for x in arrays
                    if not isinstance(x, jax.Array) and getattr(x, "shape", ())
                ]
                if constant_arrays or primitive.multiple_results:
                    found = results(eqn, operands)
                else:
                    # Most operations: here, for no call of a function.
                    params = primitive.get_bind_params(eqn.params)
                    found = [Value(primitive.bind(*arrays, **params))]
            values.update(zip(eqn.outvars, found, strict=True))
        return [
            Value(x.val) if isinstance(x, _compat.Literal) else values[x]
            for x in jaxpr.outvars
        ]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function with an arithmetic. Numbers among its arguments are those that it was
    traced with."""

    function: Callable[..., list[Any]]
    # The structures of the results: with words as trees, and with words as leaves.
    words_structure: Any
    structure: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jtu.tree_leaves((args, kwargs))
        found = self.function(*[x for x in leaves if isinstance(x, jax.Array)])
        found = [x if isinstance(x, jax.Array) else np.asarray(x)[()] for x in found]
        return self.structure.unflatten(self.words_structure.unflatten(found))


@dataclasses.dataclass(frozen=True)
class _Constant:
    """A number. Those of equal bits are equal: 0.0 is not -0.0, nor 0."""

    number: Any = dataclasses.field(compare=False)
    bits: tuple[str, tuple[int, ...], bytes]

    @staticmethod
    def of(x: Any) -> "_Constant":
        array = np.asarray(x)
        kind = f"{type(x).__name__} {array.dtype}"
        return _Constant(x, (kind, array.shape, array.tobytes()))


@functools.lru_cache(maxsize=512)
def _jitted(function: Callable, static: tuple[str, ...]) -> Any:
    return jax.jit(function, static_argnames=static)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _evaluate(
    arithmetic: Arithmetic,
    jaxpr: Any,
    constants: tuple[_Constant | None, ...],
    arrays: list[Array | Words],
) -> list[Array | Words]:
    """The results of what `jax.jit` traced. `constants` has an entry for each argument:
    `None` stands for the next one of `arrays`."""
    rest = iter(arrays)
    args = [Value.of(next(rest) if x is None else x.number) for x in constants]
    found = arithmetic.call(_compat.Function.of(jaxpr), args)
    return [x.array if x.words is None else x.words for x in found]


#
# Which operations are replaced, and how
#


@functools.cache
def _rule_of(primitive: Any) -> Rule | None:
    """Found once for each operation."""
    function = Replaceable.of(primitive)
    if function is not None:
        return functools.partial(_replace, function)
    composition = operations.COMPOSITIONS.get(primitive.name)
    if composition is not None:
        return functools.partial(_compose, composition)
    if primitive.name in _compat.CALLS:
        return _enter
    rules = control_flow.RULES, operations.RULES_OF_FLOATS, operations.RULES_OF_BITS
    keys = primitive.name, primitive, primitive
    found = [of[key] for of, key in zip(rules, keys, strict=True) if key in of]
    return found[0] if found else None


def _replace(
    function: Replaceable, arithmetic: Arithmetic, eqn: Any, operands: list[Value]
) -> list[Value]:
    """A function that devices may have another one for."""
    if function is byte_times and arithmetic.only_words:
        return [operations.byte_times(*operands)]
    if function is canonical_pattern and arithmetic.canonical_pattern is not None:
        pattern = arithmetic.canonical_pattern(operands[0].array)
        return [Value(lax.bitcast_convert_type(pattern, jnp.uint32))]
    if function in (nearest_int8, nearest_uint8):
        nearest = _nearest(eqn.outvars[0].aval.dtype)
        return _compose(nearest, arithmetic, eqn, operands)
    if function is rounded_quotient:
        x, y = jnp.broadcast_arrays(*[operand.array for operand in operands])
        return [Value(lax.div(x, y))]
    if function is rounded_root:
        return [Value(lax.sqrt(operands[0].array))]
    return _compose(function.function, arithmetic, eqn, operands)


@functools.cache
def _nearest(dtype: Any) -> Callable[[Array], Array]:
    """Whose two operations are replaced together."""
    return lambda x: jnp.round(x).astype(dtype)


def _compose(
    function: Callable[..., Array],
    arithmetic: Arithmetic,
    eqn: Any,
    operands: list[Value],
) -> list[Value]:
    """An operation that is a function of others."""
    avals = [x.aval for x in eqn.invars]
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in avals
    ]
    traced = _jitted(function, ()).trace(*shapes)
    return arithmetic.call(_compat.Function.of(traced.jaxpr), operands)


def _enter(arithmetic: Arithmetic, eqn: Any, operands: list[Value]) -> list[Value]:
    """An operation that only calls a function."""
    called = _compat.called(eqn)
    assert called is not None
    return arithmetic.call(called, operands)
