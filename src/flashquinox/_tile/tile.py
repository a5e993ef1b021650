"""The one computation of this library: decode, apply the rule, encode; for one tile.

A backend only says how tiles reach this function. It is pure and elementwise but for
the maximum over a group, closes over nothing that is traced, and reads every scalar
from its arguments.
"""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Scalar, Shaped

from .._common.dtypes import compute_dtype, numbers_of
from .._rules.chained import regularized_update
from .._storage import relative_moment
from .._storage.codec import Boundary, no_boundary
from .._storage.split import (
    Correction,
    decode_weight,
    encode_correction,
    encode_weight,
)
from .clipping import scaled
from .step import dtype_of, StepScalars, StepStructure, TileState


def update_tile(
    structure: StepStructure,
    scalars: StepScalars,
    axis: int,
    grad: Shaped[Array, "*tile"],
    old: TileState,
    keep_unmoved: bool = True,
    boundary: Boundary = no_boundary,
) -> TileState:
    """One step of one tile, whose groups run along `axis`. `keep_unmoved` is as in
    [`advance`][]. `boundary` is called between passes over the tile, for a compiler
    that would otherwise compute things several times.

    **Returns:**

    The new state of the tile. With `structure.as_update`, `weight` is not the new
    weight but the update, as from [`advance`][].
    """
    codecs, new_codecs = structure.codecs_before_and_after(scalars)
    dtype = dtype_of(old)
    factors = structure.factors(scalars)
    moments = {
        name: codec.decode(
            old.codes[name],
            old.scales[name],
            axis,
            dtype,
            factors[name][0],
            # Others are used once, in `with_roots`.
            no_boundary if name in structure.base_of else boundary,
        )
        for name, codec in codecs.items()
    }
    threshold = scalars.weight_threshold if structure.dither_weights else None
    threshold, dithers = boundary((threshold, scalars.dithers(structure)))
    weight, correction, moments = advance(
        structure,
        scalars,
        threshold,
        grad,
        old.weight,
        old.correction,
        moments,
        keep_unmoved,
        boundary,
    )
    codes, scales = {}, {}
    for name, codec in new_codecs.items():
        codes[name], scales[name] = codec.encode(
            moments[name], axis, dithers[name], factors[name][1], boundary
        )
    new = TileState(weight, correction, codes, scales)
    if scalars.take is None:
        return new
    unchanged = old
    if structure.as_update:
        unchanged = eqx.tree_at(lambda tile: tile.weight, old, no_update(old.weight))
    if structure.as_direction:
        unchanged = eqx.tree_at(lambda tile: tile.weight, old, weight)
    take = scalars.take
    return jtu.tree_map(lambda x, y: jnp.where(take, x, y), new, unchanged)


def advance(
    structure: StepStructure,
    scalars: StepScalars,
    threshold: Scalar | None,
    grad: Shaped[Array, "*tile"],
    weight: Float[Array, "*tile"] | None,
    correction: Correction | None,
    moments: dict[str, Float[Array, "*tile"]],
    keep_unmoved: bool = True,
    boundary: Boundary = no_boundary,
) -> tuple[
    Float[Array, "*tile"] | None, Correction | None, dict[str, Float[Array, "*tile"]]
]:
    """The elementwise part of a step: everything but the storage of moments, which come
    and go as they are stored, some relative to others. With `keep_unmoved`, a weight
    that did not move keeps its bits, even if it is subnormal or -0. `threshold` is what
    narrow weights are rounded by, or `None`.

    **Returns:**

    A 3-tuple of the new weight, its correction, and the new moments. With
    `structure.as_update`, the first is not the new weight but the update: what to add
    to the old one, in its dtype; the correction then belongs to the *sum*, as the
    caller will round it. With `structure.as_direction`, it is that of the rule. A step
    of moments alone, without a weight, returns none.
    """
    if weight is None:
        return None, None, moved_moments(structure, scalars, grad, moments)
    if structure.as_direction:
        master = grad.astype(compute_dtype(weight.dtype))
    else:
        master = decode_weight(weight, correction)
    if structure.base_of:
        moments = boundary(with_roots(structure, moments))
    new_master, moments = move(structure, scalars, grad, master, moments)
    moments = without_roots(structure, moments, boundary)
    if structure.as_direction:
        return new_master.astype(weight.dtype), None, moments
    if keep_unmoved:
        # Arithmetic flushes subnormals to zero and loses the sign of -0.
        new_master = jnp.where(new_master == master, master, new_master)
    if scalars.take is not None:
        # Gradients are ordinary numbers: what overflows is this weight alone.
        largest = float(jnp.finfo(weight.dtype).max)
        new_master = jnp.where(jnp.abs(new_master) <= largest, new_master, master)
    if correction is not None:
        # The weight and its correction belong together, so they come of one number.
        new_master = boundary(new_master)

    correction_dtype = None if correction is None else correction.dtype
    new_weight, new_correction = encode_weight(
        new_master, weight.dtype, correction_dtype, threshold
    )
    if structure.as_update:
        update, held = _difference(new_master, new_weight, weight)
        new_correction = encode_correction(
            new_master, held, correction_dtype, threshold
        )
        return update, new_correction, moments
    return new_weight, new_correction, moments


