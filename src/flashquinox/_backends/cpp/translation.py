"""The tile function, once traced, as a program in C++."""

import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu

from ... import _compat, _rules, _storage
from ..._tile.step import StepScalars, StepStructure, TileState
from ..._tile.tile import update_tile
from .statements import Walk
from .types import type_of
from .values import declared, Kind, TILE, Value


# Of the gradient and the arrays of a state, in their order.
GRAD, WEIGHT = 0, 1


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
    structure: StepStructure,
    scalars: StepScalars,
    grad: Any,
    old: TileState,
    write: Callable[[Walk], Iterable[str]] = Walk.lines,
    keep_unmoved: bool = False,
) -> Translation:
    """A step of a leaf with these arrays, as `write` writes its statements: for GPUs,
    as those of one thread. `keep_unmoved`: see `update_tile`.

    **Raises:**

    `Unsupported` if the rule has an operation that kernels do not.
    """
    leaves, tree = jtu.tree_flatten((scalars, grad, old))
    dims = [() for _ in jtu.tree_leaves(scalars)]
    dims += [TILE, *[TILE[:1] if x else TILE for x in old.are_of_groups]]
    avals = tuple([(x, y.dtype) for x, y in zip(dims, leaves, strict=True)])
    return _translate(structure, avals, tree, write, keep_unmoved)


@functools.lru_cache(maxsize=256)
def _translate(
    structure: StepStructure,
    avals: Any,
    tree: Any,
    write: Callable[[Walk], Iterable[str]],
    keep_unmoved: bool,
) -> Translation:
    shapes = tree.unflatten([jax.ShapeDtypeStruct(*x) for x in avals])
    scalars, grad, old = shapes

    def step(scalars: StepScalars, grad: Any, old: TileState) -> list[Any]:
        with jax.disable_jit() if _has_no_loops(structure) else nullcontext():
            new = update_tile(
                structure, scalars, -1, grad, old, keep_unmoved=keep_unmoved
            )
        return jtu.tree_leaves(new)

    traced = jax.make_jaxpr(step)(scalars, grad, old)
    walk = Walk()
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
        walk.add([target], [value], _assignment(target))
    return Translation(
        tuple(write(walk)),
        tuple([type_of(x.dtype) for x in jtu.tree_leaves(scalars)]),
        tuple([type_of(x.dtype) for x in arrays]),
        tuple([type_of(x.dtype) for x in outputs]),
        tuple([Kind.of(x.shape) == Kind.GROUP for x in arrays]),
    )


def _has_no_loops(structure: StepStructure) -> bool:
    """Whether the rule and the codecs are this library's own.

    JAX traces each function of `jax.numpy` by itself before it traces what calls it,
    which is half of the time of a trace. It can go through them instead, but then also
    through all turns of loops, of which others may have any number."""
    parts = structure.rule, *structure.codecs
    packages = {type(x).__module__.rpartition(".")[0] for x in parts}
    return packages <= {_rules.__name__, _storage.__name__}


def _assignment(target: Value) -> Callable[[Sequence[str]], list[str]]:
    to = f"{target.text}[i]" if target.is_array else f"const {declared(target)}"
    return lambda texts: [f"{to} = {texts[0]};"]


@functools.cache
def text_of(name: str) -> str:
    """A part of programs, which is a file of this name among the backends."""
    return (pathlib.Path(__file__).parents[1] / name).read_text(encoding="utf-8")
