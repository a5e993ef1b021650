import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Scalar, Shaped

from .._common.arithmetic import accurate_quotient, rounded_quotient, rounded_root
from .._rules.rule import check_kind, MomentKind
from .codec import AbstractMomentCodec, Dither, GroupConstants, Reduction


class FlashOptimCodec(AbstractMomentCodec):
    r"""The codec of the paper, bit-compatible with its reference implementation:
    flattened groups of 32 with float16 scales, everything rounded to nearest.

    $$q = \lfloor 127 \cdot 2n / (1 + |n|) + \tfrac12 \rfloor \text{ with }
    n = m / \max |m| \text{ for signed moments}$$

    $$q = \lfloor 255 \cdot \sqrt{v} / \max \sqrt{v} + \tfrac12 \rfloor
    \text{ for averages of squares}$$

    For checkpoints from elsewhere and for comparison. Its scales vanish below
    $3 \cdot 10^{-8}$. Scales end at 65504,
    where the paper's become infinite: a larger $|m|$ or $\sqrt{v}$ is stored as 65504.

    It does not suit sparse gradients. A first moment that should decay stays at its
    last codes, and a second moment that is small beside the largest of its group is
    stored as zero: their quotient is the update. In `benchmarks/horizon.py`, with
    $\beta_2 = 0.95$ and in learning rates, an element whose gradient became zero moved
    by 646 in 5,000 steps, and rows of tokens that no longer occurred by 245, where
    float32 moved both by 2.2. Noisy gradients of sizes from 1 to 1/100,000 in a group
    gave updates of up to 7,699, in float32 of 1.04. In 100,000 steps with one huge
    gradient, at $\beta_2 = 0.999$, the mean weight was 213 in place of 8.1.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.2.
    """

    kind: MomentKind = eqx.field(static=True)

    def __check_init__(self):
        check_kind("FlashOptimCodec", self.kind)

    @property
    def kinds(self) -> tuple[MomentKind, ...]:
        return (self.kind,)

    @property
    def flattened(self) -> bool:
        return True

    @property
    def dtypes(self) -> tuple[DTypeLike, DTypeLike]:
        return self._code_dtype, jnp.float16

    def statistics(
        self, prepared: tuple[Float[Array, "*tile"], ...]
    ) -> tuple[tuple[Reduction, Float[Array, "*tile"]], ...]:
        (moment,) = prepared
        return ((jnp.max, jnp.abs(self._amplitude(moment))),)

    def fit(
        self,
        statistics: tuple[Float[Array, "*groups"], ...],
        factor: Scalar | None,
        dither: Dither,
    ) -> tuple[Shaped[Array, "*groups"] | None, GroupConstants]:
        del dither
        (largest,) = statistics
        if factor is not None:
            largest = largest * (factor if self.kind == "signed" else jnp.sqrt(factor))
        largest = jnp.clip(largest, 1e-12, _LARGEST_SCALE)
        constants = (largest,) if factor is None else (largest, factor)
        return largest.astype(jnp.float16), constants

    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        encode_constants: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        (moment,) = prepared
        largest, *factor = encode_constants
        if factor:
            moment = moment * factor[0]
        amplitude = jnp.clip(self._amplitude(moment), -largest, largest)
        codes = rounded_quotient(amplitude, largest)
        if self.kind == "signed":
            codes = rounded_quotient(2 * codes, 1 + jnp.abs(codes))
        codes = jnp.floor(codes * self._largest_code + 0.5)
        return codes.astype(self._code_dtype)

    def decode_constants(
        self,
        scales: Shaped[Array, "*groups"] | None,
        factor: Scalar | None,
        dtype: DTypeLike,
    ) -> GroupConstants:
        assert scales is not None
        scales = scales.astype(dtype)
        return (scales,) if factor is None else (scales, factor)

    def dequantize(
        self,
        codes: Shaped[Array, "*tile"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        scale, *factor = decode_constants
        # XLA divides by a constant through its rounded reciprocal. In two parts, of
        # which the first has an exact product with any code, it is rounded only once.
        reciprocal = 1 / self._largest_code
        high = np.float32(round(reciprocal * 2**22) / 2**22)
        low = np.float32(reciprocal - float(high))
        codes = codes.astype(dtype)
        amplitude = codes * high.astype(dtype) + codes * low.astype(dtype)
        if self.kind == "signed":
            moment = accurate_quotient(amplitude, 2 - jnp.abs(amplitude)) * scale
        else:
            amplitude = amplitude * scale
            moment = amplitude * amplitude
        return moment * factor[0] if factor else moment

    def _amplitude(self, moment: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        return moment if self.kind == "signed" else rounded_root(moment)

    @property
    def _code_dtype(self) -> DTypeLike:
        return jnp.int8 if self.kind == "signed" else jnp.uint8

    @property
    def _largest_code(self) -> float:
        return 127.0 if self.kind == "signed" else 255.0


_LARGEST_SCALE = float(jnp.finfo(jnp.float16).max)
