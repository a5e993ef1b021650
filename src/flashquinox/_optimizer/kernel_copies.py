"""What kernels copy of a state in host memory that goes through the device in slices:
on TPUs, arrays of 8 bits. XLA copies all others.

While one slice is updated, the next one arrives and the one before it leaves.
"""

from collections.abc import Mapping
from typing import TypeVar

import equinox as eqx
import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._backends import host_copies
from .slices import Slice


T = TypeVar("T")


class KernelCopies:
    """Copies under way: at most one slice in each direction. `held` are the states of
    leaves, by their numbers, which methods replace. Of leaves with slices, `units` says
    what where these begin and how long they are is a multiple of."""

    def __init__(self, held: dict[int, T], units: Mapping[int, int]):
        self._held = held
        self._masks: dict[int, PyTree] = {}
        for leaf, unit in units.items():
            is_one = lambda x, unit=unit: host_copies.needs_kernels(x, unit)
            mask = jtu.tree_map(is_one, held[leaf])
            if any(jtu.tree_leaves(mask)):
                self._masks[leaf] = mask
        self._reads: tuple[int, host_copies.Reads] | None = None
        self._writes: tuple[int, host_copies.Writes] | None = None

    def others(self, leaf: int, tree: T) -> T:
        """What XLA copies, with `None` in place of the rest."""
        if leaf not in self._masks:
            return tree
        return eqx.partition(tree, self._masks[leaf])[1]

    def own(self, leaf: int, tree: T) -> T:
        """What kernels copy, with `None` in place of the rest."""
        mask = self._masks.get(leaf, False)
        return eqx.partition(tree, mask)[0]

    def start_read(self, leaf: int, part: Slice) -> None:
        if leaf in self._masks:
            start, end = part.rows
            arrays = self._arrays(leaf)
            arrays, reads = host_copies.start_reads(start, end - start, arrays)
            self._reads = leaf, reads
            self._hold(leaf, arrays)

    def finish_read(self, others: list[T]) -> list[T]:
        """The portion that was begun last, of which `others` is what XLA has copied."""
        if self._reads is None:
            return others
        leaf, reads = self._reads
        arrays, parts = host_copies.finish_reads(self._arrays(leaf), reads)
        self._reads = None
        self._hold(leaf, arrays)
        (rest,) = others
        return [eqx.combine(self._structure(leaf).unflatten(parts), rest)]

    def start_write(self, leaf: int, part: Slice, new: PyTree) -> None:
        if leaf in self._masks:
            parts = jtu.tree_leaves(eqx.partition(new, self._masks[leaf])[0])
            arrays = self._arrays(leaf)
            arrays, writes = host_copies.start_writes(part.rows.start, arrays, parts)
            self._writes = leaf, writes
            self._hold(leaf, arrays)

    def finish_write(self) -> None:
        if self._writes is not None:
            leaf, writes = self._writes
            arrays = host_copies.finish_writes(self._arrays(leaf), writes)
            self._writes = None
            self._hold(leaf, arrays)

    def beside(self, tree: T) -> T:
        """The same arrays. What uses them waits for copies to begin; and what ends
        copies, for these."""
        under_way = [x for x in (self._reads, self._writes) if x is not None]
        if not under_way:
            return tree
        leaves = {leaf: self._arrays(leaf) for leaf, _ in under_way}
        copies = [copy for _, copy in under_way]
        arrays, structure = jtu.tree_flatten(tree)
        leaves, copies, arrays = lax.optimization_barrier((leaves, copies, arrays))
        for leaf, held in leaves.items():
            self._hold(leaf, held)
        copies = iter(copies)
        if self._reads is not None:
            self._reads = self._reads[0], next(copies)
        if self._writes is not None:
            self._writes = self._writes[0], next(copies)
        return structure.unflatten(arrays)

    def _arrays(self, leaf: int) -> list[Array]:
        return jtu.tree_leaves(eqx.partition(self._held[leaf], self._masks[leaf])[0])

    def _structure(self, leaf: int) -> PyTree:
        own, _ = eqx.partition(self._held[leaf], self._masks[leaf])
        return jtu.tree_structure(own)

    def _hold(self, leaf: int, arrays: list[Array]) -> None:
        new = self._structure(leaf).unflatten(arrays)
        self._held[leaf] = eqx.combine(new, self._held[leaf])
