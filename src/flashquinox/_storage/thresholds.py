"""Thresholds to round by, in place of one half: functions of the number of a step."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Scalar, ScalarLike, Shaped, UInt32


# Strides of multiples modulo 2048: a number, and bits that it may have or not. Of all
# eight numbers that differ in three bits, the multiples of the first ones are the most
# even, by a search: 447, 449, 575, 577, 1471, 1473, 1599 and 1601.
STRIDES_OF_MOMENTS = 447, 1154
# As independent of these as can be: the pairs of thresholds of turns that have a stride
# of each kind are a lattice whose points are at least 45 / 2048 apart. 49 / 2048 is the
# most that there is.
STRIDES_OF_WEIGHTS = 383, 1282


def even_thresholds(
    turn: UInt32[Array, ""],
    strides: tuple[int, int],
    seed: np.uint32,
    offset: UInt32[Array, ""],
) -> UInt32[Array, ""]:
    """That of a turn, in units of 2^-32.

    2048 turns have each of the thresholds that are 2^-11 apart once, in an order about
    as even as that of the multiples of an irrational number: what is between two codes
    is rounded up in just its share of them, give or take five. But multiples of any one
    number follow what returns after some number of turns: those of the golden ratio
    after 55, 89 or 144, those of the root of 2 after 70, 169 or 408. So the next 2048
    turns have another order, and begin elsewhere.
    """
    span = turn >> 11
    # Cubes are as independent of one another as random numbers.
    start = span * span * span * seed + offset
    least, bits = strides
    stride = least + ((start >> 12) & np.uint32(bits))
    return (turn * stride << 21) + start


def rounding_threshold(count: Scalar, leaf: ScalarLike) -> Shaped[Array, ""]:
    """Of step `count`, for the weights of the leaf with this index: an integer of 16
    bits. As of [`flashquinox.Dither`][], in a sequence of its own."""
    turn, leaf = count.astype(jnp.uint32), jnp.asarray(leaf, jnp.uint32)
    # Of the root of 2; of one of the plastic number's reciprocals.
    seed, offset = np.uint32(0x6A09E667), leaf * np.uint32(0xC13FA9A9)
    return even_thresholds(turn, STRIDES_OF_WEIGHTS, seed, offset) >> 16
