"""New arrays, each divided among devices like its leaf from the start."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from .._common import meshes
from . import state_specs
from .parts import by_mesh


def make(
    makers: list[Callable[[], PyTree]],
    shardings: list[NamedSharding | None],
    is_traced: bool,
) -> list[PyTree]:
    """What each of these makes for a leaf: moments, and other arrays of its shape. Each
    array is divided like the leaf from the start. `is_traced`: whether leaves are."""
    made: dict[int, PyTree] = {}
    for mesh, indices in by_mesh(shardings).items():
        make_here = lambda indices=indices: [makers[i]() for i in indices]
        if mesh is None:
            here = make_here()
        else:
            shapes = eqx.filter_eval_shape(make_here)
            divided = [
                state_specs.of_arrays(x, shardings[i])  # pyright: ignore
                for i, x in zip(indices, shapes, strict=True)
            ]
            # On `Explicit` axes of a mesh that is set, types tell how arrays lie,
            # and not `jit`.
            is_set = not jax.sharding.get_abstract_mesh().empty
            by_type = is_traced and is_set and meshes.is_explicit(mesh)
            if isinstance(mesh, Mesh) and not by_type:
                here = jax.jit(make_here, out_shardings=divided)()
            else:
                here = jtu.tree_map(meshes.constrain, make_here(), divided)
        made.update(zip(indices, here, strict=True))
    return [made[i] for i in range(len(makers))]
