"""Pallas for TPUs: one kernel for each leaf."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax.tree_util as jtu

from ..._tile.tile import StepStructure, TileState
from ..base import AbstractBackend, LeafStep, Update
from .view import View as TpuView, view_of


# Elements of a vector that has a kernel of its own.
_LONG = 2**14


class Tpu(AbstractBackend):
    name: ClassVar[str] = "tpu"
    platform: ClassVar[str] = "tpu"
    needs: ClassVar[str | None] = "jax.experimental.pallas.tpu"
    prefers_rows: ClassVar[bool] = True
    in_every_program: ClassVar[bool] = True

    def load(self) -> Update:
        from .kernel import update_leaf
        from .unbatched import update_vectors

        def update(
            structure: StepStructure,
            views: tuple[TpuView, ...],
            *args: Any,
            **kwargs: Any,
        ) -> tuple[TileState, ...]:
            is_vector = views[0].kind == "vector"
            update_here = update_vectors if is_vector else update_leaf
            return update_here(structure, views, *args, **kwargs)

        return update

    def serves(self, device: Any) -> bool:
        return device.platform == "tpu"

    def view(self, step: LeafStep) -> TpuView | None:
        from .chip import Chip

        only_words = Chip.current().arithmetic.only_words
        return view_of(step.layout, step.old, step.grad, only_words)

    def batches(
        self, steps: Sequence[LeafStep], views: Sequence[Any]
    ) -> list[list[int]]:
        """Vectors that are stored alike share a kernel, but for long ones."""
        from .gathered import gathered, pieces_of

        alone, alike = [], {}
        for i, (step, view) in enumerate(zip(steps, views, strict=True)):
            if view.kind == "vector" and step.grad.size < _LONG:
                alike.setdefault(_kind(step, view), []).append(i)
            else:
                alone.append([i])
        together = [
            [numbers[i] for i in batch]
            for numbers in alike.values()
            for batch in gathered([pieces_of(views[i]) for i in numbers])
        ]
        return alone + together


def _kind(step: LeafStep, view: Any) -> tuple[Any, ...]:
    """What vectors must have in common to share a kernel."""
    leaves, structure = jtu.tree_flatten((step.grad, step.old))
    dtypes = tuple([x.dtype for x in leaves])
    scalars = jtu.tree_structure(step.scalars)
    return step.structure, scalars, view.group_size, structure, dtypes


BACKEND = Tpu()
