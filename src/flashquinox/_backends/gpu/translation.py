"""The tile function, once traced, as statements of CUDA C++.

A thread has some elements of one group, and computes with them in loops: all that the
function does between two reductions over the group is one loop. What is the same for
all elements of a group, or of a leaf, is computed beside the loops.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ... import _compat
from ..._tile.tile import StepScalars, StepStructure, TileState, update_tile
from .expressions import Call, expression, literal, Operand, type_of, Unsupported


# A tile that stands for all: elements in groups, and groups.
_TILE = (3, 5)
# A loop of at most so many turns is written out.
_MOST_TURNS = 64


class Kind(enum.IntEnum):
    """What a value is the same for."""

    LEAF = 0
    GROUP = 1
    ELEMENT = 2

    @staticmethod
    def of(shape: tuple[int, ...]) -> "Kind":
        size = functools.reduce(lambda x, y: x * y, shape, 1)
        groups, elements = _TILE
        kinds = {1: Kind.LEAF, groups: Kind.GROUP, groups * elements: Kind.ELEMENT}
        if size not in kinds:
            raise Unsupported(f"an array of another shape than a tile's: {shape}")
        return kinds[size]


@dataclasses.dataclass(frozen=True)
class Value:
    """A variable, or a number."""

    text: str
    dtype: Any
    kind: Kind
    # After how many reductions it is known.
    stage: int = 0
    # Whether all elements of a thread are there, in every loop.
    is_array: bool = False
    # Of a number, or an array: itself.
    constant: Any = dataclasses.field(default=None, compare=False)


class _Statement(NamedTuple):
    targets: Sequence[Value]
    operands: Sequence[Value]
    # Its lines, of the operands' expressions.
    lines: Callable[[Sequence[str]], list[str]]
    # Of a reduction over the elements of a group: what is applied to two of them.
    reduction: str | None = None

    @property
    def kind(self) -> Kind:
        """Of what there is one such statement."""
        return Kind.ELEMENT if self.reduction else self.targets[0].kind

    @property
    def stage(self) -> int:
        """After how many reductions it stands."""
        return self.targets[0].stage - bool(self.reduction)


class Translation(NamedTuple):
    """Statements, and the types of what they read and write. `N` is the number of
    elements of a thread, and `LANES` that of the threads that share a group."""

    lines: tuple[str, ...]
    # Of the leaves of `StepScalars`: `s0`, `s1`, ...
    scalar_types: tuple[str, ...]
    # Of the gradient, and of the arrays of the old and of the new state: `x0[i]`, ...
    # and `y0[i]`, ... Of scales, a thread has one: `x5`.
    input_types: tuple[str, ...]
    output_types: tuple[str, ...]
    # Which inputs are scales.
    is_scale: tuple[bool, ...]


def translation_of(
    structure: StepStructure, scalars: StepScalars, grad: Any, old: TileState
) -> Translation:
    """A step of one thread, of a leaf with these arrays.

    **Raises:**

    `Unsupported` if the rule has an operation that kernels do not.
    """
    leaves, tree = jtu.tree_flatten((scalars, grad, old))
    of_scalars = len(jtu.tree_leaves(scalars))
    of_scales = len(jtu.tree_leaves(old.scales))
    whole = len(leaves) - of_scalars - of_scales
    dims = [()] * of_scalars + [_TILE] * whole + [_TILE[:1]] * of_scales
    avals = tuple([(x, y.dtype) for x, y in zip(dims, leaves, strict=True)])
    return _translate(structure, avals, tree)


@functools.lru_cache(maxsize=256)
def _translate(structure: StepStructure, avals: Any, tree: Any) -> Translation:
    shapes = tree.unflatten([jax.ShapeDtypeStruct(*x) for x in avals])
    scalars, grad, old = shapes

    def step(scalars: StepScalars, grad: Any, old: TileState) -> list[Any]:
        new = update_tile(structure, scalars, -1, grad, old, keep_unmoved=False)
        return jtu.tree_leaves(new)

    traced = jax.make_jaxpr(step)(scalars, grad, old)
    walk = _Walk()
    inputs = [
        Value(f"s{i}", x.dtype, Kind.LEAF)
        for i, x in enumerate(jtu.tree_leaves(scalars))
    ]
    arrays = jtu.tree_leaves((grad, old))
    for i, x in enumerate(arrays):
        kind = Kind.of(x.shape)
        inputs.append(Value(f"x{i}", x.dtype, kind, is_array=kind == Kind.ELEMENT))
    results = walk.call(_compat.Function.of(traced), inputs)
    outputs: list[Any] = traced.out_avals
    for i, (value, aval) in enumerate(zip(results, outputs, strict=True)):
        kind = Kind.of(aval.shape)
        target = Value(f"y{i}", aval.dtype, kind, value.stage, kind == Kind.ELEMENT)
        walk._add([target], [value], _assignment(target))
    return Translation(
        tuple(walk.lines()),
        tuple([type_of(x.dtype) for x in jtu.tree_leaves(scalars)]),
        tuple([type_of(x.dtype) for x in arrays]),
        tuple([type_of(x.dtype) for x in outputs]),
        tuple([Kind.of(x.shape) == Kind.GROUP for x in arrays]),
    )


def _assignment(target: Value) -> Callable[[Sequence[str]], list[str]]:
    to = f"{target.text}[i]" if target.is_array else f"const {_declared(target)}"
    return lambda texts: [f"{to} = {texts[0]};"]


def _declared(value: Value) -> str:
    return f"{type_of(value.dtype)} {value.text}"


class _Walk:
    """The statements of a function, in its order."""

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        self.statements: list[_Statement] = []
        # Of variables.
        self._numbers = itertools.count() if numbers is None else numbers

    def call(self, function: _compat.Function, args: Sequence[Value]) -> list[Value]:
        """The results of a function."""
        known = self.known
        return _compat.evaluate(function, args, known, known, self._apply)

    def known(self, x: Any) -> Value:
        """A constant. Of arrays, all elements are the same, but where a loop takes them
        one after the other."""
        array = np.asarray(x, jnp.result_type(x))
        if array.size and np.all(array == array.flat[0]):
            text = literal(array.flat[0])
        else:
            text = _VARIED
        return Value(text, array.dtype, Kind.LEAF, constant=array)

    def _apply(self, eqn: Any, operands: list[Value]) -> Sequence[Value]:
        name = eqn.primitive.name
        if name in _CONTROL:
            return _CONTROL[name](self, eqn, operands)
        called = _compat.called(eqn)
        if called is not None:
            return self.call(called, operands)
        if any([x.text == _VARIED for x in operands]):
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

        target = self._new(aval.dtype, operands)

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
            return [f"const {_declared(target)} = {expression(eqn.primitive, call)};"]

        self._add([target], operands, lines)
        return [target]

    def _compute(self, eqn: Any, operands: list[Value]) -> list[Value]:
        """What is known now of constants whose elements differ."""
        if any([x.constant is None or x.constant is _STACKED for x in operands]):
            raise Unsupported(f"the operation `{eqn.primitive.name}` of an array")
        with jax.ensure_compile_time_eval():
            arrays = [
                jnp.asarray(x.constant)
                if x.text == _VARIED
                else jnp.full(atom.aval.shape, x.constant.flat[0])
                for x, atom in zip(operands, eqn.invars, strict=True)
            ]
            found = eqn.primitive.bind(*arrays, **eqn.params)
        results = found if eqn.primitive.multiple_results else [found]
        return [self.known(x) for x in results]

    def _new(self, dtype: Any, operands: Sequence[Value]) -> Value:
        """A variable for what is computed of these operands."""
        type_of(dtype)
        kind = max([x.kind for x in operands], default=Kind.LEAF)
        stage = max([x.stage for x in operands], default=0)
        return Value(f"v{next(self._numbers)}", dtype, kind, stage)

    def _add(self, *args: Any) -> None:
        statement = _Statement(*args)
        # What is not supported is found now.
        statement.lines([x.text for x in statement.operands])
        self.statements.append(statement)

    def _reduce(self, function: str, x: Value) -> Value:
        if x.kind != Kind.ELEMENT:
            # The largest of numbers that are all the same.
            return x
        name = f"v{next(self._numbers)}"
        target = Value(name, x.dtype, Kind.GROUP, x.stage + 1)

        def lines(texts: Sequence[str]) -> list[str]:
            return [f"{name} = i == 0 ? {texts[0]} : {function}({name}, {texts[0]});"]

        self._add([target], [x], lines, function)
        return target

    def lines(self) -> Iterator[str]:
        """The program."""
        needed = self._needed_later()
        for stage in range(max([x.stage for x in self.statements], default=0) + 1):
            here = [x for x in self.statements if x.stage == stage]
            elements = [x for x in here if x.kind == Kind.ELEMENT]
            for x in here:
                if x.kind != Kind.ELEMENT:
                    yield from x.lines(_texts(x))
            for value in needed:
                if value.stage == stage:
                    yield f"{type_of(value.dtype)} {value.text}s[N];"
            reductions = [x for x in elements if x.reduction]
            for x in reductions:
                yield f"{_declared(x.targets[0])};"
            if elements:
                yield "#pragma unroll"
                yield "for (int i = 0; i < N; ++i) {"
                for x in elements:
                    yield from _indented(x.lines(_texts(x)))
                    kept = [y.text for y in x.targets if y in needed]
                    yield from _indented([f"{y}s[i] = {y};" for y in kept])
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


def _texts(x: _Statement) -> list[str]:
    """The expressions of its operands."""
    texts = []
    for y in x.operands:
        is_elsewhere = y.kind == Kind.ELEMENT and y.stage != x.stage
        suffix = "[i]" if y.is_array else "s[i]" if is_elsewhere else ""
        texts.append(y.text + suffix)
    return texts


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)


# Of an array whose elements differ: there is no expression.
_VARIED = ""
_STACKED = np.empty((0,))
_REDUCTIONS = {"reduce_max": "maximum", "reduce_min": "minimum"}
# Operations that change a shape alone.
_SAME_ELEMENTS = frozenset({"broadcast_in_dim", "reshape", "squeeze", "expand_dims"})


def _branch(walk: _Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    """All branches, of which one is chosen: they have no effects."""
    cond = _compat.Branches.of(eqn, operands)
    results = [walk.call(branch, cond.operands) for branch in cond.branches]
    chosen = []
    for var, *cases in zip(eqn.outvars, *results, strict=True):
        which = [cond.index, *cases]
        target = walk._new(var.aval.dtype, which)

        def lines(texts: Sequence[str], target: Value = target) -> list[str]:
            index, *cases = texts
            text = cases[-1]
            for i in reversed(range(len(cases) - 1)):
                text = f"((int){index} <= {i} ? {cases[i]} : {text})"
            return [f"const {_declared(target)} = {text};"]

        walk._add([target], which, lines)
        chosen.append(target)
    return chosen


def _write_out(walk: _Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    """A loop as its turns."""
    loop = _compat.Scan.of(eqn, operands)
    if loop.length > _MOST_TURNS:
        raise Unsupported(f"`scan` of {loop.length} turns")
    carry = list(loop.carry)
    turns = range(loop.length)
    for turn in reversed(turns) if loop.reverse else turns:
        if any([x.constant is None or x.constant is _STACKED for x in loop.xs]):
            raise Unsupported("`scan` over an array that is no constant")
        xs = [walk.known(x.constant[turn]) for x in loop.xs]
        found = walk.call(loop.body, [*loop.consts, *carry, *xs])
        carry = found[: len(carry)]
    # What turns leave behind, one after the other, is no array of a tile.
    stacked = eqn.outvars[len(carry) :]
    others = [
        Value(_VARIED, x.aval.dtype, Kind.LEAF, constant=_STACKED) for x in stacked
    ]
    return [*carry, *others]


def _repeat(walk: _Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    """A loop, by itself for each element."""
    loop = _compat.While.of(eqn, operands)
    consts = [*loop.condition_consts, *loop.body_consts]
    local = [walk._new(x.dtype, operands) for x in [*consts, *loop.carry]]
    carry = local[len(consts) :]
    condition, body = _Walk(walk._numbers), _Walk(walk._numbers)
    split = len(loop.condition_consts)
    (goes_on,) = condition.call(loop.condition, [*local[:split], *carry])
    new = body.call(loop.body, [*local[split : len(consts)], *carry])
    if any([x.reduction for x in condition.statements + body.statements]):
        raise Unsupported("a reduction in a loop")

    def lines(texts: Sequence[str]) -> list[str]:
        first = [f"{_declared(x)} = {y};" for x, y in zip(local, texts, strict=True)]
        later = [Value(f"{x.text}_", x.dtype, x.kind) for x in carry]
        turn = [
            *_written(condition),
            f"if (!{goes_on.text}) break;",
            *_written(body),
            *[f"{_declared(x)} = {y.text};" for x, y in zip(later, new, strict=True)],
            *[f"{x.text} = {y.text};" for x, y in zip(carry, later, strict=True)],
        ]
        return [*first, "while (true) {", *_indented(turn), "}"]

    walk._add(carry, [*consts, *loop.carry], lines)
    return carry


def _written(walk: _Walk) -> list[str]:
    """Statements in the order in which they were found."""
    return [
        line for x in walk.statements for line in x.lines([y.text for y in x.operands])
    ]


_CONTROL = {"cond": _branch, "scan": _write_out, "while": _repeat}
