"""A leaf as a list of groups."""

import dataclasses
import functools
import math

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._storage.layout import Layout


# Of leaves that are stored without groups.
_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Groups:
    """A leaf as a list of `number` groups of one `size`. They lie `in_order` if the
    list is the leaf's memory; only then may the last one be partial.
    """

    layout: Layout
    size: int
    number: int
    in_order: bool

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(layout: Layout, is_grouped: bool) -> "Groups":
        elements = math.prod(layout.shape)
        if not is_grouped:
            return Groups(layout, _SIZE, -(-elements // _SIZE), True)
        size, number = layout.group_size, math.prod(layout.scale_shape)
        whole_runs = layout.matrices == 1 or layout.run % size == 0
        return Groups(layout, size, number, layout.columns == 1 and whole_runs)

    @property
    def whole(self) -> int:
        """How many groups are not partial. None, if they do not lie in order."""
        return math.prod(self.layout.shape) // self.size if self.in_order else 0

    def take(
        self, x: Shaped[Array, "..."], start: int, number: int
    ) -> Shaped[Array, " elements"]:
        """So many groups of the leaf, from one on. A partial group is filled up with
        its last element, which changes neither its largest nor its smallest one."""
        if not self.in_order:
            tile = jnp.moveaxis(self.layout.tile(x), self.layout.tile_axis, -1)
            x = tile.reshape(self.number, -1)
            x = jnp.pad(x, [(0, 0), (0, self.size - x.shape[1])], mode="edge")
        x = x.reshape(-1)
        first, end = self.size * start, self.size * (start + number)
        missing = max(0, end - x.size)
        x = lax.slice_in_dim(x, first, end - missing)
        if missing > 0:
            x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing,))])
        return x

    def put(
        self, x: Shaped[Array, "..."], start: int, new: Shaped[Array, " elements"]
    ) -> Shaped[Array, "..."]:
        """The leaf with these groups in it, from one on."""
        if self.in_order:
            first = self.size * start
            new = lax.slice_in_dim(new, 0, min(new.size, x.size - first))
            if new.size < x.size:
                new = put(x.reshape(-1), first, new)
            return new.reshape(x.shape)
        shape = list(jax.eval_shape(self.layout.tile, x).shape)
        length = shape.pop(self.layout.tile_axis)
        tile = new.reshape(self.number, self.size)[:, :length]
        tile = jnp.moveaxis(tile.reshape(*shape, length), -1, self.layout.tile_axis)
        return self.layout.untile(tile)


def put(
    x: Shaped[Array, " n"], start: int | Array, part: Shaped[Array, " part"]
) -> Shaped[Array, " n"]:
    """The array with a part of it replaced, from one element on."""
    if part.size == x.size:
        return part
    # Of its own, and not what computes the part as well: it is compiled in no time.
    part = lax.optimization_barrier(part)
    return lax.dynamic_update_slice(x, part, (start,), allow_negative_indices=False)
