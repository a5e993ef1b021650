import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike


def trust_ratio(
    weight: Float[Array, "*shape"],
    update: Float[Array, "*shape"],
    coefficient: ScalarLike = 1.0,
    eps: ScalarLike = 0.0,
) -> Scalar:
    r"""$\eta \|w\| / (\|u\| + \epsilon)$; 1 where one of the norms is 0."""
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
    of_weight, of_update = norm(weight), norm(update)
    is_zero = (of_weight == 0) | (of_update == 0)
    return jnp.where(
        is_zero, 1.0, coefficient * of_weight / jnp.where(is_zero, 1.0, of_update + eps)
    )
