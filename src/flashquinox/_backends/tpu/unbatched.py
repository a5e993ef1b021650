"""Kernels whose arrays cannot have another axis: where `vmap` stacks several models,
other kernels or plain XLA."""

from functools import partial
from typing import Any

import jax
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Shaped

from ..._tile.step import LeafScalars, StepScalars, StepStructure, TileState
from ..base import one_by_one
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
    grads: tuple[Shaped[Array, "..."], ...],
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
        update, seen = partial(update_leaf, interpret=interpret), [*views]
        if is_vector:
            update = XLA.load()
            seen = [PlainView(view.layout, None) for view in views]
        each = partial(one_by_one, update, structure, seen)
        new = jax.vmap(each, in_axes=tuple(axes))(*operands)
        return new, jtu.tree_map(lambda _: True, new)

    return kernel(scalars, leaves, grads, old)
