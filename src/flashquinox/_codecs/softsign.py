import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from .._codec import AbstractMomentCodec, Dither, StoredMoment, zeros
from .._layout import Layout
from .._scales import decode_scale, encode_scale


class SoftsignCodec(AbstractMomentCodec):
    r"""For signed moments: softsign companding in `int8`, rounded to nearest.

    $$q = 127 \cdot \frac{2 n}{1 + |n|}, \qquad n = \frac{m}{s} = \frac{q}{254 - |q|},
    \qquad s = \max |m|$$

    A scale $s$ is kept as a float32's eight exponent bits and its `scale_mantissa_bits`
    leading mantissa bits in a `uint16` (it has no sign). 8, the default, is the range
    of a bfloat16 with one more bit of precision; 7 is bfloat16 itself. Scales are
    rounded by the rotating threshold, or they would stall where a moment decays slowly;
    codes are not, or a small moment would be left beside a second moment that is
    smaller still.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.2.
    """

    dithered: bool = eqx.field(static=True, default=False)
    scale_mantissa_bits: int = eqx.field(static=True, default=8)

    @property
    def flattened(self) -> bool:
        return False

    def init(self, layout: Layout, dtype: DTypeLike) -> StoredMoment:
        del dtype
        return zeros(self, layout, jnp.int8, jnp.uint16)

    def encode(
        self, moment: Float[Array, "*tile"], axis: int, dither: Dither
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*#tile"] | None]:
        magnitude = jnp.abs(moment)
        largest = jnp.max(magnitude, axis=axis, keepdims=True).astype(jnp.float32)
        scales = encode_scale(largest, dither.scale, self.scale_mantissa_bits)
        rounded = decode_scale(scales, self.scale_mantissa_bits)
        # Keeps the quotients of a group of zeros at zero.
        positive = jnp.maximum(rounded, _SMALLEST_NORMAL).astype(moment.dtype)
        # A scale that was rounded down lets this reach 127.25 at most.
        # The quotient comes first: products with large moments would overflow.
        codes = 254 * (moment / (positive + magnitude))
        if self.dithered:
            codes = jnp.floor(codes + dither.code.astype(moment.dtype))
        else:
            codes = jnp.round(codes)
        return codes.astype(jnp.int8), scales

    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*#tile"] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        assert scales is not None
        codes = codes.astype(dtype)
        scales = decode_scale(scales, self.scale_mantissa_bits).astype(dtype)
        return codes / (254 - jnp.abs(codes)) * scales


_SMALLEST_NORMAL = np.float32(2.0**-126)