def moved_moments(
    structure: StepStructure,
    scalars: StepScalars,
    grad: Shaped[Array, "*tile"],
    moments: dict[str, Float[Array, "*tile"]],
) -> dict[str, Float[Array, "*tile"]]:
    """The new moments of a step without a weight, as by [`move`][]."""
    (dtype,) = {x.dtype for x in moments.values()}
    _, new = structure.rule.update(grad.astype(dtype), grad, moments, scalars.rule)
    return new


def with_roots(
    structure: StepStructure, moments: dict[str, Float[Array, "*tile"]]
) -> dict[str, Float[Array, "*tile"]]:
    """The moments as the rule takes them, from what was stored."""
    relative = {}
    for name, base in structure.base_of.items():
        square = moments[base]
        if structure.codec_of[base].dtypes is None:
            # Codecs store no infinity, whose product with zero is NaN.
            square = jnp.minimum(square, jnp.finfo(square.dtype).max)
        relative[name] = relative_moment.times_root(moments[name], square)
    return moments | relative


def without_roots(
    structure: StepStructure,
    moments: dict[str, Float[Array, "*tile"]],
    boundary: Boundary = no_boundary,
) -> dict[str, Float[Array, "*tile"]]:
    """The moments as they are stored, from what the rule returned. A moment is relative
    to the root of the other *before* that is rounded: so the next update is right,
    whatever the other is rounded to."""
    # Each reader takes the root of it: else a compiler stores that for both.
    squares = {base: moments[base] for base in structure.base_of.values()}
    moments = moments | boundary(squares)
    relative = {
        name: relative_moment.over_root(moments[name], moments[base])
        for name, base in structure.base_of.items()
    }
    return moments | relative


def move(
    structure: StepStructure,
    scalars: StepScalars,
    grad: Shaped[Array, "*tile"],
    master: Float[Array, "*tile"],
    moments: dict[str, Float[Array, "*tile"]],
) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
    """The arithmetic of a step, without any rounding: the new master weight, or with
    `structure.as_direction` the update alone, and the new moments."""
    grad = numbers_of(grad)
    wide_grad = grad if scalars.clip is None else scaled(grad, scalars.clip)
    wide_grad = wide_grad.astype(master.dtype)
    decay = None if scalars.decay is None else scalars.decay * master
    rule, arguments = structure.rule, (wide_grad, master, moments, scalars.rule)
    if decay is not None and not structure.decoupled:
        update, moments = regularized_update(rule, *arguments, decay)
    else:
        update, moments = rule.update(*arguments)
    if decay is not None and structure.decoupled:
        # A factor of 1 - x on the weight would be rounded to multiples of 2^-24: for x
        # of 1e-6, in each step to the same side by 1.3 % of x.
        update = update - decay
    return (update if structure.as_direction else master + update), moments


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
    # Some devices flush a subnormal weight to zero where nothing is added to it.
    return update, jnp.where(update == 0, old, add(update))


def no_update(weight: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What to add to a weight to leave it as it is. Negative zero, as -0 + 0 = +0."""
    return jnp.full_like(weight, -0.0)
