import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flashquinox as fq
from flashquinox._storage.codec import Dither
from flashquinox._storage.layout import choose_layout, Layout

from ..helpers import SHAPES, slow, tree_identical


_shapes = st.lists(st.integers(0, 70), max_size=4).filter(
    lambda shape: math.prod(shape) <= 20000
)


@st.composite
def _layout_arguments(draw) -> tuple:
    shape = tuple(draw(_shapes))
    first = draw(st.integers(-len(shape), -1)) if shape else 0
    last = draw(st.integers(first, -1)) if shape else -1
    return (
        shape,
        tuple(range(first, last + 1)),
        draw(st.sampled_from([16, 32, 48, 128])),
    )


_layouts = _layout_arguments()


@pytest.mark.once
@given(_layouts)
def test_tiles(arguments):
    layout = Layout(*arguments)
    x = np.arange(math.prod(layout.shape), dtype=np.int32).reshape(layout.shape) + 1
    groups = np.arange(math.prod(layout.scale_shape), dtype=np.int32)
    groups = groups.reshape(layout.scale_shape)

    @jax.jit
    def run(x, groups):
        tile = layout.tile(x)
        filled = jnp.broadcast_to(jnp.expand_dims(groups, layout.tile_axis), tile.shape)
        sums = jnp.sum(tile, axis=layout.tile_axis)
        return layout.untile(tile), sums, layout.untile(filled)

    again, sums, found = jax.device_get(run(x, groups))
    assert tree_identical(again, x)
    # Reductions of groups are scales.
    assert sums.shape == layout.scale_shape
    # The definition: the group of an element is its position in its run, divided by the
    # group size.
    shape = list(layout.scale_shape)
    shape[layout.tile_axis] = layout.run
    position = list(np.indices(shape))
    position[layout.tile_axis] //= layout.group_size
    assert np.array_equal(found, groups[tuple(position)].reshape(layout.shape))
    assert math.prod(shape) == layout.matrices * layout.run * layout.columns


@pytest.mark.parametrize(
    "shape,axes,group_size,scale_shape",
    [
        ((), (), 32, (1,)),
        # Scalars of an ensemble.
        ((3,), (), 32, (3, 1)),
        ((0,), (-1,), 32, (0,)),
        ((0, 64), (-1,), 32, (0, 2)),
        ((5,), (-1,), 32, (1,)),
        ((64, 96), (-1,), 32, (64, 3)),
        ((64, 96), (-2,), 32, (2, 96)),
        ((64, 33), (-1,), 32, (64, 2)),
        ((3, 5, 7), (-3, -2, -1), 32, (4,)),
        ((8, 16, 3, 3), (-3, -2, -1), 32, (8, 5)),
        ((8, 16, 8, 5), (-3, -2), 32, (8, 4, 5)),
        ((8, 256), (-1,), 128, (8, 2)),
    ],
)
def test_scale_shape(shape, axes, group_size, scale_shape):
    assert Layout(shape, axes, group_size).scale_shape == scale_shape


@pytest.mark.parametrize(
    "shape,axes",
    [
        ((), ()),
        ((7,), (-1,)),
        ((10, 512), (-1,)),
        # As few trailing axes as hold whole groups.
        ((64, 33), (-2, -1)),
        ((512, 512, 3, 3), (-3, -2, -1)),
        ((3, 3, 512, 512), (-1,)),
        ((512, 1, 7, 7), (-4, -3, -2, -1)),
        ((768, 12, 64), (-1,)),
        ((768, 8, 12), (-2, -1)),
        # None do: one partial group at the end.
        ((33, 33), (-2, -1)),
        ((3, 5, 7), (-3, -2, -1)),
    ],
)
def test_choose_layout(shape, axes):
    assert choose_layout(shape, 32).axes == axes


