"""What JAX traced, as far as this library looks into it: the parts of operations that
call functions, in every version of JAX that is supported."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


# With these, a function is only called: what they mean beside that is for derivatives,
# compilation and memory.
_CALLS = frozenset(
    """
    jit pjit closed_call core_call eval_jaxpr composite checkpoint remat remat2
    custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    """.split()
)
# Under which names they have it.
_PARAMETERS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class Function(NamedTuple):
    """A traced function: its operations, and the arrays that it closes over."""

    jaxpr: Any
    consts: Sequence[Any]

    @staticmethod
    def of(jaxpr: Any) -> "Function":
        # A closed one, or in later versions of JAX, every one.
        if hasattr(jaxpr, "consts"):
            return Function(jaxpr.jaxpr, jaxpr.consts)
        return Function(jaxpr, ())


def called(eqn: Any) -> Function | None:
    """The function of an operation that only calls one. `None` for others."""
    if eqn.primitive.name == "call_hi_primitive":
        # It is traced when it is asked for.
        primitive = eqn.params["_prim"]
        expand = lambda *args: primitive.expand(*primitive.in_tree.unflatten(args))
        return Function.of(jax.make_jaxpr(expand)(*(x.aval for x in eqn.invars)))
    if eqn.primitive.name not in _CALLS:
        return None
    (name,) = (name for name in _PARAMETERS if name in eqn.params)
    return Function.of(eqn.params[name])


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
    """`lax.while_loop`. Each function takes its constants, then what is carried."""

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
    """`lax.scan`, which `lax.fori_loop` is too where it knows how often."""

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
