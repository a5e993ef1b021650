"""Reading sums in the memory that they are in."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Scalar, Shaped

from .._common.dtypes import bits_of_bfloat16
from .._rules.rule import MomentKind
from .codec import AbstractMomentCodec, Dither, GroupConstants, Reduction
from .tapered import TaperedCodec


class TaperedReader(AbstractMomentCodec):
    """Decodes what a [`flashquinox.TaperedCodec`][] has encoded, and encodes it as
    bfloat16 numbers: their bits are the codes, rounded to nearest, and scales are 0."""

    @property
    def kinds(self) -> tuple[MomentKind, ...]:
        return ("signed",)

    @property
    def dtypes(self) -> tuple[DTypeLike, DTypeLike]:
        return _CODEC.dtypes

    def statistics(
        self, prepared: tuple[Float[Array, "*tile"], ...]
    ) -> tuple[tuple[Reduction, Float[Array, "*tile"]], ...]:
        # Scales have the shape of something.
        return ((jnp.max, prepared[0]),)

    def fit(
        self,
        statistics: tuple[Float[Array, "*groups"], ...],
        factor: Scalar | None,
        dither: Dither,
    ) -> tuple[Shaped[Array, "*groups"] | None, GroupConstants]:
        del dither
        scales = jnp.zeros(statistics[0].shape, jnp.int16)
        return scales, () if factor is None else (factor,)

    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        encode_constants: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        (moment,) = prepared
        for factor in encode_constants:
            moment = moment * factor
        return bits_of_bfloat16(moment)

    def decode_constants(
        self,
        scales: Shaped[Array, "*groups"] | None,
        factor: Scalar | None,
        dtype: DTypeLike,
    ) -> GroupConstants:
        return _CODEC.decode_constants(scales, factor, dtype)

    def dequantize(
        self,
        codes: Shaped[Array, "*tile"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        return _CODEC.dequantize(codes, decode_constants, dtype)


_CODEC = TaperedCodec()
