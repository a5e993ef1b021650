"""Gradients that are in host memory, as sums of gradients are stored."""

import math
from typing import Any, TypeAlias

import equinox as eqx
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._common import memory
from .._storage.codec import AbstractMomentCodec
from .._storage.layout import Layout
from .._storage.quant_moment import QuantMoment, StoredMoment
from .._storage.split import Correction, decode_weight
from .._storage.whole_arrays import decode_array
from .step import TileState


class StoredGradient(eqx.Module):
    """A gradient as the sum that it is stored in, of which at least a part is in host
    memory. A step brings it to the device when its leaf is taken, and may leave zeros
    in its place.

    - `arrays`: what is read of the sum and, unless `is_kept`, set to zero: a weight
        with its correction, or codes and scales of one moment.
    - `codec`, `layout`: of codes.
    - `shape`, `dtype`: those of the gradient.
    - `is_kept`: whether the sum stays as it is.
    """

    arrays: TileState
    codec: AbstractMomentCodec | None = eqx.field(static=True)
    layout: Layout | None = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)
    is_kept: bool = eqx.field(static=True)

    @staticmethod
    def of(
        total: StoredMoment, correction: Correction | None, dtype: Any, is_kept: bool
    ) -> "StoredGradient":
        """The gradient of a sum of gradients of this dtype. Of bfloat16 ones, it is
        bfloat16; of sums without corrections, it is in their dtype."""
        dtype, codec, layout = jnp.dtype(dtype), None, None
        if isinstance(total, QuantMoment):
            codec, layout, shape = total.codec, total.layout, total.codes.shape
            arrays = TileState(None, None, {"": total.codes}, {"": total.scales})
            is_exact = dtype == jnp.bfloat16
        else:
            shape, is_exact = total.shape, total.dtype == dtype
            # Of bfloat16 gradients, the correction is not looked at.
            correction = None if is_kept and is_exact else correction
            arrays = TileState(total, correction, {}, {})
        wide = jnp.float64 if getattr(total, "dtype", None) == jnp.float64 else None
        found = dtype if is_exact else jnp.dtype(wide or jnp.float32)
        return StoredGradient(arrays, codec, layout, shape, found, is_kept)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def decode(self, here: TileState) -> Float[Array, "..."]:
        """The gradient, of the arrays on the device, or a slice of it, of slices."""
        if self.codec is not None:
            assert self.layout is not None
            codes, scales = here.codes[""], here.scales[""]
            assert scales is not None
            layout = self.layout.of_shape(codes.shape)
            decoded = decode_array(self.codec, layout, codes, scales, jnp.float32)
            return decoded.astype(self.dtype)
        if here.weight.dtype == self.dtype:
            return here.weight
        return decode_weight(here.weight, here.correction)

    def sum_of(
        self, total: StoredMoment, arrays: TileState
    ) -> tuple[StoredMoment, Correction | None]:
        """A sum with these arrays, of which `total` is what it was before."""
        if not isinstance(total, QuantMoment):
            return arrays.weight, arrays.correction
        codes, scales = arrays.codes[""], arrays.scales[""]
        assert scales is not None
        return total.with_arrays(codes, scales, total.parameter), None

    def read(self, after: PyTree[Array]) -> Float[Array, "..."]:
        """The gradient on the device, once other arrays are computed."""
        arrays = self.arrays
        if any([isinstance(x, jax.core.Tracer) for x in jtu.tree_leaves(arrays)]):
            arrays, _ = lax.optimization_barrier((arrays, after))
        return self.decode(memory.to_device(arrays))


Gradient: TypeAlias = Array | StoredGradient


def on_device(grad: Gradient, after: PyTree[Array]) -> Array:
    """A gradient on the device: one that is stored, once other arrays are computed."""
    return grad.read(after) if isinstance(grad, StoredGradient) else grad
