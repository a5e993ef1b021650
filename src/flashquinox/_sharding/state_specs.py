"""Shardings of the state of a leaf, which follow that of the leaf."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._common.meshes import as_typed, divisions
from .._storage.layout import Layout
from .._storage.quant_moment import QuantMoment
from .._tile.step import TileState


def holds_whole_groups(layout: Layout, sharding: NamedSharding) -> bool:
    """Whether every group of a leaf lies within one part of it."""
    return layout.divides(divisions(sharding))


def of_scales(layout: Layout, sharding: NamedSharding) -> PartitionSpec:
    """The spec of the scales of a leaf: that of the leaf without axes that are merged
    with the one before them, if parts hold whole groups; otherwise replicated."""
    parts = divisions(sharding)
    if math.prod(parts) == 1 or not layout.divides(parts):
        return PartitionSpec()
    of_axes = [*sharding.spec, *[None] * (len(layout.shape) - len(sharding.spec))]
    of_scales = layout.of_scales(of_axes)
    # As short as that of the leaf where it is equal to it.
    return PartitionSpec(*of_scales[: len(sharding.spec)])


def of_array(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """That of an array of a leaf of this sharding. An axis over which it is a mean has
    the length 1, and is not divided."""
    parts = divisions(sharding)
    cut = [n == 1 and k > 1 for n, k in zip(shape, parts, strict=False)]
    if not any(cut):
        return sharding
    spec = [None if x else s for x, s in zip(cut, sharding.spec, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def of_arrays(tree: PyTree, sharding: NamedSharding) -> PyTree[NamedSharding]:
    """The shardings of the arrays that a state has for a leaf: moments, means, and
    others of the shape of the leaf."""

    def one(x: Any) -> Any:
        if not isinstance(x, QuantMoment):
            return of_array(x.shape, sharding)
        scales = NamedSharding(sharding.mesh, of_scales(x.layout, sharding))
        parts = sharding, scales
        if x.parameter is None:
            return eqx.tree_at(lambda x: (x.codes, x.scales), x, parts)
        alone = NamedSharding(sharding.mesh, PartitionSpec())
        where = lambda x: (x.codes, x.scales, x.parameter)
        return eqx.tree_at(where, x, (*parts, alone))

    return jtu.tree_map(one, tree, is_leaf=lambda x: isinstance(x, QuantMoment))


def of_leaf(
    state: TileState, layout: Layout, sharding: NamedSharding
) -> PyTree[PartitionSpec]:
    """The specs of the arrays of a leaf that is taken apart."""
    scales = of_scales(layout, sharding)
    return eqx.tree_at(
        lambda x: x.scales, alike(sharding.spec, state), alike(scales, state.scales)
    )


def alike(spec: PartitionSpec, tree: PyTree) -> PyTree[PartitionSpec]:
    """One spec for all arrays of a tree."""
    return jtu.tree_map(lambda _: spec, tree)


def where_the_weight_is(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """A part of the state of a leaf. Arrays in it that are on no mesh, such as NumPy
    arrays, get the sharding of the weight on `Explicit` axes."""
    nowhere = lambda x: jax.typeof(x).sharding.mesh.empty
    return jtu.tree_map(
        lambda x, there: as_typed(jnp.asarray(x), there) if nowhere(x) else x,
        tree,
        of_arrays(tree, sharding),
    )
