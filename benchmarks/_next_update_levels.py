"""Levels of the least error for the numbers of one tensor, to round them to."""

from collections.abc import Callable
from typing import TypeAlias

import jax.lax as lax
import jax.numpy as jnp
from _next_update_roundings import Rounding
from jaxtyping import Array, Float


# As many as the linear codec has.
LEVELS = 255

# The middle of a group's range, and half of its length.
Range: TypeAlias = Callable[[Float[Array, "groups 32"]], tuple[Array, Array]]


def to_largest(moment):
    largest = jnp.max(jnp.abs(moment), axis=-1, keepdims=True)
    return jnp.zeros_like(largest), jnp.maximum(largest, 2.0**-60)


def least_to_greatest(moment):
    most = jnp.max(moment, axis=-1, keepdims=True)
    least = jnp.min(moment, axis=-1, keepdims=True)
    return (most + least) / 2, jnp.maximum((most - least) / 2, 2.0**-60)


RANGES: dict[str, Range] = {
    "largest": to_largest,
    "least to greatest": least_to_greatest,
}


def fitted_levels(counts: Float[Array, " bins"]) -> Float[Array, " 255"]:
    """The levels in [-1, 1] of the least mean square error for elements of these counts
    (in bins of one size): as dense as the cube root of their density (Panter and Dite,
    1951), and moved to where each is the mean of what is rounded to it (Lloyd and
    Max)."""
    edges = jnp.linspace(-1.0, 1.0, counts.size + 1)
    counts = counts + 1e-3 * jnp.mean(counts)
    places = (jnp.arange(LEVELS) + 0.5) / LEVELS

    def below(values):
        return jnp.concatenate([jnp.zeros(1), jnp.cumsum(values)])

    density = below(jnp.cbrt(counts))
    levels = jnp.interp(places, density / density[-1], edges)
    number = below(counts / jnp.sum(counts))
    total = below(counts / jnp.sum(counts) * (edges[1:] + edges[:-1]) / 2)

    def improve(_, levels):
        ends = jnp.concatenate([edges[:1], (levels[1:] + levels[:-1]) / 2, edges[-1:]])
        amount, sum_ = (jnp.diff(jnp.interp(ends, edges, x)) for x in (number, total))
        return sum_ / amount

    return lax.fori_loop(0, 30, improve, levels)


def by_levels(levels: Float[Array, " 255"], range_: Range) -> Rounding:
    """To these levels in the range of each group, which is not rounded."""
    codes = jnp.arange(LEVELS, dtype=jnp.float32)

    def rounding(moment, before, dither):
        del before
        middle, half = range_(moment)
        code = jnp.interp((moment - middle) / half, levels, codes)
        code = jnp.clip(jnp.round(code + dither.code - 0.5), 0, LEVELS - 1)
        return levels[code.astype(jnp.int32)] * half + middle

    return rounding


def logarithm(second: Float[Array, "groups 32"]) -> Float[Array, "groups 32"]:
    """Of averages of squares, not less than 31 below the greatest of a group."""
    found = jnp.log2(jnp.maximum(second, 2.0**-126))
    return jnp.maximum(found, jnp.max(found, axis=-1, keepdims=True) - 31)


def of_logarithm(rounding: Rounding) -> Rounding:
    return lambda moment, before, dither: jnp.exp2(
        rounding(logarithm(moment), logarithm(before), dither)
    )
