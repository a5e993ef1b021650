"""How earlier versions stored moments."""

import dataclasses

from .._storage.codec import AbstractMomentCodec
from .._storage.linear import LinearCodec
from .._storage.quant_moment import QuantMoment
from .._storage.softsign import SoftsignCodec


def earlier_codec(moment: QuantMoment) -> AbstractMomentCodec:
    """The codec of version 0.2 and before for the moment of the same rule and the same
    `Storage(moments=...)`. No moment was relative to another then."""
    codec = moment.codec
    if isinstance(codec, SoftsignCodec):
        return dataclasses.replace(codec, dithered=False)
    return SoftsignCodec(dithered=False) if isinstance(codec, LinearCodec) else codec


def earlier_axes(axis: int | None, codes: int, scales: int) -> tuple[int, ...]:
    """The axes of groups, of which version 0.2 and before had one; or `None` for a leaf
    that was flattened. `codes` and `scales` are the numbers of axes of these: in an
    ensemble, both have those of the members."""
    if axis is not None:
        return (axis,)
    return tuple(range(scales - 1 - codes, 0))
