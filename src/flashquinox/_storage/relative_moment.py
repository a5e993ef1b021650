"""Moments in units of the root of another one, which is an average of squares."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def times_root(
    relative: Float[Array, "*shape"], base: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The moment, of what is stored of it."""
    return relative * jnp.sqrt(base)


def over_root(
    moment: Float[Array, "*shape"], base: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """What is stored of a moment."""
    return moment / jnp.maximum(jnp.sqrt(base), _SMALLEST_ROOT)


# That of the smallest normal number. A smaller average of squares is flushed to zero,
# where its moment need not be: of gradients below 1e-18.
_SMALLEST_ROOT = 2.0**-63
