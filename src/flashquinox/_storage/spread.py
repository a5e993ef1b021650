"""Lower bits for weights that have none."""

from functools import partial

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, ScalarLike, Shaped, UInt16, UInt32

from .._common.digest import mix
from .split import Correction, correction_bits


@partial(jax.jit, static_argnames="correction_dtype")
def spread_correction(
    weight: Float[Array, "*shape"], correction_dtype: DTypeLike, leaf: ScalarLike
) -> Correction:
    r"""Corrections of bfloat16 or float16 weights, spread evenly over the numbers that
    round to each weight.

    A hash of the position of an element and of the number of its leaf draws the
    correction $\ell$ from all integers with $|\ell| < 2^{p-1}$, for a correction of $p$
    bits. Neither the backend nor the sharding changes it. Its mean is 0. Weights that
    are 0, infinite or NaN get $\ell = 0$.

    The numbers below a power of two are twice as dense as those above it. There, the
    positive $\ell$ are halved, so that the mean of the master weight is the weight.

    A hash, and not a Weyl sequence: that of a matrix would be a sum of few waves, of
    rank 1 each, and add up in products with the matrix.
    """
    p = correction_bits(weight.dtype, correction_dtype)
    values = np.uint32(2**p - 1)
    draw = ((_hashed_positions(weight.shape, leaf) >> 16) * values) >> 16
    low = draw.astype(jnp.int32) - np.int32(2 ** (p - 1) - 1)
    low = jnp.where((low > 0) & _has_denser_below(weight), low >> 1, low)
    return jnp.where(_is_inside(weight), low, 0).astype(correction_dtype)


def _hashed_positions(
    shape: tuple[int, ...], leaf: ScalarLike
) -> UInt32[Array, "*shape"]:
    position = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        along = lax.broadcasted_iota(jnp.uint32, shape, axis)
        position = position * np.uint32(length) + along
    # Mixed before the leaf is added: two leaves would be shifted copies otherwise.
    return mix(mix(position) + mix(jnp.asarray(leaf, jnp.uint32) + np.uint32(1)))


def _has_denser_below(weight: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Whether a weight is a power of two with a binade of its own below it. Subnormal
    numbers are spaced like the smallest normal ones."""
    digits = jnp.finfo(weight.dtype).nmant
    magnitude = _magnitude(weight)
    is_power = magnitude & np.uint16(2**digits - 1) == 0
    return is_power & (magnitude >> digits > 1)


def _is_inside(weight: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Whether a weight is finite and not 0. On its bits, because comparisons may take
    subnormal numbers for 0."""
    magnitude = _magnitude(weight)
    infinity = np.uint16((2**15 - 1) & -(2 ** jnp.finfo(weight.dtype).nmant))
    return (magnitude != 0) & (magnitude < infinity)


def _magnitude(weight: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    return lax.bitcast_convert_type(weight, jnp.uint16) & np.uint16(0x7FFF)
