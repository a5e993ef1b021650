"""Stacked leaves and their states: reading a layer, and writing it back."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, ScalarLike

from .._common import memory, meshes
from .._sharding import state_specs
from .._storage.layout import Layout
from .._tile.step import TileState


C = TypeVar("C")
Y = TypeVar("Y")


def layers_have_own_groups(stack: TileState, layout: Layout) -> bool:
    """Whether no group of a stack spans several layers."""
    if not stack.is_grouped:
        return True
    layers = layout.shape[0]
    return not _is_run(layout) or layout.run % (layers * layout.group_size) == 0


def by_layer(stack: TileState, layout: Layout) -> TileState:
    """The state of a stack such that every array has the axis of layers first: scales
    get that axis where it is one of a run."""
    layers = layout.shape[0]
    return _with_groups(stack, layout, (layers, layout.groups // layers))


def whole_stack(stack: TileState, layout: Layout) -> TileState:
    """The inverse of `by_layer`."""
    return _with_groups(stack, layout, (layout.groups,))


def _with_groups(
    stack: TileState, layout: Layout, groups: tuple[int, ...]
) -> TileState:
    if not _is_run(layout):
        return stack
    shape = (*groups, *layout.scale_shape[1:])
    scales = jtu.tree_map(lambda x: x.reshape(shape), stack.scales)
    return eqx.tree_at(lambda x: x.scales, stack, scales)


def _is_run(layout: Layout) -> bool:
    """Whether groups run along the axis of layers, perhaps with others."""
    return len(layout.shape) + layout.axes[0] == 0


def layer_sharding(sharding: NamedSharding | None) -> NamedSharding | None:
    """How one layer is divided among devices, given how its stack is."""
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def read_layer(stack: PyTree[Array], layer: ScalarLike) -> PyTree[Array]:
    """One layer of each array of a tree, on the device."""

    def one(x: Array) -> Array:
        part = lax.dynamic_index_in_dim(x, layer, keepdims=False)
        return lax.optimization_barrier(memory.to_device(part))

    # Without barriers, XLA may fuse this read into a later use, after the stack was
    # written to, and has to keep a second copy of the stack for it.
    return jtu.tree_map(one, stack)


def write_layer(
    stack: PyTree[Array], part: PyTree[Array], layer: ScalarLike
) -> PyTree[Array]:
    """The stack with one layer replaced, in place inside of a loop."""

    def one(x: Array, y: Array) -> Array:
        y = memory.where(lax.optimization_barrier(y), x)
        return lax.dynamic_update_index_in_dim(x, y, layer, 0)

    return jtu.tree_map(one, stack, part)


def from_last_to_first(
    turn: Callable[[Array, C], tuple[C, Y]], carry: C, layers: int, first_apart: bool
) -> tuple[C, Y]:
    """A loop of one turn for each layer. `first_apart`: the first turn comes before the
    loop, as its `carry` has not the structure of the others. Like `jax.lax.scan`, it
    returns what turns return stacked."""
    if not first_apart:
        turn_ = lambda carry, layer: turn(layer, carry)
        return lax.scan(turn_, carry, jnp.arange(layers), reverse=True)
    carry, found = turn(jnp.int32(layers - 1), carry)
    found = jtu.tree_map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), found)

    def body(i: Array, state: tuple[C, Y]) -> tuple[C, Y]:
        carry, found = state
        layer = layers - 2 - i
        carry, new = turn(layer, carry)
        return carry, write_layer(found, new, layer)

    return lax.fori_loop(0, layers - 1, body, (carry, found))


def place_stack(
    stack: TileState, layout: Layout, sharding: NamedSharding | None
) -> TileState:
    """Keeps a stack divided among devices as it was. XLA might choose the division of
    the gradients instead."""
    if sharding is None:
        return stack
    constrain = lambda x, spec: meshes.constrain(x, NamedSharding(sharding.mesh, spec))
    return jtu.tree_map(constrain, stack, state_specs.of_leaf(stack, layout, sharding))


def materialized(tree: PyTree[Array]) -> PyTree[Array]:
    """Arrays that XLA computes on their own, rounded to their dtypes, before it uses
    them, as between the backward pass and an ordinary step. Each array has its own
    barrier, so that they need not all exist at the same time."""
    return jtu.tree_map(lax.optimization_barrier, tree)
