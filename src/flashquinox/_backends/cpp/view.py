"""How kernels in C++ see a leaf."""

import dataclasses
import math

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ..._storage.layout import are_consecutive, Layout
from ..base import LeafStep


# Of leaves that are stored without groups.
_ELEMENTS = 16


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf as matrices that lie one after the other, whose groups run along the
    columns: `run` elements in each column, one row below the other, of which the last
    group may be partial. With one column, groups are of consecutive elements."""

    matrices: int
    run: int
    columns: int
    group_size: int
    # That of the leaf among all, or `None` if it is not known when a step is compiled.
    number: int | None = None

    @staticmethod
    def of(layout: Layout, has_scales: bool, number: int | None = None) -> "View":
        if not has_scales:
            # In groups that nothing depends on.
            return View(1, math.prod(layout.shape), 1, _ELEMENTS, number)
        return View(
            layout.matrices, layout.run, layout.columns, layout.group_size, number
        )

    @property
    def groups_of_run(self) -> int:
        return -(-self.run // self.group_size)

    @property
    def groups(self) -> int:
        """All groups: one for each scale."""
        return self.matrices * self.groups_of_run * self.columns

    @property
    def size(self) -> int:
        return self.matrices * self.run * self.columns

    @property
    def is_consecutive(self) -> bool:
        return are_consecutive(self.matrices, self.run, self.columns, self.group_size)


def view_of(step: LeafStep) -> View | None:
    """How a kernel sees the leaf of a step. `None` if there is none for it."""
    arrays = jtu.tree_leaves((step.grad, step.old))
    is_wide = any([jnp.dtype(x.dtype) == jnp.float64 for x in arrays])
    if is_wide or step.grad.size == 0:
        return None
    number = step.scalars.leaf.number
    return View.of(
        step.layout,
        step.old.is_grouped,
        int(number) if isinstance(number, np.ndarray) else None,
    )
