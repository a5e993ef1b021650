"""Branches and loops of a traced tile function, as statements."""

from collections.abc import Sequence
from typing import Any, TYPE_CHECKING

from ... import _compat
from ..base import Unsupported
from .values import declared, indented, Kind, STACKED, Value, VARIED


if TYPE_CHECKING:
    from .statements import Walk


# A loop of at most so many turns is written out.
_MOST_TURNS = 64


def _branch(walk: "Walk", eqn: Any, operands: list[Value]) -> list[Value]:
    """All branches, of which one is chosen: they have no effects."""
    cond = _compat.Branches.of(eqn, operands)
    results = [walk.call(branch, cond.operands) for branch in cond.branches]
    chosen = []
    for var, *cases in zip(eqn.outvars, *results, strict=True):
        which = [cond.index, *cases]
        target = walk.new(var.aval.dtype, which)

        def lines(texts: Sequence[str], target: Value = target) -> list[str]:
            index, *cases = texts
            text = cases[-1]
            for i in reversed(range(len(cases) - 1)):
                text = f"((int){index} <= {i} ? {cases[i]} : {text})"
            return [f"const {declared(target)} = {text};"]

        walk.add([target], which, lines)
        chosen.append(target)
    return chosen


def _write_out(walk: "Walk", eqn: Any, operands: list[Value]) -> list[Value]:
    """A loop as its turns."""
    loop = _compat.Scan.of(eqn, operands)
    if loop.length > _MOST_TURNS:
        raise Unsupported(f"`scan` of {loop.length} turns")
    carry = list(loop.carry)
    turns = range(loop.length)
    for turn in reversed(turns) if loop.reverse else turns:
        if any([x.constant is None or x.constant is STACKED for x in loop.xs]):
            raise Unsupported("`scan` over an array that is no constant")
        xs = [walk.known(x.constant[turn]) for x in loop.xs]
        found = walk.call(loop.body, [*loop.consts, *carry, *xs])
        carry = found[: len(carry)]
    # What turns leave behind, one after the other, is no array of a tile.
    stacked = eqn.outvars[len(carry) :]
    others = [Value(VARIED, x.aval.dtype, Kind.LEAF, constant=STACKED) for x in stacked]
    return [*carry, *others]


def _repeat(walk: "Walk", eqn: Any, operands: list[Value]) -> list[Value]:
    """A loop, by itself for each element."""
    loop = _compat.While.of(eqn, operands)
    consts = [*loop.condition_consts, *loop.body_consts]
    local = [walk.new(x.dtype, operands) for x in [*consts, *loop.carry]]
    carry = local[len(consts) :]
    condition, body = walk.nested(), walk.nested()
    split = len(loop.condition_consts)
    (goes_on,) = condition.call(loop.condition, [*local[:split], *carry])
    new = body.call(loop.body, [*local[split : len(consts)], *carry])
    if any([x.reduction for x in condition.statements + body.statements]):
        raise Unsupported("a reduction in a loop")

    def lines(texts: Sequence[str]) -> list[str]:
        first = [f"{declared(x)} = {y};" for x, y in zip(local, texts, strict=True)]
        later = [Value(f"{x.text}_", x.dtype, x.kind) for x in carry]
        turn = [
            *_written(condition),
            f"if (!{goes_on.text}) break;",
            *_written(body),
            *[f"{declared(x)} = {y.text};" for x, y in zip(later, new, strict=True)],
            *[f"{x.text} = {y.text};" for x, y in zip(carry, later, strict=True)],
        ]
        return [*first, "while (true) {", *indented(turn), "}"]

    walk.add(carry, [*consts, *loop.carry], lines)
    return carry


def _written(walk: "Walk") -> list[str]:
    """Statements in the order in which they were found."""
    return [
        line for x in walk.statements for line in x.lines([y.text for y in x.operands])
    ]


# By the names of operations.
RULES = {"cond": _branch, "scan": _write_out, "while": _repeat}
