import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Scalar, Shaped

from .._common.arithmetic import nearest_int8
from .._common.number_checks import check_flag
from .._rules.rule import MomentKind
from .codec import AbstractMomentCodec, Dither, GroupConstants, Reduction
from .scales import decode_scale, divisor, encode_scale, LARGEST_SIGNED


class LinearCodec(AbstractMomentCodec):
    r"""For signed moments whose elements are of one size: evenly spaced codes in
    `int8`, rounded by the rotating threshold.

    $$q = \operatorname{round}\left(\frac{m}{s} + u - \tfrac12\right), \qquad
    m = s \, q, \qquad s = \frac{\max |m|}{126}$$

    It is the default for moments that are stored relative to the root of another: see
    [`flashquinox.Moment`][]. The threshold $u$ makes rounding unbiased over time, also
    of elements far below a code: a moment that decays reaches zero.

    A scale $s$ is kept as the bits of a bfloat16 in an `int16`, rounded by the rotating
    threshold too. Codes end at $\pm 127$, so that a scale that was rounded down covers
    its group. Moments of more than $2^{62}$, and what is no number, are stored as zero.
    (Scales of other codecs are `uint16`: a file without the names of codecs, as of
    `eqx.tree_serialise_leaves`, cannot be mistaken for one of theirs.)

    With `dithered=False`, codes are rounded to nearest: for measuring what that is
    worth.
    """

    dithered: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_flag("LinearCodec", "dithered", self.dithered)

    @property
    def kinds(self) -> tuple[MomentKind, ...]:
        return ("signed",)

    @property
    def dtypes(self) -> tuple[DTypeLike, DTypeLike]:
        return jnp.int8, jnp.int16

    def prepare(
        self, moment: Float[Array, "*tile"]
    ) -> tuple[Float[Array, "*tile"], ...]:
        # An element of a group must not spoil the others.
        return (jnp.where(jnp.abs(moment) <= float(LARGEST_SIGNED), moment, 0),)

    def statistics(
        self, prepared: tuple[Float[Array, "*tile"], ...]
    ) -> tuple[tuple[Reduction, Float[Array, "*tile"]], ...]:
        (moment,) = prepared
        return ((jnp.max, jnp.abs(moment)),)

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
        scale = largest.astype(jnp.float32) * np.float32(1 / 126)
        scales = encode_scale(scale, dither.scale, _MANTISSA_BITS)
        inverse = 1 / divisor(decode_scale(scales, _MANTISSA_BITS), factor, dtype)
        scales = scales.astype(jnp.int16)
        if not self.dithered:
            return scales, (inverse,)
        return scales, (inverse, dither.code.astype(dtype) - 0.5)

    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        encode_constants: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        (moment,) = prepared
        inverse, *threshold = encode_constants
        codes = moment * inverse
        if self.dithered:
            codes = codes + threshold[0]
        return nearest_int8(codes)

    def decode_constants(
        self,
        scales: Shaped[Array, "*groups"] | None,
        factor: Scalar | None,
        dtype: DTypeLike,
    ) -> GroupConstants:
        assert scales is not None
        scale = decode_scale(scales, _MANTISSA_BITS).astype(dtype)
        return (scale if factor is None else scale * factor,)

    def dequantize(
        self,
        codes: Shaped[Array, "*tile"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        (scale,) = decode_constants
        return codes.astype(dtype) * scale


_MANTISSA_BITS = 7
