"""How earlier versions stored the moments of today's codecs."""

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
