import jax.numpy as jnp
from jaxtyping import Scalar, ScalarLike


def bias_correction(decay: ScalarLike, count: Scalar) -> Scalar:
    """`1 - decay^count`, without the cancellation for `decay` close to 1."""
    return -jnp.expm1(count * jnp.log1p(jnp.asarray(decay - 1, count.dtype)))
