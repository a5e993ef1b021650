import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Scalar, Shaped

from .codec import AbstractMomentCodec, Dither, GroupConstants, Reduction, StoredMoment
from .layout import Layout


class FullPrecision(AbstractMomentCodec):
    """No compression: the moment itself, in the precision the leaf computes in."""

    @property
    def flattened(self) -> bool:
        return False

    def init(self, layout: Layout, dtype: DTypeLike) -> StoredMoment:
        return jnp.zeros(layout.shape, dtype)

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
        quantizer: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        (moment,) = prepared
        for factor in quantizer:
            moment = moment * factor
        return moment

    def dequantizer(
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
        dequantizer: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        moment = codes.astype(dtype)
        for factor in dequantizer:
            moment = moment * factor
        return moment
