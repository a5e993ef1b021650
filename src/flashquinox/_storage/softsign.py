import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Scalar, Shaped

from .._common.arithmetic import accurate_quotient, nearest_int8
from .._common.number_checks import check_flag
from .._rules.rule import MomentKind
from .codec import AbstractMomentCodec, Dither, GroupConstants, Reduction
from .scales import (
    decode_scale,
    divisor,
    encode_scale,
    largest_finite,
    LARGEST_SIGNED,
)


class SoftsignCodec(AbstractMomentCodec):
    r"""For signed moments: softsign companding in `int8`, rounded by the rotating
    threshold.

    $$q = \operatorname{round}\left(\frac{256 \, m}{s + |m|} + u - \tfrac12\right),
    \qquad m = s \, \frac{q}{256 - |q|}, \qquad
    s = \frac{129}{127} \max |m|$$

    so that the largest element of a group has the code $\pm 127$. A scale $s$ is kept
    as a float32's eight exponent bits and its `scale_mantissa_bits` leading mantissa
    bits in a `uint16` (it has no sign). 8, the default, is the range of a bfloat16 with
    one more bit of precision; 7 is bfloat16 itself. Scales are rounded by the rotating
    threshold too. Rounded to nearest, both would stall where a moment decays slowly:
    with $\beta = 0.9$, the codes $\pm 1$ to $\pm 4$ for good. `dithered=False` does
    that to codes. Moments of more than $2^{62}$ are stored as that, infinity as
    zero.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.2,
        which has $254 \, m / (\max |m| + |m|)$.
    """

    dithered: bool = eqx.field(static=True, default=True)
    scale_mantissa_bits: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        check_flag("SoftsignCodec", "dithered", self.dithered)

    @property
    def kinds(self) -> tuple[MomentKind, ...]:
        return ("signed",)

    @property
    def dtypes(self) -> tuple[DTypeLike, DTypeLike]:
        return jnp.int8, jnp.uint16

    def prepare(
        self, moment: Float[Array, "*tile"]
    ) -> tuple[Float[Array, "*tile"], ...]:
        return moment, jnp.abs(moment)

    def statistics(
        self, prepared: tuple[Float[Array, "*tile"], ...]
    ) -> tuple[tuple[Reduction, Float[Array, "*tile"]], ...]:
        _, magnitude = prepared
        return ((jnp.max, magnitude),)

    def fit(
        self,
        statistics: tuple[Float[Array, "*groups"], ...],
        factor: Scalar | None,
        dither: Dither,
    ) -> tuple[Shaped[Array, "*groups"] | None, GroupConstants]:
        (largest,) = statistics
        dtype = largest.dtype
        if factor is not None:
            largest = largest * factor
        largest = largest_finite(largest.astype(jnp.float32), 1.0)
        largest = jnp.minimum(largest, LARGEST_SIGNED)
        scale = largest * np.float32(129 / 127)
        scales = encode_scale(scale, dither.scale, self.scale_mantissa_bits)
        scale = decode_scale(scales, self.scale_mantissa_bits)
        scale = divisor(scale, factor, dtype)
        if not self.dithered:
            return scales, (scale,)
        threshold = jnp.broadcast_to(dither.code.astype(dtype) - 0.5, scale.shape)
        return scales, (scale, threshold)

    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        encode_constants: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        moment, magnitude = prepared
        scale, *threshold = encode_constants
        # The quotient comes first here too. It is NaN for infinity, which is stored as
        # zero. A scale that was rounded down, or that is the largest one, leaves
        # elements above it.
        quotient = accurate_quotient(moment, scale + magnitude)
        if self.dithered:
            codes = jnp.clip(256 * quotient + threshold[0], -127, 127)
        else:
            codes = 256 * jnp.clip(quotient, -127 / 256, 127 / 256)
        return nearest_int8(codes)

    def decode_constants(
        self,
        scales: Shaped[Array, "*groups"] | None,
        factor: Scalar | None,
        dtype: DTypeLike,
    ) -> GroupConstants:
        assert scales is not None
        scale = decode_scale(scales, self.scale_mantissa_bits).astype(dtype)
        return (scale if factor is None else scale * factor,)

    def dequantize(
        self,
        codes: Shaped[Array, "*tile"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        (scale,) = decode_constants
        codes = codes.astype(dtype)
        return accurate_quotient(codes, 256 - jnp.abs(codes)) * scale
