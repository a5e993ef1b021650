"""Reductions over arrays without arrays of what is reduced."""

from collections.abc import Callable

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from .. import _compat


# Of a piece. With twice as many, the norm of a large array takes a sixth to a third
# less time (two cores of a Xeon), and memory that small models do not have.
_ELEMENTS = 2**13


def in_pieces(
    function: Callable[[Shaped[Array, "..."]], Shaped[Array, "..."]],
    combine: Callable[[Shaped[Array, "pieces ..."]], Shaped[Array, "..."]],
    x: Shaped[Array, "..."],
) -> Shaped[Array, "..."]:
    """What a function makes of an array. In programs for CPUs, of its pieces, one after
    the other; `combine` makes the result of theirs. Zeros must not count for it. XLA
    for CPUs has all that is compared or chosen in memory before it reduces that: for a
    norm, three arrays of float32."""
    if x.size <= _ELEMENTS or _compat.traced_device().platform != "cpu":
        return function(x)

    def of_all(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        flat = x.reshape(-1)

        def of_piece(i: Int32[Array, ""]) -> Shaped[Array, "..."]:
            # The last one begins earlier, to be whole; what is before it is done.
            start = jnp.minimum(i * _ELEMENTS, x.size - _ELEMENTS)
            piece = lax.dynamic_slice_in_dim(flat, start, _ELEMENTS)
            is_new = start + jnp.arange(_ELEMENTS) >= i * _ELEMENTS
            return function(jnp.where(is_new, piece, 0))

        return combine(lax.map(of_piece, jnp.arange(-(-x.size // _ELEMENTS))))

    # The program may be for another platform than that of the default device.
    return lax.platform_dependent(x, cpu=of_all, default=function)
