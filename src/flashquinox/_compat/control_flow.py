"""Branches and loops in traced functions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .functions import Function


class Branches(NamedTuple):
    """`lax.cond` and `lax.switch`."""

    branches: list[Function]
    index: Any
    operands: list[Any]

    @staticmethod
    def of(eqn: Any, operands: Sequence[Any]) -> "Branches":
        branches = [Function.of(x) for x in eqn.params["branches"]]
        return Branches(branches, operands[0], list(operands[1:]))


class While(NamedTuple):
    """`lax.while_loop`. Both functions take their constants, then the carry."""

    condition: Function
    body: Function
    condition_consts: list[Any]
    body_consts: list[Any]
    carry: list[Any]

    @staticmethod
    def of(eqn: Any, operands: Sequence[Any]) -> "While":
        first = eqn.params["cond_nconsts"]
        second = first + eqn.params["body_nconsts"]
        return While(
            Function.of(eqn.params["cond_jaxpr"]),
            Function.of(eqn.params["body_jaxpr"]),
            list(operands[:first]),
            list(operands[first:second]),
            list(operands[second:]),
        )


class Scan(NamedTuple):
    """`lax.scan`, and `lax.fori_loop` with a known number of iterations."""

    body: Function
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    length: int
    reverse: bool

    @staticmethod
    def of(eqn: Any, operands: Sequence[Any]) -> "Scan":
        params = eqn.params
        if "num_consts" in params:
            consts, carried = params["num_consts"], params["num_carry"]
        else:
            consts, carried, _ = (len(part) for part in params["ft_in"].unpack())
        return Scan(
            Function.of(params["jaxpr"]),
            list(operands[:consts]),
            list(operands[consts : consts + carried]),
            list(operands[consts + carried :]),
            params["length"],
            params["reverse"],
        )
