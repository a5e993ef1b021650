"""One trace of a tile for all shapes.

A model has many shapes, but few sorts of leaves. What is computed of a tile does not
depend on its lengths, so it is traced once for each sort: with lengths that stand for
any others.
"""

import functools
from typing import Any

import jax
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .. import _compat as compat
from .tile import StepScalars, StepStructure, TileState, update_tile


# Primes that no function has another use for, one for each axis.
_LENGTHS = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)


def update_tile_of_any_shape(
    structure: StepStructure,
    scalars: StepScalars,
    axis: int,
    grad: Float[Array, "*tile"],
    old: TileState,
) -> TileState:
    """[`update_tile`][], from a trace that all tiles of so many axes share."""
    shape = grad.shape
    group = len(shape) + axis
    tape = None
    # Types of arrays that are divided by them would be those of another mesh.
    if jax.sharding.get_abstract_mesh().empty and len(shape) <= len(_LENGTHS):
        stand_ins = list(_LENGTHS[: len(shape)])
        stand_ins[group] = shape[group]
        operands, treedef = jtu.tree_flatten((scalars, grad, old))
        kinds = tuple(
            [(len(x.shape), x.dtype, getattr(x, "weak_type", False)) for x in operands]
        )
        x64 = bool(jax.config.jax_enable_x64)
        tape = _tape(structure, axis, tuple(stand_ins), treedef, kinds, x64)
    if tape is None:
        return update_tile(structure, scalars, axis, grad, old)
    tape, out_structure = tape
    lengths = dict(zip(stand_ins, shape, strict=True))
    return out_structure.unflatten(tape.replay(lengths, operands))


@functools.lru_cache(maxsize=256)
def _tape(
    structure: StepStructure,
    axis: int,
    shape: tuple[int, ...],
    treedef: Any,
    kinds: tuple[tuple[int, Any, bool], ...],
    x64: bool,
) -> tuple[compat.Tape, Any] | None:
    # By which numbers in a function have other types.
    del x64
    groups = list(shape)
    del groups[axis]
    shapes = {0: (), len(shape): shape, len(groups): tuple(groups)}
    structs = [
        jax.ShapeDtypeStruct(shapes[ndim], dtype, weak_type=weak)
        for ndim, dtype, weak in kinds
    ]
    scalars, grad, old = treedef.unflatten(structs)
    update = lambda scalars, grad, old: update_tile(structure, scalars, axis, grad, old)
    traced, out = jax.make_jaxpr(update, return_shape=True)(scalars, grad, old)
    lengths = frozenset(_LENGTHS)
    tape = compat.Tape.of(compat.Function.of(traced), lengths)
    return None if tape is None else (tape, jtu.tree_structure(out))
