"""Vectors: by kernels where there is one model, and by plain XLA where `vmap` stacks
several. Kernels on vectors cannot have another axis."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from ..._storage.layout import Layout
from ..._tile.tile import LeafScalars, StepScalars, StepStructure, TileState
from ..xla import BACKEND as XLA
from .gathered import update_gathered
from .kernel import update_leaf
from .view import View


def update_vectors(
    structure: StepStructure,
    views: tuple[View, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
    interpret: bool = False,
) -> tuple[TileState, ...]:
    """One step of vectors. See `AbstractBackend.load`."""
    update = update_leaf if len(views) == 1 else update_gathered
    kernel = custom_vmap(partial(update, structure, views, interpret=interpret))

    @kernel.def_vmap
    def stacked(
        axis_size: int, in_batched: list[Any], *operands: Any
    ) -> tuple[tuple[TileState, ...], Any]:
        del axis_size
        axes = jtu.tree_map(lambda is_stacked: 0 if is_stacked else None, in_batched)
        plain = partial(_update_plain, structure, views)
        new = jax.vmap(plain, in_axes=tuple(axes))(*operands)
        return new, jtu.tree_map(lambda _: True, new)

    return kernel(scalars, leaves, grads, old)


def _update_plain(
    structure: StepStructure,
    views: tuple[View, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    update = XLA.load()
    new = []
    for view, leaf, grad, state in zip(views, leaves, grads, old, strict=True):
        layout = Layout(view.elements.shape, (-1,), view.group_size)
        own = dataclasses.replace(scalars, leaf=leaf)
        new += update(structure, (layout,), own, (leaf,), (grad,), (state,))
    return tuple(new)
