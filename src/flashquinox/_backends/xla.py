"""Plain XLA: the whole leaf is one tile."""

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Array, Float

from .._storage.layout import Layout
from .._tile.shapes import update_tile_of_any_shape
from .._tile.tile import LeafScalars, StepScalars, StepStructure, TileState
from .base import AbstractBackend, each_alone, LeafStep, Update, View


class Xla(AbstractBackend):
    name: ClassVar[str] = "xla"
    platform: ClassVar[str] = "default"
    needs: ClassVar[str | None] = None
    prefers_rows: ClassVar[bool] = False
    in_every_program: ClassVar[bool] = True

    def load(self) -> Update:
        return _update

    def serves(self, device: Any) -> bool:
        del device
        return True

    def view(self, step: LeafStep) -> Layout:
        return step.layout

    def batches(
        self, steps: Sequence[LeafStep], views: Sequence[View]
    ) -> list[list[int]]:
        del views
        return each_alone(steps)


def _update(
    structure: StepStructure,
    views: tuple[Layout, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    # Each leaf is a batch, and `scalars` are its own.
    del leaves
    (layout,), (grad,), (old_leaf,) = views, grads, old
    tile = update_tile_of_any_shape(
        structure,
        scalars,
        layout.tile_axis,
        layout.tile(grad),
        old_leaf.map(layout.tile),
    )
    return (tile.map(layout.untile),)


BACKEND = Xla()
