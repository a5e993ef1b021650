"""Pallas for GPUs, by way of Triton: one kernel for several leaves."""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from ..base import AbstractBackend, kind_of, LeafStep, Update, View


class Gpu(AbstractBackend):
    name: ClassVar[str] = "gpu"
    platform: ClassVar[str] = "cuda"
    needs: ClassVar[str | None] = "jax.experimental.pallas.triton"
    prefers_rows: ClassVar[bool] = False
    # Leaves are batched for it: a program for another platform would be worse.
    in_every_program: ClassVar[bool] = False

    def load(self) -> Update:
        from .kernel import update_leaves

        return update_leaves

    def serves(self, device: Any) -> bool:
        """Triton needs a compute capability of 8.0."""
        if isinstance(device, jax.sharding.AbstractDevice):
            return device.platform in ("gpu", "cuda")
        capability = getattr(device, "compute_capability", "")
        # Of other makers, it is a name.
        known = device.platform == "gpu" and capability.replace(".", "").isdigit()
        return known and float(capability) >= 8

    def view(self, step: LeafStep) -> View | None:
        from .views import view_of

        return view_of(step.layout, step.grad, step.old)

    def batches(
        self, steps: Sequence[LeafStep], views: Sequence[Any]
    ) -> list[list[int]]:
        """Leaves that are stored alike share a kernel."""
        alike: dict[Any, list[int]] = {}
        for i, (step, view) in enumerate(zip(steps, views, strict=True)):
            kind = kind_of(step), view.kind, view.most_leaves
            alike.setdefault(kind, []).append(i)
        found = []
        for (*_, most), numbers in alike.items():
            # Of about the same size together.
            numbers = sorted(numbers, key=lambda i: views[i].tiles)
            found += _split(numbers, most)
        return found


def _split(numbers: list[int], most: int) -> list[list[int]]:
    """Parts of about equal length, and of at most so many."""
    count = -(-len(numbers) // most)
    cuts = [i * len(numbers) // count for i in range(count + 1)]
    return [numbers[i:j] for i, j in itertools.pairwise(cuts)]


BACKEND = Gpu()
