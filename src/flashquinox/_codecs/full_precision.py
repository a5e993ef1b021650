import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from .._codec import AbstractMomentCodec, Dither, StoredMoment
from .._layout import Layout


class FullPrecision(AbstractMomentCodec):
    """No compression: the moment itself, in the precision the leaf computes in."""

    @property
    def flattened(self) -> bool:
        return False

    def init(self, layout: Layout, dtype: DTypeLike) -> StoredMoment:
        return jnp.zeros(layout.shape, dtype)

    def encode(
        self, moment: Float[Array, "*tile"], axis: int, dither: Dither
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*#tile"] | None]:
        del axis, dither
        return moment, None

    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*#tile"] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        del scales
        return codes.astype(dtype)
