"""Encodes a moment again: in groups along other axes or of another size, or by another
codec."""

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Shaped

from .codec import AbstractMomentCodec, Dither
from .layout import Layout
from .learned_codec import with_parameter
from .quant_moment import QuantMoment, StoredMoment
from .relative_moment import over_root
from .whole_arrays import encode_array


# The axes of groups, and their size.
Groups: TypeAlias = tuple[tuple[int, ...], int]


def regroup(
    codes: Shaped[Array | np.ndarray, "..."],
    scales: Shaped[Array | np.ndarray, "..."],
    groups: Groups,
    like: QuantMoment,
    parameter: Float32[Array | np.ndarray, "..."] | None = None,
    codec: AbstractMomentCodec | None = None,
    base: StoredMoment | None = None,
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    """Encodes a moment again, as another moment is stored. Codes and scales are rounded
    to nearest.

    **Arguments:**

    - `codes`, `scales`: the moment.
    - `groups`: the axes and the size of its groups.
    - `like`: the other moment: only its codec and groups are used.
    - `parameter`: the parameter of the codec, if that learns. It stays the same.
    - `codec`: that of the moment, if it is another one than that of `like`.
    - `base`: what the new moment is to be relative to, if the old one is not.

    **Returns:**

    The new codes and scales.
    """
    # In an ensemble made by `vmap`, parameters have additional axes for the members.
    members = 0 if parameter is None else len(parameter.shape)
    new_groups = (like.axes, like.group_size)
    codecs = (like.codec if codec is None else codec, like.codec)
    return _encode_again(
        codes, scales, parameter, base, codecs, (groups, new_groups), members
    )


@partial(jax.jit, static_argnums=(4, 5, 6))
def _encode_again(
    codes: Shaped[Array, "..."],
    scales: Shaped[Array, "..."],
    parameter: Float32[Array, "..."] | None,
    base: StoredMoment | None,
    codecs: tuple[AbstractMomentCodec, AbstractMomentCodec],
    groups: tuple[Groups, Groups],
    members: int,
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    def encode(codes, scales, parameter, base):
        old = QuantMoment(codes, scales, *groups[0], codecs[0], parameter)
        moment = old.decode_stored()
        if base is not None:
            root = base.decode_stored() if isinstance(base, QuantMoment) else base
            moment = over_root(moment, root)
        return encode_nearest(moment, codecs[1], groups[1], parameter)

    for _ in range(members):
        encode = jax.vmap(encode)
    return encode(codes, scales, parameter, base)


def encode_nearest(
    moment: Float[Array, "*shape"],
    codec: AbstractMomentCodec,
    groups: Groups,
    parameter: Float32[Array, ""] | None,
) -> tuple[Shaped[Array, "*shape"], Shaped[Array, "..."]]:
    """Codes and scales of a moment, in groups along these axes
    and of this size. Both are rounded
    to nearest."""
    thresholds_of_half = Dither(jnp.float32(0.5), jnp.uint32(1 << 15))
    layout = Layout(moment.shape, *groups)
    codec = with_parameter(codec, parameter)
    codes, scales = encode_array(codec, layout, moment, thresholds_of_half)
    assert scales is not None
    return codes, scales
