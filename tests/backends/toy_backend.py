"""A backend for CPUs, which `test_dispatch.py` puts into a copy of the library as
`_backends/toy.py`. It takes matrices, two at a time, and records what is asked of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from flashquinox._backends.base import AbstractBackend, LeafStep, Update, View
from flashquinox._tile.step import TileState
from flashquinox._tile.tile import update_tile


calls: list[Any] = []


class Toy(AbstractBackend):
    name: ClassVar[str] = "toy"
    platform: ClassVar[str] = "cpu"
    needs: ClassVar[str | None] = "json.scanner"
    prefers_rows: ClassVar[bool] = True
    in_every_program: ClassVar[bool] = False
    is_interpreted: ClassVar[bool] = True
    is_portable = True
    reads_host_memory: ClassVar[bool] = False

    def load(self) -> Update:
        import json.scanner  # noqa: F401

        calls.append("load")
        return _update

    def serves(self, device: Any) -> bool:
        return device.platform == "cpu"

    def view(self, step: LeafStep) -> View | None:
        calls.append(("view", *step.grad.shape))
        return step.layout if step.grad.ndim == 2 else None

    def batches(
        self, steps: Sequence[LeafStep], views: Sequence[View]
    ) -> list[list[int]]:
        numbers = list(range(len(steps)))
        assert len(views) == len(steps)
        calls.append("batches")
        return [numbers[i : i + 2] for i in range(0, len(steps), 2)]


def _update(
    structure: Any,
    views: Any,
    scalars: Any,
    leaves: Any,
    grads: Any,
    old: Any,
    interpret: bool = False,
) -> tuple[TileState, ...]:
    calls.append(("update", len(views), interpret))
    new = []
    for layout, leaf, grad, state in zip(views, leaves, grads, old, strict=True):
        tile = update_tile(
            structure,
            dataclasses.replace(scalars, leaf=leaf),
            layout.tile_axis,
            layout.tile(grad),
            state.map(layout.tile),
        )
        new.append(tile.map(layout.untile))
    return tuple(new)


BACKEND = Toy()
