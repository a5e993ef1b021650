"""Encodes a moment again in other groups: along another axis, or of another size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Shaped

from .codec import AbstractMomentCodec, Dither
from .layout import Layout
from .learned_codec import with_parameter
from .quant_moment import QuantMoment


def regroup(
    codes: Shaped[Array | np.ndarray, "..."],
    scales: Shaped[Array | np.ndarray, "..."],
    groups: tuple[int | None, int],
    like: QuantMoment,
    parameter: Float32[Array | np.ndarray, "..."] | None = None,
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    """Encodes a moment again, in the groups of another moment of the same codec. Codes
    and scales are rounded to nearest.

    **Arguments:**

    - `codes`, `scales`: the moment.
    - `groups`: the axis and the size of its groups.
    - `like`: the other moment: only its codec and groups are used.
    - `parameter`: the parameter of the codec, if that learns. It stays the same.

    **Returns:**

    The new codes and scales.
    """
    # In an ensemble made by `vmap`, parameters and the scales of flattened leaves have
    # additional axes for the members. Otherwise such axes need no special treatment.
    members = 0
    if parameter is not None:
        members = len(parameter.shape)
    elif groups[0] is None:
        members = len(scales.shape) - 1
    elif like.axis is None:
        members = len(like.scales.shape) - 1
    new_groups = (like.axis, like.group_size)
    codec = like.codec
    return _encode_again(codes, scales, parameter, codec, groups, new_groups, members)


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _encode_again(
    codes: Shaped[Array, "..."],
    scales: Shaped[Array, "..."],
    parameter: Float32[Array, "..."] | None,
    codec: AbstractMomentCodec,
    groups: tuple[int | None, int],
    new_groups: tuple[int | None, int],
    members: int,
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    def encode(codes, scales, parameter):
        moment = QuantMoment(codes, scales, *groups, codec, parameter).decode()
        return encode_nearest(moment, codec, new_groups, parameter)

    for _ in range(members):
        encode = jax.vmap(encode)
    return encode(codes, scales, parameter)


def encode_nearest(
    moment: Float[Array, "*shape"],
    codec: AbstractMomentCodec,
    groups: tuple[int | None, int],
    parameter: Float32[Array, ""] | None,
) -> tuple[Shaped[Array, "*shape"], Shaped[Array, "..."]]:
    """Codes and scales of a moment, in groups of this axis and size. Both are rounded
    to nearest."""
    thresholds_of_half = Dither(jnp.float32(0.5), jnp.uint32(1 << 15))
    layout = Layout(moment.shape, *groups)
    codes, scales = with_parameter(codec, parameter).encode(
        layout.tile(moment), layout.tile_axis, thresholds_of_half
    )
    assert scales is not None
    return layout.untile(codes), scales
