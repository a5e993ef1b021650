"""One trace of a tile for all shapes.

A model has many shapes, but few sorts of leaves. What is computed of a tile does not
depend on its lengths, so it is traced once for each sort: with lengths that stand for
any others.
"""

import functools
from typing import Any

import jax
import jax.tree_util as jtu
from jaxtyping import Array, Shaped

from .. import _compat
from .._storage.codec import Boundary, no_boundary
from .step import StepScalars, StepStructure, TileState
from .tile import update_tile


# Primes that no function has another use for, one for each axis.
_LENGTHS: tuple[int, ...] = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)


def update_tile_of_any_shape(
    structure: StepStructure,
    scalars: StepScalars,
    axis: int,
    grad: Shaped[Array, "*tile"],
    old: TileState,
    boundary: Boundary = no_boundary,
) -> TileState:
    """[`update_tile`][], by a trace that all tiles of so many axes share. Only the
    length of a group is always its own."""
    shape = grad.shape
    # Types of arrays on meshes with `Explicit` axes say how they are divided.
    if not jax.sharding.get_abstract_mesh().empty or len(shape) > len(_LENGTHS):
        return update_tile(structure, scalars, axis, grad, old, boundary=boundary)
    lengths = list(_LENGTHS[: len(shape)])
    lengths[axis] = shape[axis]
    operands, treedef = jtu.tree_flatten((scalars, grad, old))
    kinds = [(len(x.shape), x.dtype, getattr(x, "weak_type", False)) for x in operands]
    # Numbers in a function have other types with 64 bits.
    x64 = bool(jax.config.jax_enable_x64)
    found = _tape(structure, axis, tuple(lengths), treedef, tuple(kinds), x64, boundary)
    if found is None:
        return update_tile(structure, scalars, axis, grad, old, boundary=boundary)
    tape, out_treedef = found
    new_lengths = dict(zip(lengths, shape, strict=True))
    return out_treedef.unflatten(tape.replay(new_lengths, operands))


@functools.lru_cache(maxsize=256)
def _tape(
    structure: StepStructure,
    axis: int,
    shape: tuple[int, ...],
    treedef: Any,
    kinds: tuple[tuple[int, Any, bool], ...],
    x64: bool,
    boundary: Boundary,
) -> tuple[_compat.Tape, Any] | None:
    del x64
    groups = list(shape)
    del groups[axis]
    shapes = {0: (), len(shape): shape, len(groups): tuple(groups)}
    structs = [
        jax.ShapeDtypeStruct(shapes[ndim], dtype, weak_type=weak)
        for ndim, dtype, weak in kinds
    ]
    update = lambda scalars, *tile: update_tile(
        structure, scalars, axis, *tile, boundary=boundary
    )
    operands = treedef.unflatten(structs)
    traced, out = jax.make_jaxpr(update, return_shape=True)(*operands)
    tape = _compat.Tape.of(_compat.Function.of(traced), frozenset(_LENGTHS))
    return None if tape is None else (tape, jtu.tree_structure(out))
