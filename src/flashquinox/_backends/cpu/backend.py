"""C++ for CPUs: one program for all leaves that are stored alike.

The tile function is traced once, and written as a program in C++, as for GPUs; the
machine's own compiler compiles it, and XLA calls it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax.tree_util as jtu

from ..base import AbstractBackend, grouped, kind_of, LeafStep, Update
from ..cpp.view import View, view_of


# Of a call. XLA takes time with the square of its operands: a step of DDPM, of 450
# leaves with seven each, compiles in 3.4 s with 8 or 32 leaves in a call, in 9.8 s with
# 128, and in 26 s with all of them (two cores of a Xeon).
_MOST_OPERANDS = 224


class Cpu(AbstractBackend):
    name: ClassVar[str] = "cpu"
    platform: ClassVar[str] = "cpu"
    needs: ClassVar[str | None] = "g++ or clang++"
    remedy: ClassVar[str] = "Install a C++ compiler"
    # A compiler is no package that this one could depend on.
    is_missed: ClassVar[bool] = False
    prefers_rows: ClassVar[bool] = False
    # A program for another platform has no use for it.
    in_every_program: ClassVar[bool] = False
    is_interpreted: ClassVar[bool] = False
    # Only the process that has traced it knows where the program is.
    is_portable: ClassVar[bool] = False
    reads_host_memory: ClassVar[bool] = False

    def load(self) -> Update:
        from . import compiler
        from .kernel import update_leaves

        compiler.command()
        return update_leaves

    def serves(self, device: Any) -> bool:
        return device.platform == "cpu"

    def view(self, step: LeafStep) -> View | None:
        return view_of(step)

    def batches(
        self, steps: Sequence[LeafStep], views: Sequence[Any]
    ) -> list[list[int]]:
        """Leaves that are stored alike share a program."""
        from ..cpp.common import common_of

        kinds = [
            (kind_of(step), view.group_size)
            for step, view in zip(steps, views, strict=True)
        ]

        def most(i: int) -> int:
            arrays = len(jtu.tree_leaves((steps[i].grad, steps[i].old)))
            common = len(common_of(steps[i].structure, arrays))
            return max(1, (_MOST_OPERANDS - common) // (arrays - common))

        return grouped(kinds, most)


BACKEND = Cpu()
