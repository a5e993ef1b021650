"""Traced functions that are applied again, to arrays of other lengths."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from .functions import called, CALLS, Function, Literal


class Tape(NamedTuple):
    """The operations of a traced function, to be applied to arrays of other lengths
    than those that it was traced with. That takes a tenth of the time of tracing it
    again."""

    inputs: list[int]
    outputs: list[int]
    # Numbers in the function, by the slots of their values.
    known: dict[int, Any]
    # Each with the slots that it reads and those that it writes, its parameters, and
    # which of these is a shape with one of the lengths.
    operations: list[tuple[Any, list[int], list[int], dict[str, Any], str | None]]

    @staticmethod
    def of(function: Function, lengths: frozenset[int]) -> "Tape | None":
        """The tape of a function that was traced with these lengths of axes, which
        stand for nothing else in it. `None` if the function has other operations than
        those of all elements: loops, branches, and parts of arrays."""
        known: dict[int, Any] = {}
        operations: list[Any] = []
        slots = itertools.count()

        # As `evaluate`, with slots for values; but without a call for each operation
        # and number, which a step pays for.
        def record(function: Function, inputs: list[int]) -> list[int]:
            jaxpr = function.jaxpr
            own: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
            for var, const in zip(jaxpr.constvars, function.consts, strict=True):
                own[var] = slot = next(slots)
                known[slot] = const
            for eqn in jaxpr.eqns:
                # Literals differ by their identity.
                for x in eqn.invars:
                    if isinstance(x, Literal):
                        own[id(x)] = slot = next(slots)
                        known[slot] = x.val
                operands = [
                    own[id(x) if isinstance(x, Literal) else x] for x in eqn.invars
                ]
                inner, name = None, eqn.primitive.name
                if name in CALLS:
                    inner = called(eqn)
                if inner is not None:
                    results = record(inner, operands)
                else:
                    shape = None
                    if name not in _WITHOUT_LENGTHS or eqn.effects:
                        shape = _shape_parameter(eqn, lengths)
                    results = [next(slots) for _ in eqn.outvars]
                    operations.append(
                        (eqn.primitive, operands, results, eqn.params, shape)
                    )
                own.update(zip(eqn.outvars, results, strict=True))
            for x in jaxpr.outvars:
                if isinstance(x, Literal):
                    own[id(x)] = slot = next(slots)
                    known[slot] = x.val
            return [own[id(x) if isinstance(x, Literal) else x] for x in jaxpr.outvars]

        inputs = [next(slots) for _ in function.jaxpr.invars]
        try:
            outputs = record(function, inputs)
        except _OtherOperation:
            return None
        if any([getattr(x, "shape", ()) != () for x in known.values()]):
            return None
        return Tape(inputs, outputs, known, operations)

    def replay(self, lengths: dict[int, int], args: Sequence[Any]) -> list[Any]:
        """What the function gives for these arguments, with new lengths for those that
        it was traced with."""
        values = self.known | dict(zip(self.inputs, args, strict=True))
        for primitive, operands, results, params, shape in self.operations:
            if shape is not None:
                new = [lengths.get(length, length) for length in params[shape]]
                params = params | {shape: tuple(new)}
            found = primitive.bind(*[values[i] for i in operands], **params)
            if primitive.multiple_results:
                values.update(zip(results, found, strict=True))
            else:
                values[results[0]] = found
        return [values[i] for i in self.outputs]


# Operations whose parameters are never lengths: most of those of a step.
_WITHOUT_LENGTHS = frozenset(
    """
    abs add and bitcast_convert_type convert_element_type div eq exp floor ge gt
    integer_pow is_finite le log lt max min mul ne neg not or reduce_max reduce_min
    round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign
    sqrt square sub
    """.split()
)


class _OtherOperation(Exception):
    """Of which a tape does not know what lengths do to it."""


def _shape_parameter(eqn: Any, lengths: frozenset[int]) -> str | None:
    """Which parameter of an operation has lengths in it: that of its shape, or none."""
    found = None
    for name, value in eqn.params.items():
        if name in ("shape", "new_sizes"):
            found = name if lengths & set(value) else found
        elif name == "sharding" and value is not None:
            raise _OtherOperation
        elif isinstance(value, tuple | list) and any(
            [isinstance(x, int) and x in lengths for x in jax.tree.leaves(value)]
        ):
            raise _OtherOperation
        else:
            for x in value if isinstance(value, tuple) else (value,):
                if callable(x) or hasattr(x, "eqns") or hasattr(x, "jaxpr"):
                    raise _OtherOperation
    if eqn.effects:
        raise _OtherOperation
    return found
