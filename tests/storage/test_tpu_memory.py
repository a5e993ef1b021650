"""Where leaves and their groups lie in a TPU's memory, by the compiler's own rules."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from flashquinox._storage.layout import choose_layout
from flashquinox._storage.tpu_memory import groups_in_memory, memory_order

from ..helpers import slow
from ..kernels import tpu_devices


def _shapes(count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 4, 7, 8, 12, 16, 24, 32, 64, 100, 128, 192, 768, 1000, 4096]
    return [
        tuple(map(int, rng.choice(lengths, rng.integers(2, 6)))) for _ in range(count)
    ]


@pytest.mark.once
@pytest.mark.parametrize(
    "topology",
    ["v5e:2x2", *map(slow, ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])],
)
def test_order_is_the_compilers(topology):
    device = tpu_devices(topology)[0]
    for shape in _shapes(300):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
            dtype = np.dtype(dtype)
            layout = str(device.client.get_default_layout(dtype, shape, device))
            # From the innermost axis.
            expected = layout[1:].partition(":")[0].split(",")
            order = memory_order(shape, dtype.itemsize)
            assert list(map(str, reversed(order))) == expected


@pytest.mark.parametrize(
    "shape, axis, kind, in_place",
    [
        ((50257, 768), 0, "rows", True),
        ((768, 12, 64), 2, "rows", True),
        # One group in each matrix, or so few that XLA lays out scales in another order.
        ((48, 4096, 16), 2, "matrices", True),
        ((768, 80, 3), 1, "matrices", True),
        ((4096, 8, 128), 0, "planes", True),
        # Weights lie like the scales, and codes do not.
        ((4096, 2, 128), 0, "pairs", True),
        ((384, 192, 2, 2), 1, "pairs", True),
        # Scales lie like the codes, and weights do not.
        ((2, 2, 33, 128), 2, "rows", False),
        # Columns are made the rows.
        ((256, 256), 1, "rows", False),
    ],
)
def test_groups(shape, axis, kind, in_place):
    found = groups_in_memory(shape, axis, 32)
    assert ("pairs" if found.pairs else found.kind, found.in_place) == (kind, in_place)
    assert not found.pairs or found.kind == "matrices"


# Axes that models have: channels, kernels, heads and their sizes, words, layers.
_LENGTHS = (2, 3, 5, 12, 24, 40, 64, 80, 96, 100, 128, 768, 1001)


@pytest.mark.once
def test_arrays_are_seen_as_they_lie():
    """Of leaves with three axes, nearly all. The kernel reorders the others."""
    shapes = [
        shape
        for shape in itertools.islice(itertools.product(_LENGTHS, repeat=3), 0, None, 5)
        if math.prod(shape) >= 2**14
    ]
    axes = {shape: choose_layout(shape, 32, prefer_rows=True).axes for shape in shapes}
    others = [
        shape
        for shape in shapes
        if not groups_in_memory(shape, *axes[shape], 32).in_place
    ]
    assert all(len(x) == 1 for x in axes.values())
    # Two matrices, whose rows fill no tile.
    assert all(2 in shape and {100, 1001} & {*shape} for shape in others)
    assert len(others) <= 0.012 * len(shapes)
