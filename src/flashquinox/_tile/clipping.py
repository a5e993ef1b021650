"""Clipping by a norm, without gradients that are scaled in memory: as factors that are
applied to each gradient where it is read.

The norm is taken in one pass, whatever the size of the numbers. Their squares are
summed apart for large, ordinary and small numbers, each in a unit in which no square
leaves the range of the dtype. These sums are all that devices exchange.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar, ScalarLike

from .._common.pieces import in_pieces


# Two factors, to be applied one after the other: their product alone may be too small
# for a number.
Factors = tuple[Scalar, Scalar]


class Norm(NamedTuple):
    # Whether all gradients are finite.
    is_finite: Bool[Array, ""]
    # No gradient is larger once it is scaled.
    largest: Scalar


class Clipping(NamedTuple):
    factors: Factors
    # What the norm tells. `None` if it was not taken.
    norm: Norm | None

    def factors_for(self, dtype: Any) -> Factors:
        """Those of gradients that are computed with in this dtype."""
        first, second = self.factors
        return first.astype(dtype), second.astype(dtype)


def division(divisor: ScalarLike, dtype: Any) -> Clipping:
    """What divides gradients by a number, whatever their norm is."""
    one = jnp.ones((), dtype)
    return Clipping((one / jnp.asarray(divisor, dtype), one), None)


def scaled(grad: Float[Array, "*shape"], factors: Factors) -> Float[Array, "*shape"]:
    """A gradient times both factors, in their dtype."""
    return grad.astype(factors[0].dtype) * factors[0] * factors[1]


def sums_of_squares(x: Float[Array, "*shape"], dtype: Any) -> Float[Array, "3"]:
    """The sums of the squares of the small, the ordinary and the large numbers in an
    array, each in its own unit."""
    return in_pieces(partial(_sums, dtype=dtype), partial(jnp.sum, axis=0), x)


def _sums(x: Float[Array, "*shape"], dtype: Any) -> Float[Array, "3"]:
    x = x.astype(dtype)
    size, unit = jnp.abs(x), _unit(dtype)
    border = math.sqrt(unit)
    # A NaN is ordinary.
    small, large = size < 1 / border, size > border
    squares = jnp.square(x * jnp.where(small, unit, jnp.where(large, 1 / unit, 1.0)))
    total = lambda chosen: jnp.sum(squares, where=chosen)
    return jnp.stack([total(small), total(~(small | large)), total(large)])


def _unit(dtype: Any) -> float:
    """That of large numbers; that of small ones is its inverse. Large numbers are
    above its root. So the squares of all are far from both ends of the dtype, and
    sums of 2^38 of them are finite."""
    return 2.0 ** (90 * (int(jnp.finfo(dtype).maxexp) // 128))


def clipping(
    sums: Float[Array, "3"], max_norm: ScalarLike, divisor: ScalarLike | None = None
) -> Clipping:
    """What takes gradients, divided by a number, to at most this norm. `sums` are those
    of `sums_of_squares`, over all of them."""
    dtype = sums.dtype
    unit, bound = _unit(dtype), jnp.asarray(max_norm, dtype)
    if divisor is not None:
        bound = bound * jnp.asarray(divisor, dtype)
    small, ordinary, large = sums
    # A compiler may divide by the square of the unit, which is infinite.
    two_units_down = lambda x: lax.optimization_barrier(x / unit) / unit
    # In the unit of the largest numbers that there are. What is two units away is lost
    # in the sum.
    is_large = large > 0
    is_small = ~is_large & (ordinary == 0)
    total = jnp.where(
        is_large,
        large + two_units_down(ordinary),
        jnp.where(is_small, small, ordinary + two_units_down(small)),
    )
    its_unit = jnp.where(is_large, unit, jnp.where(is_small, 1 / unit, 1.0))
    its_unit = its_unit.astype(dtype)
    # A root of zero has no derivative.
    is_zero = total == 0
    root = jnp.sqrt(jnp.where(is_zero, 1.0, total))
    norm = jnp.where(is_zero, 0.0, root)
    product = bound / root / its_unit
    fits, is_normal = norm * its_unit <= bound, product >= jnp.finfo(dtype).tiny
    # Half of the root in each, or one of them would be too small for a number, too.
    half = 1 / jnp.sqrt(root)
    factors = (
        jnp.where(fits, 1.0, jnp.where(is_normal, product, half / its_unit)),
        jnp.where(fits | is_normal, 1.0, half * bound),
    )
    largest = jnp.minimum(norm * its_unit, bound)
    if divisor is not None:
        shrink = 1 / jnp.asarray(divisor, dtype)
        factors, largest = (factors[0] * shrink, factors[1]), largest * shrink
    is_finite = lax.is_finite(norm) & ~jnp.isnan(bound)
    return Clipping(factors, Norm(is_finite, largest))
