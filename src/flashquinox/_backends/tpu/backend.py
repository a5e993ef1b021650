"""Pallas for TPUs: one kernel for each leaf."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ..._storage.layout import Layout
from ..base import AbstractBackend, each_alone, LeafStep, Update, View
from .layout import layout_of, supports


class Tpu(AbstractBackend):
    name: ClassVar[str] = "tpu"
    platform: ClassVar[str] = "tpu"
    needs: ClassVar[str | None] = "jax.experimental.pallas.tpu"
    prefers_rows: ClassVar[bool] = True
    in_every_program: ClassVar[bool] = True

    def load(self) -> Update:
        from .kernel import update_leaf

        return update_leaf

    def serves(self, device: Any) -> bool:
        return device.platform == "tpu"

    def view(self, step: LeafStep) -> Layout | None:
        layout = layout_of(step.layout, step.old)
        return layout if supports(layout, step.old, step.grad) else None

    def batches(
        self, steps: Sequence[LeafStep], views: Sequence[View]
    ) -> list[list[int]]:
        del views
        return each_alone(steps)


BACKEND = Tpu()
