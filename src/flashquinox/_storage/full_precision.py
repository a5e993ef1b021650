from jax.typing import DTypeLike
from jaxtyping import Array, Float, Scalar, Shaped

from .._rules.rule import MomentKind
from .codec import AbstractMomentCodec, Dither, GroupConstants, Reduction


class FullPrecision(AbstractMomentCodec):
    """No compression: the moment itself, in the precision the leaf computes in."""

    @property
    def kinds(self) -> tuple[MomentKind, ...]:
        return ("signed", "nonnegative")

    @property
    def dtypes(self) -> None:
        return None

    def statistics(
        self, prepared: tuple[Float[Array, "*tile"], ...]
    ) -> tuple[tuple[Reduction, Float[Array, "*tile"]], ...]:
        del prepared
        return ()

    def fit(
        self,
        statistics: tuple[Float[Array, "*groups"], ...],
        factor: Scalar | None,
        dither: Dither,
    ) -> tuple[Shaped[Array, "*groups"] | None, GroupConstants]:
        del statistics, dither
        return None, () if factor is None else (factor,)

    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        encode_constants: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        (moment,) = prepared
        for factor in encode_constants:
            moment = moment * factor
        return moment

    def decode_constants(
        self,
        scales: Shaped[Array, "*groups"] | None,
        factor: Scalar | None,
        dtype: DTypeLike,
    ) -> GroupConstants:
        del scales, dtype
        return () if factor is None else (factor,)

    def dequantize(
        self,
        codes: Shaped[Array, "*tile"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        moment = codes.astype(dtype)
        for factor in decode_constants:
            moment = moment * factor
        return moment


# What moments without codes are stored by.
FULL_PRECISION = FullPrecision()
