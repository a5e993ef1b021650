import math

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import flashquinox as fq
from flashquinox._codec import Dither
from flashquinox._layout import choose_layout, Layout

from .helpers import SHAPES, tree_identical


_shapes = st.lists(st.integers(0, 70), max_size=4).filter(
    lambda shape: math.prod(shape) <= 20000
)


@st.composite
def _layout_arguments(draw) -> tuple:
    shape = tuple(draw(_shapes))
    axis = draw(st.sampled_from([None, *range(-len(shape), 0)]))
    return shape, axis, draw(st.sampled_from([16, 32, 48, 128]))


_layouts = _layout_arguments()


@given(_layouts)
def test_round_trip(layout):
    layout = Layout(*layout)
    x = np.arange(math.prod(layout.shape), dtype=np.int32).reshape(layout.shape) + 1
    tile = layout.tile(jnp.asarray(x))
    assert tree_identical(np.asarray(layout.untile(tile)), x)


@given(_layouts)
def test_scales_broadcast_and_round_trip(layout):
    layout = Layout(*layout)
    scales = jnp.arange(math.prod(layout.scale_shape)).reshape(layout.scale_shape)
    tile = layout.tile(jnp.zeros(layout.shape))
    tile_scales = layout.tile_scales(scales)
    assert tile_scales.shape[layout.tile_axis] == 1
    assert jnp.broadcast_shapes(tile_scales.shape, tile.shape) == tile.shape
    assert tree_identical(layout.untile_scales(tile_scales), scales)


@given(_layouts)
def test_groups_are_runs_along_the_axis(layout):
    layout = Layout(*layout)
    tile = np.asarray(layout.tile(jnp.ones(layout.shape, jnp.int32)))
    groups = np.arange(math.prod(layout.scale_shape)).reshape(layout.scale_shape)
    tile_groups = np.asarray(layout.tile_scales(jnp.asarray(groups)))
    found = layout.untile(jnp.asarray(tile * tile_groups))
    # The definition: the group of an element is its position along the axis (or in the
    # flattened leaf) divided by the group size.
    shape = (math.prod(layout.shape),) if layout.axis is None else layout.shape
    position = list(np.indices(shape))
    position[layout.tile_axis] //= layout.group_size
    assert np.array_equal(found, groups[tuple(position)].reshape(layout.shape))


@pytest.mark.parametrize(
    "shape,axis,group_size,scale_shape",
    [
        ((), None, 32, (1,)),
        ((0,), -1, 32, (0,)),
        ((0, 64), -1, 32, (0, 2)),
        ((5,), -1, 32, (1,)),
        ((64, 96), -1, 32, (64, 3)),
        ((64, 96), -2, 32, (2, 96)),
        ((64, 33), -1, 32, (64, 2)),
        ((3, 5, 7), None, 32, (4,)),
        ((8, 256), -1, 128, (8, 2)),
    ],
)
def test_scale_shape(shape, axis, group_size, scale_shape):
    assert Layout(shape, axis, group_size).scale_shape == scale_shape


@pytest.mark.parametrize(
    "shape,axis",
    [
        ((), None),
        ((7,), -1),
        # The last axis among equals.
        ((64, 64), -1),
        ((33, 33), -1),
        # No padding beats some.
        ((64, 33), -2),
        # Long runs beat short ones.
        ((64, 3, 3), -3),
        ((10, 512), -1),
    ],
)
def test_choose_layout(shape, axis):
    assert choose_layout(shape, 32).axis == axis


@given(_shapes)
def test_choose_layout_needs_the_fewest_scales(shape):
    shape = tuple(shape)
    count = lambda layout: math.prod(layout.scale_shape)
    best = count(choose_layout(shape, 32))
    axes = range(-len(shape), 0)
    assert all(best <= count(Layout(shape, axis, 32)) for axis in axes)


@pytest.mark.parametrize("axis", [0, 1, -3])
def test_axis_counts_from_the_end(axis):
    with pytest.raises(ValueError, match="counts from the end"):
        Layout((3, 4), axis, 32)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("moments", fq.MomentCodecs.names())
def test_padding_never_leaks(shape, moments):
    """Whatever fills up a partial group, its elements are stored alike."""
    codecs = fq.MomentCodecs.named(moments)
    layout = codecs.layout(shape, 32)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    dither = Dither.at(jnp.asarray(3), 0)
    for codec, value in ((codecs.signed, x), (codecs.nonnegative, x * x)):
        tile = layout.tile(value)
        codes, scales = codec.encode(tile, layout.tile_axis, dither)
        if scales is not None:
            filled = jnp.where(
                tile == 0, tile.max(layout.tile_axis, keepdims=True), tile
            )
            again = codec.encode(filled, layout.tile_axis, dither)
            assert tree_identical(layout.untile(again[0]), layout.untile(codes))
            assert tree_identical(again[1], scales)
