"""Kernels whose arrays cannot have another axis: where `vmap` stacks several models,
other kernels or plain XLA."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from ..._tile.tile import LeafScalars, StepScalars, StepStructure, TileState
from ..xla import BACKEND as XLA, PlainView
from .alike import update_alike
from .gathered import update_gathered
from .kernel import update_leaf
from .view import LARGE, View


def update_small(
    structure: StepStructure,
    views: tuple[View, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
    interpret: bool = False,
) -> tuple[TileState, ...]:
    """One step of vectors or of several leaves. See `AbstractBackend.load`."""
    is_vector = views[0].kind == "vector"
    update = update_gathered if is_vector else update_alike
    if len(views) == 1 and grads[0].size >= LARGE:
        # A long vector.
        update = update_leaf
    kernel = custom_vmap(partial(update, structure, views, interpret=interpret))

    @kernel.def_vmap
    def stacked(
        axis_size: int, in_batched: list[Any], *operands: Any
    ) -> tuple[tuple[TileState, ...], Any]:
        del axis_size
        axes = jtu.tree_map(lambda is_stacked: 0 if is_stacked else None, in_batched)
        update_each = _update_plain if is_vector else _update_each
        plain = partial(update_each, structure, views, interpret)
        new = jax.vmap(plain, in_axes=tuple(axes))(*operands)
        return new, jtu.tree_map(lambda _: True, new)

    return kernel(scalars, leaves, grads, old)


def _update_each(
    structure: StepStructure,
    views: tuple[View, ...],
    interpret: bool,
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    new = []
    for view, leaf, grad, state in zip(views, leaves, grads, old, strict=True):
        own = dataclasses.replace(scalars, leaf=leaf)
        operands = (leaf,), (grad,), (state,)
        new += update_leaf(structure, (view,), own, *operands, interpret)
    return tuple(new)


def _update_plain(
    structure: StepStructure,
    views: tuple[View, ...],
    interpret: bool,
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    del interpret
    update = XLA.load()
    new = []
    for view, leaf, grad, state in zip(views, leaves, grads, old, strict=True):
        own = dataclasses.replace(scalars, leaf=leaf)
        plain = PlainView(view.layout, None)
        new += update(structure, (plain,), own, (leaf,), (grad,), (state,))
    return tuple(new)
