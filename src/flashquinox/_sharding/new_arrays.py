"""New arrays, each divided among devices like its leaf from the start."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from .._common import eager, meshes
from .._storage.learned_codec import initial_parameter
from .._storage.quant_moment import QuantMoment
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
            if not isinstance(mesh, Mesh) or by_type:
                here = jtu.tree_map(meshes.constrain, make_here(), divided)
            elif eager.is_traced():
                here = jax.jit(make_here, out_shardings=divided)()
            else:
                here = at(shapes, divided)
        made.update(zip(indices, here, strict=True))
    return [made[i] for i in range(len(makers))]


def at(shapes: PyTree, places: PyTree) -> PyTree:
    """The arrays of moments, and others, in these places. All of them are zero but for
    the parameters of codecs that learn, which stay in the memory of devices."""

    def one(x: Any, there: Any) -> Any:
        if not isinstance(x, QuantMoment):
            return eager.zeros(x.shape, x.dtype, there)
        codes, scales = [
            eager.zeros(y.shape, y.dtype, where)
            for y, where in ((x.codes, there.codes), (x.scales, there.scales))
        ]
        new = eqx.tree_at(lambda x: (x.codes, x.scales), x, (codes, scales))
        if x.parameter is None:
            return new
        parameter = jnp.float32(initial_parameter(x.codec))
        device = there.parameter.with_memory_kind("device")
        return eqx.tree_at(
            lambda x: x.parameter, new, jax.device_put(parameter, device)
        )

    is_moment = lambda x: isinstance(x, QuantMoment)
    return jtu.tree_map(one, shapes, places, is_leaf=is_moment)
