"""Leaves for kernels in C++, of GPUs and of CPUs."""

import functools as ft

import jax.numpy as jnp

import flashquinox as fq
from flashquinox._storage import moment_codecs
from flashquinox._storage.layout import layout_of

from ..kernels import arrays, run


# Two leaves in one kernel whose last tiles are partial, and leaves of other kinds: one
# without groups, and one of which the last groups are partial.
SHAPES = {
    "matrix": (70, 64),
    "stack": (2, 96, 96),
    "vector": (40,),
    "ragged": (37, 5),
}
# Of three models.
ENSEMBLE = {"matrix": (3, 64, 128), "other": (3, 96, 64), "vector": (3, 40)}
# Leaves of two kinds that are packed, one that is too large, and one of another size.
PACKED = fq.Storage(pack_below=8192)
PACKED_SHAPES = SHAPES | {"large": (96, 128), "short": (9,), "odd": (3, 5, 7)}

# Shapes, axes of groups, and sizes of groups.
LAYOUTS = {
    # Whole groups, and one more: of a leaf that is tiny, and of one that is not.
    "tiny": ((7, 33), (-2, -1), 32),
    "large": ((131, 101), (-2, -1), 32),
    # A partial group in each of several runs, as on a mesh.
    "runs": ((6, 7, 11), (-2, -1), 32),
    "sizes": ((4, 96), (-1,), 48),
    "partial sizes": ((10, 33), (-2, -1), 80),
    # Groups along rows: partial ones, and rows of several axes.
    "rows": ((40, 6), (-2,), 32),
    "merged rows": ((2, 5, 8, 6), (-3, -2), 32),
}


def run_layout(backend, name, monkeypatch, device=None):
    shape, axes, group_size = LAYOUTS[name]
    layout = lambda shape, size, *_: layout_of(shape, axes, size)
    monkeypatch.setattr(moment_codecs, "choose_layout", layout)
    params, *grads = [arrays({"w": shape}, jnp.bfloat16, seed) for seed in range(3)]
    storage = fq.Storage(group_size=group_size)
    make = ft.partial(fq.adamw, 1e-2, storage=storage)
    run(backend, make, params, grads, device=device)
