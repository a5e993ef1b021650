from collections.abc import Sequence

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Scalar, Shaped

from .._common.arithmetic import (
    accurate_quotient,
    nearest_uint8,
    rounded_quotient,
    rounded_root,
)
from .._rules.rule import check_kind, MomentKind
from .codec import Dither, GroupConstants, Reduction
from .curves import AbstractCurve, RationalCurve
from .learned_codec import AbstractLearnedCodec
from .rational_learner import RationalLearner
from .scales import (
    decode_scale,
    divisor,
    encode_scale,
    largest_finite,
    LARGEST_SIGNED,
    LARGEST_SQUARE,
)


class CompandedCodec(AbstractLearnedCodec):
    r"""Any companding curve, for either kind of moment: see
    [`flashquinox.AbstractCurve`][].

    With $f$ the curve, $s$ the largest magnitude of the group, and $u$ the rotating
    threshold,

    $$|q| = \begin{cases} q_0 + 1 & \frac{|m| - x_0}{x_1 - x_0} + u \ge 1 \\ q_0
    \end{cases} \text{ for signed moments, in `int8`,}$$

    where the codes $q_0$ and $q_0 + 1$ stand for the magnitudes $x_0 \le |m| < x_1$;
    and

    $$q = \max\left(1, \operatorname{round}\left(255 \, f(v / s) + u - \tfrac12\right)
    \right) \text{ for averages of squares, in `uint8`}$$

    As in the other codecs of this library, no average of squares that is not zero is
    stored as zero, and scales are eight exponent and eight mantissa bits in a `uint16`,
    rounded by the rotating threshold. Magnitudes of more than $2^{62}$, and averages of
    squares of more than $2^{124}$, are stored as that.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.2,
        has the idea of companding functions, and two of them.
    """

    kind: MomentKind = eqx.field(static=True)
    curve: AbstractCurve
    # Of the curve, while a step is computed.
    parameter: Scalar | None = None

    def __check_init__(self):
        check_kind("CompandedCodec", self.kind)

    @property
    def kinds(self) -> tuple[MomentKind, ...]:
        return (self.kind,)

    @property
    def initial(self) -> float | None:
        curve = self.curve
        return curve.initial if isinstance(curve, RationalCurve) else None

    @property
    def learner(self) -> RationalLearner:
        return RationalLearner(self._signed, self.curve.root)

    def with_parameter(self, parameter: Scalar) -> "CompandedCodec":
        return CompandedCodec(self.kind, self.curve, parameter)

    @property
    def dtypes(self) -> tuple[DTypeLike, DTypeLike]:
        return jnp.int8 if self._signed else jnp.uint8, jnp.uint16

    def prepare(
        self, moment: Float[Array, "*tile"]
    ) -> tuple[Float[Array, "*tile"], ...]:
        """The roots of magnitudes; and the moment, for its sign."""
        magnitude = jnp.abs(moment) if self._signed else moment
        most = LARGEST_SIGNED if self._signed else LARGEST_SQUARE
        magnitude = jnp.minimum(magnitude, most.astype(moment.dtype))
        for _ in range(self._roots):
            magnitude = rounded_root(magnitude)
        return (magnitude, moment) if self._signed else (magnitude,)

    def statistics(
        self, prepared: tuple[Float[Array, "*tile"], ...]
    ) -> tuple[tuple[Reduction, Float[Array, "*tile"]], ...]:
        return ((jnp.max, prepared[0]),)

    def fit(
        self,
        statistics: tuple[Float[Array, "*groups"], ...],
        factor: Scalar | None,
        dither: Dither,
    ) -> tuple[Shaped[Array, "*groups"] | None, GroupConstants]:
        (largest,) = statistics
        dtype = largest.dtype
        if self._signed:
            largest = largest_finite(largest, 1.0)
        for _ in range(self._roots):
            largest = largest * largest
        if factor is not None:
            largest = largest * factor
        scales = encode_scale(largest.astype(jnp.float32), dither.scale)
        unit = divisor(decode_scale(scales), factor, dtype)
        for _ in range(self._roots):
            unit = rounded_root(unit)
        threshold = dither.code.astype(dtype) - 0.5
        inverse_unit = rounded_quotient(jnp.ones_like(unit), unit)
        return scales, (inverse_unit, threshold, *self._parameters(dtype))

    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        encode_constants: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        magnitude, *moment = prepared
        inverse_unit, threshold, *parameters = encode_constants
        y = self._curve_at(parameters).compress(magnitude * inverse_unit)
        # A scale that was rounded down leaves elements above it.
        if not self._signed:
            codes = jnp.clip(255 * y + threshold, 1, 255)
            return nearest_uint8(codes)
        # Where it is steep, as roots are near zero, the mean of two codes is far from
        # what lies in the middle of them on the curve.
        below = jnp.minimum(jnp.floor(127 * y), 126)
        low, high = (self._magnitude(x, parameters) for x in (below, below + 1))
        n = magnitude * inverse_unit
        for _ in range(self._roots):
            n = n * n
        fraction = jnp.minimum(accurate_quotient(n - low, high - low), 1)
        codes = below + jnp.floor(fraction + (threshold + 0.5))
        return jnp.where(moment[0] < 0, -codes, codes).astype(jnp.int8)

    def decode_constants(
        self,
        scales: Shaped[Array, "*groups"] | None,
        factor: Scalar | None,
        dtype: DTypeLike,
    ) -> GroupConstants:
        assert scales is not None
        unit = decode_scale(scales).astype(dtype)
        unit = unit if factor is None else unit * factor
        return (unit, *self._parameters(dtype))

    def dequantize(
        self,
        codes: Shaped[Array, "*tile"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        unit, *parameters = decode_constants
        wide = self._widen(codes, dtype)
        magnitude = self._magnitude(jnp.abs(wide) if self._signed else wide, parameters)
        moment = magnitude * unit
        return jnp.where(wide < 0, -moment, moment) if self._signed else moment

    def observe(
        self,
        codes: Shaped[Array, "*sample"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> tuple[Float[Array, "*sample"], Float[Array, "*sample"]]:
        unit, *parameters = decode_constants
        return self._expand(jnp.abs(self._widen(codes, dtype)), parameters), unit

    def _widen(
        self, codes: Shaped[Array, "*tile"], dtype: DTypeLike
    ) -> Float[Array, "*tile"]:
        if self._signed:
            return codes.astype(dtype)
        # Signed bytes are cheaper to widen on TPUs.
        codes = lax.bitcast_convert_type(codes ^ np.uint8(128), jnp.int8)
        return codes.astype(dtype) + 128

    def _magnitude(
        self, codes: Float[Array, "*tile"], parameters: Sequence[Scalar]
    ) -> Float[Array, "*tile"]:
        """What codes stand for, in units of the scale."""
        magnitude = self._expand(codes, parameters)
        for _ in range(self._roots):
            magnitude = magnitude * magnitude
        return magnitude

    def _expand(
        self, magnitude: Float[Array, "*tile"], parameters: Sequence[Scalar]
    ) -> Float[Array, "*tile"]:
        y = magnitude * (1 / (127 if self._signed else 255))
        return self._curve_at(parameters).expand(y)

    def _curve_at(self, parameters: Sequence[Scalar]) -> AbstractCurve:
        """The curve; if it learns, with its parameter."""
        if not parameters:
            return self.curve
        assert isinstance(self.curve, RationalCurve)
        return self.curve.at(*parameters)

    @property
    def _signed(self) -> bool:
        return self.kind == "signed"

    @property
    def _roots(self) -> int:
        """How many square roots the curve begins with."""
        return self.curve.root.bit_length() - 1

    def _parameters(self, dtype: DTypeLike) -> GroupConstants:
        if self.initial is None:
            return ()
        parameter = self.initial if self.parameter is None else self.parameter
        return (jnp.asarray(parameter, dtype),)
