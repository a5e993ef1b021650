"""A traced function as statements of C++.

A thread has some elements of one group, and computes with them in loops: all that the
function does between two reductions over the group is one loop. What is the same for
all elements of a group, or of a leaf, is computed beside the loops.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import _compat
from ..base import Unsupported
from . import control_flow
from .expressions import Call, expression
from .types import is_narrow, literal, Operand, type_of
from .values import (
    declared,
    indented,
    Kind,
    STACKED,
    Statement,
    texts_of,
    Value,
    VARIED,
)


_REDUCTIONS = {"reduce_max": "maximum", "reduce_min": "minimum"}
# Operations that change a shape alone.
_SAME_ELEMENTS = frozenset({"broadcast_in_dim", "reshape", "squeeze", "expand_dims"})


class Walk:
    """The statements of a function, in its order."""

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        self.statements: list[Statement] = []
        # Of variables.
        self._numbers = itertools.count() if numbers is None else numbers

    def nested(self) -> "Walk":
        """The statements of a function that is a part of this one."""
        return Walk(self._numbers)

    def call(self, function: _compat.Function, args: Sequence[Value]) -> list[Value]:
        """The results of a function."""
        known = self.known
        return _compat.evaluate(function, args, known, known, self._apply)

    def known(self, x: Any) -> Value:
        """A constant. Of arrays, all elements are the same, but where a loop takes them
        one after the other."""
        array = np.asarray(x, jnp.result_type(x))
        # NaN is equal to NaN here.
        if len({element.tobytes() for element in array.ravel()[:, None]}) == 1:
            text = literal(array.flat[0])
        else:
            text = VARIED
        return Value(text, array.dtype, Kind.LEAF, constant=array)

    def _apply(self, eqn: Any, operands: list[Value]) -> Sequence[Value]:
        name = eqn.primitive.name
        if name in control_flow.RULES:
            return control_flow.RULES[name](self, eqn, operands)
        called = _compat.called(eqn)
        if called is not None:
            return self.call(called, operands)
        if any([x.text == VARIED for x in operands]):
            return self._compute(eqn, operands)
        if name in _SAME_ELEMENTS:
            (value,) = operands[:1]
            if Kind.of(eqn.outvars[0].aval.shape) < value.kind:
                raise Unsupported(f"the operation `{name}` of fewer elements")
            return [value]
        if name == "optimization_barrier":
            return operands
        if name in _REDUCTIONS:
            return [self._reduce(_REDUCTIONS[name], operands[0])]
        (aval,) = [x.aval for x in eqn.outvars]

        target = self.new(aval.dtype, operands)

        def lines(texts: Sequence[str]) -> list[str]:
            call = Call(
                name,
                eqn.params,
                [
                    Operand(text, x.dtype, x.kind == Kind.LEAF)
                    for text, x in zip(texts, operands, strict=True)
                ],
                aval.dtype,
            )
            return [f"const {declared(target)} = {expression(eqn.primitive, call)};"]

        self.add([target], operands, lines)
        return [target]

    def _compute(self, eqn: Any, operands: list[Value]) -> list[Value]:
        """What is known now of constants whose elements differ."""
        if any([x.constant is None or x.constant is STACKED for x in operands]):
            raise Unsupported(f"the operation `{eqn.primitive.name}` of an array")
        with jax.ensure_compile_time_eval():
            arrays = [
                jnp.asarray(x.constant)
                if x.text == VARIED
                else jnp.full(atom.aval.shape, x.constant.flat[0])
                for x, atom in zip(operands, eqn.invars, strict=True)
            ]
            found = eqn.primitive.bind(*arrays, **eqn.params)
        results = found if eqn.primitive.multiple_results else [found]
        return [self.known(x) for x in results]

    def new(self, dtype: Any, operands: Sequence[Value]) -> Value:
        """A variable for what is computed of these operands."""
        type_of(dtype)
        kind = max([x.kind for x in operands], default=Kind.LEAF)
        stage = max([x.stage for x in operands], default=0)
        return Value(f"v{next(self._numbers)}", dtype, kind, stage)

    def add(self, *args: Any) -> None:
        statement = Statement(*args)
        if any([x.text == VARIED for x in statement.operands]):
            raise Unsupported("an array of constants")
        self.statements.append(statement)

    def _reduce(self, function: str, x: Value) -> Value:
        if x.kind != Kind.ELEMENT:
            # The largest of numbers that are all the same.
            return x
        if is_narrow(x.dtype):
            raise Unsupported(f"the largest or smallest of {x.dtype} numbers")
        name = f"v{next(self._numbers)}"
        target = Value(name, x.dtype, Kind.GROUP, x.stage + 1)

        def lines(texts: Sequence[str]) -> list[str]:
            return [f"{name} = i == 0 ? {texts[0]} : {function}({name}, {texts[0]});"]

        self.add([target], [x], lines, function)
        return target

    def lines(self) -> Iterator[str]:
        """The program."""
        needed = self._needed_later()
        for stage in range(max([x.stage for x in self.statements], default=0) + 1):
            here = [x for x in self.statements if x.stage == stage]
            elements = [x for x in here if x.kind == Kind.ELEMENT]
            for x in here:
                if x.kind != Kind.ELEMENT:
                    yield from x.lines(texts_of(x))
            for value in needed:
                if value.stage == stage:
                    yield f"{type_of(value.dtype)} {value.text}s[N];"
            reductions = [x for x in elements if x.reduction]
            for x in reductions:
                yield f"{declared(x.targets[0])};"
            if elements:
                yield "#pragma unroll"
                yield "for (int i = 0; i < N; ++i) {"
                for x in elements:
                    yield from indented(x.lines(texts_of(x)))
                    kept = [y.text for y in x.targets if y in needed]
                    yield from indented([f"{y}s[i] = {y};" for y in kept])
                yield "}"
            for x in reductions:
                name = x.targets[0].text
                yield "#pragma unroll"
                yield "for (int step = 1; step < LANES; step *= 2)"
                yield f"  {name} = {x.reduction}({name}, of_neighbour({name}, step));"

    def _needed_later(self) -> list[Value]:
        """Elements that other loops read than the one that computes them."""
        found: dict[Value, None] = {}
        for x in self.statements:
            for y in x.operands:
                if y.kind == Kind.ELEMENT and not y.is_array and y.stage != x.stage:
                    found[y] = None
        return list(found)
