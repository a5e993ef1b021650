"""Checks of losses and models for a backward pass that goes layer by layer."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding

from .._common import meshes
from .._common.text import shown
from .._model.trained import is_float_array
from .._model.trees import Leaf, path_name
from .._optimizer.accumulate import AccumulatingOptimizer


def check_layered_loss(call: str, loss: Any, kind: type) -> None:
    if not isinstance(loss, kind):
        raise TypeError(
            f"`{call}`: the loss is no `flashquinox.{kind.__name__}` but "
            f"{shown(loss)}. Only of one in parts can the backward pass be taken layer "
            "by layer."
        )


def check_block_keeps_shapes(call: str, x: Any, new: Any) -> None:
    structures = [jtu.tree_structure(tree) for tree in (x, new)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"`{call}`: `block` got {structures[0]} and returned {structures[1]}. "
            "Return a tree of the structure of `x`."
        )
    for (path, old), y in zip(
        jtu.tree_leaves_with_path(x), jtu.tree_leaves(new), strict=True
    ):
        types = [jax.typeof(value) for value in (old, y)]
        if len({(one.shape, one.dtype) for one in types}) > 1:
            raise ValueError(
                f"`{call}`: `block` got {types[0].str_short()} at `{path_name(path)}` "
                f"of `x`, and returned {types[1].str_short()}. Return the shapes and "
                "dtypes that it gets, as the next layer gets what it returns; cast at "
                "the end of `prologue` and of `block`."
            )


def check_random_key(call: str, key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if (is_typed and key.ndim == 0) or dtype == jnp.uint32:
        return
    raise TypeError(
        f"`{call}(key=...)` takes a random key, as `jax.random.key(0)` makes one; got "
        f"{shown(key)}."
    )


def check_loss(call: str, loss: Any) -> None:
    if not is_float_array(loss) or loss.ndim != 0:
        found = jax.typeof(loss).str_short() if eqx.is_array(loss) else repr(loss)
        raise TypeError(
            f"`{call}`: `epilogue` returned {found}. Return the loss: a floating-point "
            "scalar."
        )


def check_layers_are_whole(
    call: str, leaf: Leaf, sharding: NamedSharding | None
) -> None:
    if sharding is None or meshes.divisions(sharding)[0] == 1:
        return
    raise ValueError(
        f"`{call}`: the weight at `{leaf.name}`, of shape {leaf.value.shape}, is "
        f"sharded by {sharding.spec}: its layers lie on different devices, but all "
        "devices work on one layer at a time. Shard it along another axis."
    )


def check_sums_no_gradients(call: str, name: str, optim: Any) -> None:
    """An optimizer that accumulates gradients has nothing to release."""
    if isinstance(optim, AccumulatingOptimizer):
        raise TypeError(
            f"`{call}`: `{name}` is {shown(optim)}, which needs the gradients of all "
            "layers at once: a layer's sum is complete only in the last of `every` "
            "calls, and the sums of all layers are kept until then. Take ordinary "
            "steps with `optim.step`; or pass the optimizer inside of it, "
            "`optim.inner`, and a batch of all of these examples: gradient release "
            "keeps the input of each layer, and no gradients."
        )
