"""Pallas for GPUs, by way of Triton: one kernel for several leaves."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.tree_util as jtu

from ..base import AbstractBackend, LeafStep, Update, View


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
        """Leaves that are stored alike share a kernel. First leaves of the same size,
        so that many kernels are the same one, which is compiled once; then what is left
        of them."""
        alike: dict[Any, dict[Any, list[int]]] = {}
        for i, (step, view) in enumerate(zip(steps, views, strict=True)):
            same_kind = alike.setdefault(_kind(step, view), {})
            same_kind.setdefault(view, []).append(i)
        found = []
        for same_kind in alike.values():
            most = next(iter(same_kind)).most_leaves
            rest = []
            for numbers in same_kind.values():
                size = _even_size(len(numbers), most)
                whole = len(numbers) // size * size
                found += _split(numbers[:whole], size)
                rest += numbers[whole:]
            found += _split(rest, most)
        return found


def _kind(step: LeafStep, view: Any) -> tuple[Any, ...]:
    """What leaves must have in common to share a kernel."""
    leaves, structure = jtu.tree_flatten((step.grad, step.old))
    dtypes = tuple([x.dtype for x in leaves])
    scalars = jtu.tree_structure(step.scalars)
    return step.structure, scalars, view.kind, structure, dtypes


def _even_size(number: int, most: int) -> int:
    """How many of so many equal leaves shall share a kernel: where that can be, so many
    that none are left."""
    sizes = range(most, most // 2, -1)
    return next((size for size in sizes if number % size == 0), most)


def _split(numbers: list[int], most: int) -> list[list[int]]:
    return [numbers[i : i + most] for i in range(0, len(numbers), most)]


BACKEND = Gpu()
