"""A layer that computes in float32 within a bfloat16 or float16 model."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike
from jaxtyping import PyTree


class Float32Layer(eqx.nn.StatefulLayer):
    """A float32 layer within a bfloat16 or float16 model, made by
    [`flashquinox.cast`][].

    It casts bfloat16 and float16 inputs to float32, calls the layer, and casts its
    float32 results to `dtype`. An `equinox.nn.State` is passed on unchanged, so that
    running statistics stay float32. Attributes are those of the layer.
    """

    layer: Any
    dtype: DTypeLike = eqx.field(static=True)

    def __init__(self, layer: Any, dtype: DTypeLike):
        self.layer = layer
        self.dtype = dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _map_floats(_widen, (args, kwargs))
        narrow = lambda x: x.astype(self.dtype) if x.dtype == jnp.float32 else x
        return _map_floats(narrow, self.layer(*args, **kwargs))

    def is_stateful(self) -> bool:
        # So that `equinox.nn.Sequential` calls it as it would call the layer.
        layer = self.layer
        return isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful()

    def __getattr__(self, name: str) -> Any:
        # While this object is made, it has no `layer` yet.
        if name == "layer" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.layer, name)


def _widen(x: Any) -> Any:
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def _map_floats(function: Any, tree: PyTree) -> PyTree:
    is_state = lambda x: isinstance(x, eqx.nn.State)
    is_float = lambda x: (
        eqx.is_inexact_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
    )
    one = lambda x: function(x) if not is_state(x) and is_float(x) else x
    return jtu.tree_map(one, tree, is_leaf=is_state)
