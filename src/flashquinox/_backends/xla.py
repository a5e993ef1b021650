"""Plain XLA: on CPUs in chunks, elsewhere the whole leaf is one tile."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Array, Shaped

from .._storage.layout import Layout
from .._tile.shapes import update_tile_of_any_shape
from .._tile.step import LeafScalars, StepScalars, StepStructure, TileState
from .base import AbstractBackend, grouped, kind_of, LeafStep, Update, View
from .chunks import take_together, takes, update_in_chunks
from .groups import Groups


@dataclasses.dataclass(frozen=True)
class PlainView:
    """`groups` is `None` for a leaf that is one tile."""

    layout: Layout
    groups: Groups | None

    @property
    def whole(self) -> "PlainView":
        """For programs of other platforms than CPUs, and those that XLA divides."""
        return PlainView(self.layout, None)


class Xla(AbstractBackend):
    name: ClassVar[str] = "xla"
    platform: ClassVar[str] = "default"
    needs: ClassVar[str | None] = None
    prefers_rows: ClassVar[bool] = False
    in_every_program: ClassVar[bool] = True
    is_interpreted: ClassVar[bool] = False
    is_portable: ClassVar[bool] = True
    reads_host_memory: ClassVar[bool] = False

    def load(self) -> Update:
        return _update

    def serves(self, device: Any) -> bool:
        del device
        return True

    def view(self, step: LeafStep) -> PlainView:
        groups = Groups.of(step.layout, step.old.is_grouped)
        return PlainView(step.layout, groups if takes(groups) else None)

    def batches(
        self, steps: Sequence[LeafStep], views: Sequence[View]
    ) -> list[list[int]]:
        """Leaves that are stored alike share chunks."""
        kinds = []
        for i, (step, view) in enumerate(zip(steps, views, strict=True)):
            assert isinstance(view, PlainView)
            kind: Any = i
            if view.groups is not None:
                kind = kind_of(step), view.groups.size
            kinds.append(kind)
        return grouped(kinds)


def _update(
    structure: StepStructure,
    views: tuple[PlainView, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Shaped[Array, "..."], ...],
    old: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    """Leaves with groups of one size share chunks; each other one is a tile."""
    kinds = [
        (i, None) if view.groups is None else (None, view.groups.size)
        for i, view in enumerate(views)
    ]
    new: dict[int, TileState] = {}
    for numbers in grouped(kinds):
        groups = tuple([x for i in numbers if (x := views[i].groups) is not None])
        if not groups or not take_together(groups):
            for i in numbers:
                own = dataclasses.replace(scalars, leaf=leaves[i])
                layout = views[i].layout
                new[i] = _update_whole(structure, layout, own, grads[i], old[i])
            continue
        updated = update_in_chunks(
            structure,
            groups,
            scalars,
            tuple([leaves[i] for i in numbers]),
            tuple([grads[i] for i in numbers]),
            tuple([old[i] for i in numbers]),
        )
        new.update(zip(numbers, updated, strict=True))
    return tuple([new[i] for i in range(len(views))])


def _update_whole(
    structure: StepStructure,
    layout: Layout,
    scalars: StepScalars,
    grad: Shaped[Array, "..."],
    old: TileState,
) -> TileState:
    """A leaf as one tile."""
    tile = update_tile_of_any_shape(
        structure,
        scalars,
        layout.tile_axis,
        layout.tile(grad),
        old.map(layout.tile),
    )
    return tile.map(layout.untile)


BACKEND = Xla()
