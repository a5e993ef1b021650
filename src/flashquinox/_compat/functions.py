"""Traced functions: their operations, and what they read."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.extend.core as jex
from jax.interpreters import partial_eval


Literal: TypeAlias = jex.Literal


def as_function(traced: Any) -> Callable[..., list[Any]]:
    """The result of `jax.make_jaxpr` as a function from flat arguments to flat
    results."""
    return jex.jaxpr_as_fun(traced)


def inputs_read(function: Callable[[Any], Any], values: Any) -> list[bool]:
    """For each leaf of `values`, whether the result of a function depends on it."""
    jaxpr = jax.make_jaxpr(function)(values).jaxpr
    eliminate = getattr(partial_eval, "dce_jaxpr", None)
    if eliminate is None:
        return [True] * len(jaxpr.invars)
    _, read = eliminate(jaxpr, [True] * len(jaxpr.outvars))
    return list(read)


# Primitives that only call a function. What else they mean concerns derivatives,
# compilation or memory.
CALLS = frozenset(
    """
    jit pjit closed_call core_call eval_jaxpr composite checkpoint remat remat2
    call_hi_primitive custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    """.split()
)
# The names of the parameter that holds the function.
_PARAMETERS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class Function(NamedTuple):
    """A traced function: its operations, and the arrays that it closes over."""

    jaxpr: Any
    consts: Sequence[Any]

    @staticmethod
    def of(jaxpr: Any) -> "Function":
        # A closed jaxpr. In later versions of JAX, every jaxpr has constants.
        if hasattr(jaxpr, "consts"):
            return Function(jaxpr.jaxpr, jaxpr.consts)
        return Function(jaxpr, ())


def evaluate(
    function: Function,
    args: Sequence[Any],
    constant: Callable[[Any], Any],
    literal: Callable[[Any], Any],
    apply: Callable[[Any, list[Any]], Sequence[Any]],
) -> list[Any]:
    """Evaluates a traced function on values of any kind. `constant` makes such values
    of the arrays that it closes over, `literal` of the numbers in it, and
    `apply(operation, operands)` gives the results of an operation."""
    jaxpr = function.jaxpr
    known = [*map(constant, function.consts), *args]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], known, strict=True))
    for eqn in jaxpr.eqns:
        operands = [
            literal(x.val) if isinstance(x, Literal) else values[x] for x in eqn.invars
        ]
        values.update(zip(eqn.outvars, apply(eqn, operands), strict=True))
    return [
        literal(x.val) if isinstance(x, Literal) else values[x] for x in jaxpr.outvars
    ]


def called(eqn: Any) -> Function | None:
    """The function that an operation calls, if it does nothing else. Otherwise
    `None`."""
    if eqn.primitive.name == "call_hi_primitive":
        # Its function is traced here.
        primitive = eqn.params["_prim"]
        expand = lambda *args: primitive.expand(*primitive.in_tree.unflatten(args))
        return Function.of(jax.make_jaxpr(expand)(*(x.aval for x in eqn.invars)))
    if eqn.primitive.name not in CALLS:
        return None
    (name,) = [name for name in _PARAMETERS if name in eqn.params]
    return Function.of(eqn.params[name])
