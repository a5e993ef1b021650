"""A layer that keeps its precision within a model of another."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike
from jaxtyping import PyTree


class Widened(eqx.nn.StatefulLayer):
    """A layer in float32 within a model that computes in fewer bits: made by
    [`flashquinox.cast`][].

    Calls the layer with float32 in place of bfloat16 and float16 arrays, and gives its
    float32 results in `dtype`. An `equinox.nn.State` goes through unchanged: running
    statistics stay float32. Attributes are those of the layer.
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
        # To be called by `equinox.nn.Sequential` as the layer would be.
        layer = self.layer
        return isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful()

    def __getattr__(self, name: str) -> Any:
        # Not of fields: while one is made, it has none.
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
