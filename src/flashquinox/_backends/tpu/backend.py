"""Pallas for TPUs: one kernel for each leaf."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ..._tile.step import StepStructure, TileState
from ..base import AbstractBackend, kind_of, LeafStep, Update
from .view import LARGE, View as TpuView, view_of


class Tpu(AbstractBackend):
    name: ClassVar[str] = "tpu"
    platform: ClassVar[str] = "tpu"
    needs: ClassVar[str | None] = "jax.experimental.pallas.tpu"
    remedy: ClassVar[str] = "Install a version of JAX that has it"
    prefers_rows: ClassVar[bool] = True
    in_every_program: ClassVar[bool] = True
    is_interpreted: ClassVar[bool] = True
    is_portable: ClassVar[bool] = True
    reads_host_memory: ClassVar[bool] = False

    def load(self) -> Update:
        from .kernel import update_leaf
        from .unbatched import update_small

        def update(
            structure: StepStructure,
            views: tuple[TpuView, ...],
            *args: Any,
            **kwargs: Any,
        ) -> tuple[TileState, ...]:
            alone = len(views) == 1 and views[0].kind != "vector"
            update_here = update_leaf if alone else update_small
            return update_here(structure, views, *args, **kwargs)

        return update

    def serves(self, device: Any) -> bool:
        return device.platform == "tpu"

    def view(self, step: LeafStep) -> TpuView | None:
        from .chip import Chip
        from .reordering import reordered

        chip = Chip.current()
        only_words = chip.arithmetic.only_words
        view = view_of(step.layout, step.old, step.grad, only_words)
        if view is None or not only_words or view.kind == "rows":
            return view
        # Where all is words, others are only taken as rows.
        return view if reordered(view, chip, step.grad, step.old) is not None else None

    def batches(
        self, steps: Sequence[LeafStep], views: Sequence[Any]
    ) -> list[list[int]]:
        """Small leaves share kernels: vectors, and others of the same shape."""
        from .alike import most_alike
        from .chip import Chip
        from .gathered import gathered, pieces_of

        found, vectors, alike = [], {}, {}
        for i, (step, view) in enumerate(zip(steps, views, strict=True)):
            if step.grad.size >= LARGE or Chip.current().arithmetic.only_words:
                found.append([i])
            elif view.kind == "vector":
                vectors.setdefault((kind_of(step), view.group_size), []).append(i)
            else:
                alike.setdefault((kind_of(step), view), []).append(i)
        for numbers in vectors.values():
            for batch in gathered([pieces_of(views[i]) for i in numbers]):
                found.append([numbers[i] for i in batch])
        for numbers in alike.values():
            first = numbers[0]
            most = most_alike(views[first], steps[first].grad, steps[first].old)
            starts = range(0, len(numbers), most)
            found += [numbers[i : i + most] for i in starts]
        return found


BACKEND = Tpu()
