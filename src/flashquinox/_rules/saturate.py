"""Gradients whose squares would overflow."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


# With the largest average of squares that codecs store, 2^124, as its square.
LARGEST = 2.0**62


def saturate(
    x: Float[Array, "*shape"], largest: float = LARGEST
) -> Float[Array, "*shape"]:
    """Of finite numbers, those within ±`largest`, which is a power of two. Others stay:
    NaN and infinity must be seen in what follows from them."""
    bound = x.dtype.type(largest)
    return jnp.where(jnp.abs(x) < np.inf, jnp.clip(x, -bound, bound), x)
