"""What narrow weights are rounded by, in place of one half."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Scalar, ScalarLike, Shaped


def rounding_threshold(count: Scalar, leaf: ScalarLike) -> Shaped[Array, ""]:
    """Of step `count`, for the weights of the leaf with this index: an integer of 16
    bits. As of [`flashquinox.Dither`][], in a sequence of its own.

    256 turns have each of the thresholds that are 2^-8 apart once, in an order as even
    as that of the multiples of an irrational number: so equal steps arrive in full, to
    three units at any time. But multiples of any one number follow gradients that
    return after some number of turns, those of the root of 2 after 70, 169 or 408. So
    the next 256 turns have another order, and begin elsewhere.
    """
    turn, leaf = count.astype(jnp.uint32), jnp.asarray(leaf, jnp.uint32)
    span = turn >> 8
    # Spans are as independent of one another as random numbers: see the cubes of
    # `Dither.at`.
    start = span * span * span * np.uint32(0x6A09E667) + leaf * np.uint32(0xC13FA9A9)
    # 109, 111, 113, 115, 141, 143, 145 or 147. Of all odd numbers, their multiples
    # modulo 256 are the most even: in each part of the 256, every interval has as many
    # as it should, give or take three.
    stride = 109 + ((start >> 12) & np.uint32(38))
    return ((turn * stride << 24) + start) >> 16
