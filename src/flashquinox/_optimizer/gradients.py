"""What a step asks of all its gradients together: their norm, and whether they are
finite."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, ScalarLike

from .._common import meshes
from .._common.dtypes import compute_dtype, largest_gradient, numbers_of
from .._model.trees import Leaf
from .._sharding import reductions
from .._tile.clipping import Clipping, division
from .._tile.stored_gradient import Gradient, StoredGradient
from .settings import Rates


def as_typed(
    grads: Sequence[Gradient], shardings: Sequence[NamedSharding | None]
) -> list[Gradient]:
    """Gradients with the shardings of their leaves, where these are part of types. Sums
    that they are stored in have them."""
    return [
        grad if isinstance(grad, StoredGradient) else meshes.as_typed(grad, sharding)
        for grad, sharding in zip(grads, shardings, strict=True)
    ]


def _numbers_of(grad: Gradient) -> Gradient:
    return grad if isinstance(grad, StoredGradient) else numbers_of(grad)


def clipping(
    grads: Sequence[Gradient],
    shardings: list[NamedSharding | None],
    max_norm: ScalarLike | None,
    divisor: ScalarLike | None = None,
) -> Clipping | None:
    """The scaling of these gradients, divided by a number, together to at most this
    norm."""
    if not grads or (max_norm is None and divisor is None):
        return None
    grads = [*map(_numbers_of, grads)]
    if max_norm is None:
        dtypes = [compute_dtype(grad.dtype) for grad in grads]
        return division(divisor, jnp.result_type(*dtypes))  # pyright: ignore
    arrived = as_typed(grads, shardings)
    return reductions.clip(arrived, shardings, max_norm, divisor)


def all_finite(
    leaves: Sequence[Leaf],
    grads: Sequence[Gradient],
    shardings: list[NamedSharding | None],
    clip: Clipping | None,
    rates: Sequence[Rates],
) -> Bool[Array, ""]:
    """Whether all of these gradients are finite, and so are their squares, which their
    norm tells if it is known; and the learning rates and the weight decays. `leaves`
    are those of the gradients.

    Nothing here depends on weights and moments: a step that is not taken leaves these
    as they are, so that no later one would be taken either.
    """
    limits = [largest_gradient(leaf.value.dtype) for leaf in leaves]
    if clip is not None and clip.norm is not None:
        finite = clip.norm.is_finite & (clip.norm.largest <= min(limits))
    else:
        arrived = as_typed([*map(_numbers_of, grads)], shardings)
        finite = reductions.all_within(arrived, limits, shardings)
    for rate in itertools.chain(*rates):
        if isinstance(rate, jax.Array):
            finite = finite & jnp.isfinite(rate)
    return finite
