"""Casting a model, except for the layers that must stay in float32."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .._common import eager
from .._common.number_checks import check_flag
from .._model.float32_layer import Float32Layer
from .._model.quantized import scales
from .._model.selection import children, Selection, Selectors
from .._model.trees import flatten, is_array, Model
from .._model.variables import is_statistic, with_values_of
from .._optimizer.leaf_checks import check_floating_dtype
from .._optimizer.state import OptimizerState


def cast(
    model: Model, dtype: DTypeLike, keep: Selectors = None, *, wrap: bool = True
) -> Model:
    """Casts the floating-point arrays of a model.

    Each weight is rounded to `dtype`, and the bits that `dtype` cannot hold are lost.
    To train a float32 model, use [`flashquinox.prepare`][]: it keeps these bits in the
    corrections of the optimizer's state. Without them, every master weight starts on
    `dtype`'s grid, where a step of less than half a unit changes nothing that the model
    sees.

    These stay float32:

    - Layers with running statistics, because a running average in bfloat16 stops
        moving. These are layers that hold nothing but indices into an
        `equinox.nn.State`, such as `equinox.nn.BatchNorm`, and every
        `equinox.nn.StatefulLayer` with such an index of its own, such as
        `equinox.nn.SpectralNorm` together with the layer that it normalizes.
    - The `BatchStat`s of Flax NNX.
    - The parts that `keep` selects.

    An `equinox.nn.State` and a [`flashquinox.OptimizerState`][] are left alone. So are
    numbers of 8 bits or fewer, such as frozen float8 weights, and what looks like a
    scale or a zero point next to such codes, by the same rule as in `init`: rounded, it
    would change all of its weights (to cast those, use `jax.tree.map`, or `keep` for
    float32).

    **Arguments:**

    - `model`: any pytree, of arrays or of `jax.ShapeDtypeStruct`s, which keep their
        shardings.
    - `dtype`: a floating-point dtype, such as `jnp.bfloat16`.
    - `keep`: the parts to keep in float32; narrower arrays in them are widened. A
        pattern for dotted paths of leaves or subtrees (`"layers.0"`,
        `"*.norm.weight"`; `*` also stands for dots), a type (`eqx.nn.LayerNorm`), an
        object in the model, a function of an array (`lambda x: x.ndim < 2`), or a list
        of these.
    - `wrap`: whether each callable layer that stays float32 is wrapped in a
        [`flashquinox.Float32Layer`][], which takes float32 inputs and returns `dtype`.
        Otherwise its results are float32, like its weights. Individual arrays are never
        wrapped.

    **Returns:**

    A pytree like `model`. Integers, complex arrays, functions and all other leaves are
    left alone. Casting to float32 or float64 casts every floating-point array and
    removes the wrappers, so that casting down and up again gives the original
    structure.

    **Raises:**

    `TypeError` if `dtype` is not floating-point, or `keep` has none of the forms above;
    `ValueError` for a pattern or an object that is nowhere in the model.
    """
    return cast_for("cast", model, dtype, keep, wrap)


def cast_for(
    call: str, model: Model, dtype: DTypeLike, keep: Selectors, wrap: bool
) -> Model:
    """`cast`, for errors that name `call` as the user wrote it."""
    check_flag(call, "wrap", wrap)
    dtype = check_floating_dtype(f"{call}(model, dtype)", dtype)
    selection = Selection(call, "keep", keep)
    of_codes = {id(leaf.value) for leaf in scales(flatten(model)[0])}
    narrow = jnp.finfo(dtype).bits < 32

    def cast_node(path: tuple[Any, ...], node: Any, kept: bool, wrapped: bool) -> Any:
        chosen = selection.selects(path, node)
        if isinstance(node, eqx.nn.State | eqx.nn.StateIndex | OptimizerState):
            return node
        if isinstance(node, Float32Layer):
            layer_path = (*path, jtu.GetAttrKey("layer"))
            layer = cast_node(layer_path, node.layer, kept or narrow, True)
            return Float32Layer(layer, dtype) if narrow and not wrapped else layer
        parts = children(node)
        kept = (
            kept or chosen or (narrow and (is_statistic(node) or _has_statistics(node)))
        )
        if parts is None:
            if not _is_floating(node) or (id(node) in of_codes and not kept):
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
        return Float32Layer(new, dtype) if wrap_here else new

    new = cast_node((), model, False, False)
    selection.check_used(model)
    return with_values_of(model, new)


def _is_floating(x: Any) -> bool:
    is_floating = is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
    return is_floating and jnp.finfo(x.dtype).bits >= 16


def _as_dtype(x: Any, dtype: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    as_dtype = lambda x: jnp.asarray(x, dtype)
    new = None
    if isinstance(x, jax.Array) and x.dtype != dtype:
        new = eager.computed(eager.elementwise(as_dtype), [x], eager.place(x))
    return as_dtype(x) if new is None else new


def _is_layer(x: Any) -> bool:
    return isinstance(x, eqx.Module) and callable(x)


def _has_statistics(x: Any) -> bool:
    """Whether this layer keeps running statistics itself, in an `equinox.nn.State`. A
    model made of such layers does not.

    A `BatchNorm` holds nothing but a `StateIndex`. A `SpectralNorm` also holds the
    layer that it normalizes. It is told from a model that counts its calls by its type:
    it is a `StatefulLayer`.
    """
    if is_statistic(x):
        return True
    if not isinstance(x, eqx.Module) or isinstance(x, eqx.nn.StateIndex):
        return False
    # Activation functions, numbers and modules without arrays do not count.
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
