"""Branches and loops of a function that is evaluated with a device's own arithmetic."""

from collections.abc import Sequence
from functools import partial
from typing import Any, TYPE_CHECKING

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array

from ... import _compat
from .values import Value


if TYPE_CHECKING:
    from .arithmetic import Arithmetic


# A loop of at most so many turns is written out.
_MOST_TURNS = 16


def _arrays(
    arithmetic: "Arithmetic",
    function: _compat.Function,
    consts: Sequence[Value],
    *args: Array,
) -> list[Array]:
    """The results of a traced function as arrays, of constants and arrays."""
    found = arithmetic.call(function, [*consts, *[Value(x) for x in args]])
    avals = [atom.aval for atom in function.jaxpr.outvars]
    return [
        jnp.asarray(x.array, aval.dtype) for x, aval in zip(found, avals, strict=True)
    ]


def _branch(arithmetic: "Arithmetic", eqn: Any, operands: list[Value]) -> list[Value]:
    cond = _compat.Branches.of(eqn, operands)
    branches = [partial(_arrays, arithmetic, branch, ()) for branch in cond.branches]
    arrays = [jnp.asarray(x.array) for x in cond.operands]
    index = cond.index.array
    if len(branches) == 2:
        found = lax.cond(index != 0, branches[1], branches[0], *arrays)
    else:
        found = lax.switch(index, branches, *arrays)
    return [Value(x) for x in found]


def _repeat(arithmetic: "Arithmetic", eqn: Any, operands: list[Value]) -> list[Value]:
    loop = _compat.While.of(eqn, operands)
    condition = partial(_arrays, arithmetic, loop.condition, loop.condition_consts)
    body = partial(_arrays, arithmetic, loop.body, loop.body_consts)
    found = lax.while_loop(
        lambda carry: condition(*carry)[0],
        lambda carry: body(*carry),
        [jnp.asarray(x.array) for x in loop.carry],
    )
    return [Value(x) for x in found]


def _scan(arithmetic: "Arithmetic", eqn: Any, operands: list[Value]) -> list[Value]:
    loop = _compat.Scan.of(eqn, operands)
    if loop.length <= _MOST_TURNS:
        return _write_out(arithmetic, loop)
    carried = len(loop.carry)

    def turn(carry: list[Array], xs: list[Array]) -> tuple[Any, Any]:
        found = _arrays(arithmetic, loop.body, loop.consts, *carry, *xs)
        return found[:carried], found[carried:]

    carry, xs = ([jnp.asarray(x.array) for x in part] for part in (loop.carry, loop.xs))
    carry, ys = lax.scan(turn, carry, xs, loop.length, loop.reverse)
    return [Value(x) for x in [*carry, *ys]]


def _write_out(arithmetic: "Arithmetic", loop: _compat.Scan) -> list[Value]:
    """A loop as its turns. What it loops over, if constant, is then numbers, which
    kernels can take."""
    carry, found = loop.carry, []
    turns = range(loop.length)
    for turn in reversed(turns) if loop.reverse else turns:
        xs = [x.part(turn) for x in loop.xs]
        results = arithmetic.call(loop.body, [*loop.consts, *carry, *xs])
        carry, ys = results[: len(carry)], results[len(carry) :]
        found.append(ys)
    if loop.reverse:
        found.reverse()
    stack = lambda values: jnp.stack([x.array for x in values])
    return [
        *carry,
        *[Value(None, partial(stack, values)) for values in zip(*found, strict=True)],
    ]


# By the names of operations.
RULES = {"cond": _branch, "while": _repeat, "scan": _scan}
