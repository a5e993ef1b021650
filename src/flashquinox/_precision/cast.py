"""A model in another precision, but for the layers that need their own."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .._common.number_checks import check_flag
from .._model.selection import children, Selection, Selectors
from .._model.trees import is_array, Model
from .._model.variables import is_statistic, with_values_of
from .._model.widened import Widened
from .._optimizer import checks
from .._optimizer.state import OptimizerState


def cast(
    model: Model, dtype: DTypeLike, keep: Selectors = None, *, wrap: bool = True
) -> Model:
    """Casts the floating-point arrays of a model.

    Layers with running statistics stay float32, as a running average in bfloat16 stands
    still: those in which there is nothing but indices into an `equinox.nn.State`, such
    as `equinox.nn.BatchNorm`, and every `equinox.nn.StatefulLayer` with such an index
    of its own, such as `equinox.nn.SpectralNorm`, which stays so with the layer in it.
    So do the `BatchStat`s of Flax NNX, and what is in `keep`. An `equinox.nn.State` and
    a [`flashquinox.OptimizerState`][] are left alone, as are numbers of 8 bits or
    fewer, such as frozen float8 weights, which have scales elsewhere that would not fit
    any more (to cast those, use `jax.tree.map`).

    **Arguments:**

    - `model`: any pytree, of arrays or of `jax.ShapeDtypeStruct`s, which keep their
        shardings.
    - `dtype`: a floating-point dtype, such as `jnp.bfloat16`.
    - `keep`: what is not cast, and made float32 where it is narrower. A pattern for
        dotted paths of leaves or subtrees (`"layers.0"`, `"*.norm.weight"`; `*` also
        stands for dots), a type (`eqx.nn.LayerNorm`), an object in the model, a
        function of an array (`lambda x: x.ndim < 2`), or a list of these.
    - `wrap`: whether each layer that stays float32, if it can be called, becomes a
        [`flashquinox.Widened`][]: it is given float32, and gives `dtype`. Otherwise its
        results are float32 like its weights. A chosen leaf is no layer.

    **Returns:**

    A pytree like `model`. Integers, complex arrays, functions and all other leaves are
    left alone. Casting to float32 or float64 casts all and takes out what `wrap` put
    in, so that two casts give the structure of one.

    **Raises:**

    `TypeError` if `dtype` is not floating-point, or for other things in `keep`;
    `ValueError` for a pattern or an object that is nowhere in the model.
    """
    check_flag("cast", "wrap", wrap)
    dtype = checks.floating_dtype("cast(model, dtype)", dtype)
    selection = Selection("cast", "keep", keep)
    narrow = jnp.finfo(dtype).bits < 32

    def cast_node(path: tuple[Any, ...], node: Any, kept: bool, wrapped: bool) -> Any:
        chosen = selection.takes(path, node)
        if isinstance(node, eqx.nn.State | eqx.nn.StateIndex | OptimizerState):
            return node
        if isinstance(node, Widened):
            layer_path = (*path, jtu.GetAttrKey("layer"))
            layer = cast_node(layer_path, node.layer, kept or narrow, True)
            return Widened(layer, dtype) if narrow and not wrapped else layer
        parts = children(node)
        kept = (
            kept or chosen or (narrow and (is_statistic(node) or _has_statistics(node)))
        )
        if parts is None:
            if not _is_floating(node):
                return node
            if not kept:
                return _as_dtype(node, dtype)
            is_narrow = jnp.finfo(node.dtype).bits < 32
            return _as_dtype(node, jnp.float32 if is_narrow else node.dtype)
        wrap_here = narrow and wrap and kept and not wrapped and _is_layer(node)
        named, put_together = parts
        new = put_together(
            [
                cast_node((*path, key), child, kept, wrapped or wrap_here)
                for key, child in named
            ]
        )
        return Widened(new, dtype) if wrap_here else new

    new = cast_node((), model, False, False)
    selection.check_used(model)
    return with_values_of(model, new)


def _is_floating(x: Any) -> bool:
    is_floating = is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
    return is_floating and jnp.finfo(x.dtype).bits >= 16


def _as_dtype(x: Any, dtype: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return jnp.asarray(x, dtype)


def _is_layer(x: Any) -> bool:
    return isinstance(x, eqx.Module) and callable(x)


def _has_statistics(x: Any) -> bool:
    """Whether this is a layer that has a part in an `equinox.nn.State` itself; not a
    model made of such layers, or of any others.

    A `StateIndex` is all that is below `BatchNorm`. `SpectralNorm` has the layer that
    it normalizes beside it, and so looks like a model that counts its calls, but says
    that it is a stateful layer.
    """
    if is_statistic(x):
        return True
    if not isinstance(x, eqx.Module) or isinstance(x, eqx.nn.StateIndex):
        return False
    # Beside them, activation functions, numbers and modules without arrays are nothing.
    parts = children(x) or ([], None)
    below = [child for _, child in parts[0] if children(child) is not None]
    own = [
        is_index
        for child in below
        if (is_index := isinstance(child, eqx.nn.StateIndex)) or _has_arrays(child)
    ]
    return any(own) and (all(own) or isinstance(x, eqx.nn.StatefulLayer))


def _has_arrays(tree: PyTree) -> bool:
    return any(is_array(leaf) for leaf in jtu.tree_leaves(tree))