@pytest.mark.parametrize(
    "shape,axes",
    [
        ((64, 96), (-2,)),
        # In a TPU's memory, the last axis is the rows where less is filled up.
        ((2, 128, 96), (-1,)),
        ((70, 64), (-1,)),
        ((128, 80), (-1,)),
        ((768, 12, 64), (-1,)),
        ((64, 64, 3, 3), (-4,)),
        # The last group of a run may be partial.
        ((33, 64), (-2,)),
        # Along an axis that is neither the rows nor the columns, where there are few
        # rows; but not along the axis of layers.
        ((4096, 8, 128), (-3,)),
        ((24, 4096, 8, 128), (-3,)),
        ((12, 768, 1, 7, 7), (-2,)),
        # Groups are short where all axes but one are.
        ((3, 64, 5), (-1,)),
        ((64,), (-1,)),
        ((96, 1, 1), (-3, -2, -1)),
        ((), ()),
    ],
)
def test_choose_rows(shape, axes):
    assert choose_layout(shape, 32, prefer_rows=True).axes == axes


@given(_shapes)
def test_choose_layout_needs_the_fewest_scales(shape):
    shape = tuple(shape)
    count = lambda layout: math.prod(layout.scale_shape)
    best = count(choose_layout(shape, 32))
    axes = range(-len(shape), 0)
    assert all(best <= count(Layout(shape, (axis,), 32)) for axis in axes)


@pytest.mark.parametrize("axes", [(0,), (1,), (-3,), (-1, -2), (-1, 0)])
def test_axes_count_from_the_end(axes):
    with pytest.raises(ValueError, match="count from the end"):
        Layout((3, 4), axes, 32)


_PADDED = [*SHAPES.values(), (70, 40), (2, 40, 3)]
# Codecs that flatten, and those that do not, with leaves of every kind; of the rest,
# each class once.
_QUICK = {
    "flashquinox": [(0,), (37,), (70, 40), (2, 40, 3)],
    "flashoptim": [(), (2, 40, 3)],
    **dict.fromkeys(("linear", "sqrt", "fourth_root"), ()),
}


@pytest.mark.product
@pytest.mark.parametrize(
    "shape, moments",
    [
        slow(shape, name, unless=shape in _QUICK.get(name, [(70, 40)]))
        for shape in _PADDED
        for name in fq.MomentCodecs.names()
    ],
    ids=str,
)
def test_padding_never_leaks(shape, moments):
    """A partial group is stored as it would be alone."""
    codecs = fq.MomentCodecs.named(moments)
    layout = codecs.layout(shape, 32)
    axis = layout.tile_axis
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if len(layout.axes) != 1:
        x = x.reshape(-1)
    length = x.shape[axis]
    full = length // 32 * 32
    from_full = lambda x, start: np.split(x, [start], axis=axis)[1]
    rest = from_full(x, full)
    alone = Layout(rest.shape, (axis,), 32)

    @jax.jit
    def encode(x, rest):
        """Of each codec: codes and scales, within the leaf and alone."""
        dither = Dither.at(jnp.asarray(3), 0)
        found = []
        for codec in (codecs.signed, codecs.nonnegative):
            if codec is codecs.nonnegative:
                x, rest = x * x, rest * rest
            codes, scales = codec.encode(layout.tile(x.reshape(shape)), axis, dither)
            codes_alone, scales_alone = codec.encode(alone.tile(rest), axis, dither)
            codes = layout.untile(codes).reshape(x.shape)
            found.append((codes, alone.untile(codes_alone), scales, scales_alone))
        return found

    for codes, codes_alone, scales, scales_alone in jax.device_get(encode(x, rest)):
        assert tree_identical(codes_alone, from_full(codes, full))
        if scales is not None:
            assert scales_alone.shape[axis] == (0 if full == length else 1)
            assert tree_identical(scales_alone, from_full(scales, full // 32))


@pytest.mark.once
def test_partial_groups_within_parts():
    """Of a leaf on a mesh whose axes are in the types of arrays, as `jax.make_mesh`
    makes them: groups that are filled up lie within parts."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    there = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (40, 36)), there)
    optim, weights = fq.lion(1e-2), {"w": x.astype(jnp.bfloat16)}
    _, state = jax.jit(optim.step)(weights, optim.init(weights), {"w": x})
    found = state.moments["mu"]["w"]
    assert found.layout.run % found.group_size
    on_one = jtu.tree_map(lambda x: jnp.asarray(np.asarray(x)), found)
    np.testing.assert_array_equal(found.decode(), on_one.decode())
    compressed = fq.compress(optax.trace(0.9))
    _, state = compressed.update({"w": x}, compressed.init({"w": x}))
    assert state.inner_state.trace["w"].decode().sharding.is_equivalent_to(there, 2)
