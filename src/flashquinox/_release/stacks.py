"""Stacked leaves and their states: reading a layer, and writing it back."""

import math

import jax.lax as lax
import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Scalar

from .._common import meshes
from .._optimizer.engine import LeafState, Learned
from .._sharding import state_specs
from .._storage.quant_moment import QuantMoment, StoredMoment


def layers_have_own_groups(stack: LeafState) -> bool:
    """Whether no group of a moment spans several layers."""
    shape = stack.value.shape[1:]
    for moment in stack.moments.values():
        if not isinstance(moment, QuantMoment):
            continue
        if moment.axis is None and math.prod(shape) % moment.group_size != 0:
            return False
        if moment.axis == -len(shape) - 1:
            return False
    return True


def update_batches(sizes: dict[int, int]) -> list[list[int]]:
    """Batches of leaves to update together, by the numbers of the leaves. No batch is
    larger than the largest leaf, so that batching does not raise the peak memory."""
    batches: list[list[int]] = []
    left = 0
    for index, size in sizes.items():
        if size > left:
            batches.append([])
            left = max(sizes.values())
        batches[-1].append(index)
        left -= size
    return batches


def by_layer(stack: LeafState, layers: int) -> LeafState:
    """The state of a stack such that every array has the axis of layers first. Scales
    of a flattened leaf get that axis, and the parameters of codecs, which all layers
    share, are left out."""

    def one(moment: StoredMoment) -> StoredMoment:
        if not isinstance(moment, QuantMoment):
            return moment
        scales = moment.scales
        if moment.axis is None:
            scales = scales.reshape(layers, -1)
        return _with_scales(moment, scales, None)

    return stack._replace(moments={k: one(x) for k, x in stack.moments.items()})


def whole_stack(stack: LeafState, learned: Learned) -> LeafState:
    """The inverse of `by_layer`, with the parameters that codecs have learned."""

    def one(name: str, moment: StoredMoment) -> StoredMoment:
        if not isinstance(moment, QuantMoment):
            return moment
        scales = moment.scales
        if moment.axis is None:
            scales = scales.reshape(-1)
        return _with_scales(moment, scales, learned.get(name, (None, None))[1])

    return stack._replace(moments={k: one(k, x) for k, x in stack.moments.items()})


def _with_scales(
    moment: QuantMoment, scales: Array, parameter: Scalar | None
) -> QuantMoment:
    return QuantMoment(
        moment.codes,
        scales,
        moment.axis,
        moment.group_size,
        moment.codec,
        parameter,
    )


def layer_sharding(sharding: NamedSharding | None) -> NamedSharding | None:
    """How one layer is divided among devices, given how its stack is."""
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def read_layer(stack: PyTree[Array], layer: Array) -> PyTree[Array]:
    """One layer of each array of a tree."""
    part = jtu.tree_map(
        lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False), stack
    )
    # Otherwise XLA may fuse this read into a later use, after the stack was written to,
    # and has to keep a second copy of the stack for it.
    return materialized(part)


def write_layer(
    stack: PyTree[Array], part: PyTree[Array], layer: Array
) -> PyTree[Array]:
    """The stack with one layer replaced, in place inside of a loop."""
    return jtu.tree_map(
        lambda x, y: lax.dynamic_update_index_in_dim(x, y, layer, 0),
        stack,
        materialized(part),
    )


def place_stack(stack: LeafState, sharding: NamedSharding | None) -> LeafState:
    """Keeps a stack divided among devices as it was. XLA might choose the division of
    the gradients instead."""
    if sharding is None:
        return stack
    where = state_specs.of_arrays(stack, sharding)
    return jtu.tree_map(meshes.constrain, stack, where)


def materialized(tree: PyTree[Array]) -> PyTree[Array]:
    """Arrays that XLA computes on their own, rounded to their dtypes, before it uses
    them, as between the backward pass and an ordinary step. Each array has its own
    barrier, so that they need not all exist at the same time."""
    return jtu.tree_map(lax.optimization_barrier, tree)
