"""The one computation of this library: decode, apply the rule, encode; for one tile.

A backend only says how tiles reach this function. It is pure and elementwise but for
the maximum over a group, closes over nothing that is traced, and reads every scalar
from its arguments.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Scalar, Shaped

from ._codec import AbstractMomentCodec, Dither
from ._rule import AbstractRule
from ._split import Correction, decode_weight, encode_correction, encode_weight


class StepStructure(eqx.Module):
    """What of a step is known when it is compiled. Hashable, free of arrays."""

    rule: AbstractRule = eqx.field(static=True)
    # One for each moment of the rule, in its order.
    codecs: tuple[AbstractMomentCodec, ...] = eqx.field(static=True)
    # Decoupled decay scales the weight; otherwise it is L2 regularization.
    decoupled: bool = eqx.field(static=True)
    # Give the difference that an Optax caller adds to the weight, not the new weight.
    as_update: bool = eqx.field(static=True)


class StepScalars(eqx.Module):
    """What of a step is the same for all elements of a leaf: computed once."""

    rule: dict[str, Scalar]
    # Of decoupled decay, the factor on the weight; of L2 regularization, the
    # coefficient. None for a leaf without decay.
    decay: Scalar | None
    dither: Dither
    # Whether to take this step at all. None if that was not asked.
    take: Bool[Array, ""] | None


class TileState(eqx.Module):
    """A tile of a weight, with what is stored about it."""

    weight: Float[Array, "*tile"]
    correction: Correction | None
    codes: dict[str, Shaped[Array, "*tile"]]
    scales: dict[str, Shaped[Array, "..."] | None]

    def map(
        self, of_elements: Callable[[Array], Array], of_scales: Callable[[Array], Array]
    ) -> "TileState":
        """Applies one function to every array with an entry per element of the weight,
        and another to every array with an entry per group.
        """
        weight, correction, codes = jtu.tree_map(
            of_elements, (self.weight, self.correction, self.codes)
        )
        return TileState(
            weight, correction, codes, jtu.tree_map(of_scales, self.scales)
        )


def update_tile(
    structure: StepStructure,
    scalars: StepScalars,
    axis: int,
    grad: Float[Array, "*tile"],
    old: TileState,
) -> TileState:
    """One step of one tile, whose groups run along `axis`.

    **Returns:**

    The new state of the tile. With `structure.as_update`, `weight` is not the new
    weight but the update: what to add to the old one, in its dtype; the correction then
    belongs to the *sum*, as the caller will round it.
    """
    rule = structure.rule
    codecs = dict(zip(rule.moments, structure.codecs, strict=True))
    master = decode_weight(old.weight, old.correction)
    dtype = master.dtype
    moments = {
        name: codec.decode(old.codes[name], old.scales[name], dtype)
        for name, codec in codecs.items()
    }

    wide_grad = grad.astype(dtype)
    shrunk = master
    if scalars.decay is not None:
        if structure.decoupled:
            shrunk = scalars.decay * master
        else:
            wide_grad = wide_grad + scalars.decay * master
    update, moments = rule.update(wide_grad, master, moments, scalars.rule)
    new_master = shrunk + update
    # Arithmetic flushes subnormals to zero and loses the sign of -0. A weight that did
    # not move keeps its bits.
    new_master = jnp.where(new_master == master, master, new_master)

    correction_dtype = None if old.correction is None else old.correction.dtype
    weight, correction = encode_weight(new_master, old.weight.dtype, correction_dtype)
    if structure.as_update:
        update, held = _difference(new_master, weight, old.weight)
        weight = update
        correction = encode_correction(new_master, held, correction_dtype)

    codes, scales = {}, {}
    for name, codec in codecs.items():
        codes[name], scales[name] = codec.encode(moments[name], axis, scalars.dither)
    new = TileState(weight, correction, codes, scales)
    if scalars.take is None:
        return new
    unchanged = old
    if structure.as_update:
        unchanged = eqx.tree_at(lambda tile: tile.weight, old, no_update(old.weight))
    take = scalars.take
    return jtu.tree_map(lambda x, y: jnp.where(take, x, y), new, unchanged)


def _difference(
    master: Float[Array, "*tile"],
    new: Float[Array, "*tile"],
    old: Float[Array, "*tile"],
) -> tuple[Float[Array, "*tile"], Float[Array, "*tile"]]:
    """What to add to the old weight to have the new one, in its dtype, and the sum as
    the caller will round it. Where no number of that dtype leads to the new weight, the
    one that leads nearest to the master weight.
    """

    def add(update: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        return (wide_old + update.astype(wide_old.dtype)).astype(old.dtype)

    wide_old, wide_new = old.astype(master.dtype), new.astype(master.dtype)
    update = (wide_new - wide_old).astype(old.dtype)
    nearest = (master - wide_old).astype(old.dtype)
    update = jnp.where(add(update) == new, update, nearest)
    # Also where both are infinite, and their difference is not a number.
    update = jnp.where(wide_new == wide_old, no_update(old), update)
    return update, add(update)


def no_update(weight: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What to add to a weight to leave it as it is. Negative zero, as -0 + 0 = +0."""
    return jnp.full_like(weight, -0.0)
