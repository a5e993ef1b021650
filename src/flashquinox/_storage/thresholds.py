"""Thresholds to round by, in place of one half: functions of the number of a step."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Scalar, ScalarLike, Shaped, UInt32


def even_thresholds(
    turn: UInt32[Array, ""], seed: np.uint32, offset: UInt32[Array, ""]
) -> UInt32[Array, ""]:
    """That of a turn, in units of 2^-32.

    2048 turns have each of the thresholds that are 2^-11 apart once, in an order about
    as even as that of the multiples of an irrational number: what is between two codes
    is rounded up in just its share of them, give or take four. But multiples of any one
    number follow what returns after some number of turns: those of the golden ratio
    after 55, 89 or 144, those of the root of 2 after 70, 169 or 408. So the next 2048
    turns have another order, and begin elsewhere.
    """
    span = turn >> 11
    # Cubes are as independent of one another as random numbers.
    start = span * span * span * seed + offset
    # 447, 449, 575, 577, 1471, 1473, 1599 or 1601. Of all eight numbers that differ in
    # three bits, those whose multiples modulo 2048 are the most even, by a search.
    stride = 447 + ((start >> 12) & np.uint32(1154))
    return (turn * stride << 21) + start


def rounding_threshold(count: Scalar, leaf: ScalarLike) -> Shaped[Array, ""]:
    """Of step `count`, for the weights of the leaf with this index: an integer of 16
    bits. As of [`flashquinox.Dither`][], in a sequence of its own."""
    turn, leaf = count.astype(jnp.uint32), jnp.asarray(leaf, jnp.uint32)
    # Of the root of 2; of one of the plastic number's reciprocals.
    offset = leaf * np.uint32(0xC13FA9A9)
    return even_thresholds(turn, np.uint32(0x6A09E667), offset) >> 16
