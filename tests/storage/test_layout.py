import math

import hypothesis.strategies as st
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import flashquinox as fq
from flashquinox._storage.codec import Dither
from flashquinox._storage.layout import choose_layout, Layout

from ..helpers import of_elements, SHAPES, slow, tree_identical


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
def test_reductions_of_groups_are_scales(layout):
    layout = Layout(*layout)
    tile = layout.tile(jnp.zeros(layout.shape))
    assert jnp.sum(tile, axis=layout.tile_axis).shape == layout.scale_shape


@given(_layouts)
def test_groups_are_runs_along_the_axis(layout):
    layout = Layout(*layout)
    groups = np.arange(math.prod(layout.scale_shape)).reshape(layout.scale_shape)
    found = of_elements(layout, groups)
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


@pytest.mark.parametrize(
    "shape,axis",
    [
        ((64, 96), -2),
        ((3, 64, 5), -2),
        # In a TPU's memory, the columns are the rows of a transposed matrix; where
        # full groups fit into them.
        ((2, 128, 96), -1),
        ((70, 64), -1),
        ((128, 80), -2),
        # No full groups along rows, or no rows.
        ((33, 64), -1),
        ((64,), -1),
        ((), None),
    ],
)
def test_choose_rows(shape, axis):
    assert choose_layout(shape, 32, prefer_rows=True).axis == axis


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


_PADDED = [*SHAPES.values(), (70, 40), (2, 40, 3)]
# Codecs that flatten, and those that do not, with leaves of every kind; the rest once.
_QUICK = {
    "flashquinox": [(), (0,), (37,), (70, 40), (2, 40, 3)],
    "flashoptim": [(), (37,), (2, 40, 3)],
}


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
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    if layout.axis is None:
        x = x.reshape(-1)
    length = x.shape[axis]
    full = length // 32 * 32
    rest = lax.slice_in_dim(x, full, length, axis=axis)
    alone = Layout(rest.shape, axis, 32)
    for codec in (codecs.signed, codecs.nonnegative):
        if codec is codecs.nonnegative:
            x, rest = x * x, rest * rest
        dither = Dither.at(jnp.asarray(3), 0)
        tile = layout.tile(x.reshape(shape))
        codes, scales = codec.encode(tile, axis, dither)
        codes = layout.untile(codes).reshape(x.shape)
        codes_alone, scales_alone = codec.encode(alone.tile(rest), axis, dither)
        partial = lax.slice_in_dim(codes, full, length, axis=axis)
        assert tree_identical(alone.untile(codes_alone), partial)
        if scales is not None:
            assert scales_alone is not None
            assert scales_alone.shape[axis] == (0 if full == length else 1)
            last = lax.slice_in_dim(scales, full // 32, scales.shape[axis], axis=axis)
            assert tree_identical(scales_alone, last)
