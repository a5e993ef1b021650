"""An average of weights: how it is stored, and how it moves."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ScalarLike

from .._storage.split import decode_weight, encode_weight


def share_of_weights(decay: ScalarLike, count: Array, dtype: DTypeLike) -> Array:
    """The share of the weights in the average after so many steps and this one."""
    if isinstance(decay, jax.Array):
        wide = decay.astype(dtype)
        new, log = 1 - wide, jnp.log(wide)
    else:
        # In float64: a decay rate is close to 1.
        known = np.float64(decay)  # pyright: ignore[reportArgumentType]
        with np.errstate(divide="ignore"):
            new, log = (jnp.asarray(x, dtype) for x in (1 - known, np.log(known)))
    share = new / -jnp.expm1((count + 1).astype(dtype) * log)
    return jnp.where(count == 0, 1, share)


@jax.jit
def as_average(weight: Array, correction: Array | None = None) -> tuple[Any, Any]:
    """A master weight as an average."""
    master = decode_weight(weight, correction)
    if master.dtype == jnp.float64:
        return jnp.array(master, copy=True), None
    return encode_weight(master, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8))


@jax.jit
def moved_average(
    average: Array,
    average_correction: Array | None,
    weight: Array,
    correction: Array | None,
    share: Array,
    threshold: Array,
) -> tuple[Any, Any]:
    """A new average."""
    old = decode_weight(average, average_correction)
    master = decode_weight(weight, correction)
    # The first average is the weights themselves.
    first = share == 1
    new = jnp.where(first, master, old + share * (master - old))
    # Arithmetic flushes subnormals to zero and loses the sign of -0.
    new = jnp.where(new == old, old, new)
    if average_correction is None:
        return new, None
    dtypes = average.dtype, average_correction.dtype
    return encode_weight(new, *dtypes, threshold)


@partial(jax.jit, static_argnums=2)
def decoded(weight: Array, correction: Array | None, dtype: DTypeLike) -> Array:
    return decode_weight(weight, correction).astype(dtype)
