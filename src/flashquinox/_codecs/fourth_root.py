import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from .._codec import AbstractMomentCodec, Dither, StoredMoment, zeros
from .._layout import Layout
from .._scales import decode_range, encode_range, LARGEST_CODE, NEGLIGIBLE_ROOT


class FourthRootCodec(AbstractMomentCodec):
    r"""For averages of squares: fourth-root companding in `uint8`, fitted to the range
    of each group, rounded by the rotating threshold.

    $$\sqrt{v} = s \left( \frac{q + t}{N + t} \right)^2, \qquad
    s = \max \sqrt{v}, \qquad N = 254.5$$

    The shift $t$ fits the curve to the range of the group: code 0 stands for
    $s \, (t / (N + t))^2$, at most the smallest $\sqrt{v}$ of the group. The relative
    step between neighboring codes is $2 / (q + t)$. A group of similar moments has a
    large $t$ and steps of down to 0.05 %. A group that spans many orders of magnitude
    has $t = 16$, the least there is, and code 0 stands for $0.0035 s$: where $\sqrt{v}$
    is smaller than that, the first moment is below its own first code, and an update
    divides the one by the other.

    One `uint16` holds both: $s$ with eight exponent bits, rounded *up* to three
    mantissa bits (codes make up for what it exceeds the maximum by), and $t$ rounded
    *down* to one of 32 values, about $16 \cdot 2^{i/4}$. That is the size and the
    exponent range of a bfloat16.

    With `dithered=False`, codes are rounded to nearest; with `fitted=False`, $t = 16$
    everywhere: for measuring what each is worth.
    """

    dithered: bool = eqx.field(static=True, default=True)
    fitted: bool = eqx.field(static=True, default=True)

    @property
    def flattened(self) -> bool:
        return False

    def init(self, layout: Layout, dtype: DTypeLike) -> StoredMoment:
        del dtype
        return zeros(self, layout, jnp.uint8, jnp.uint16)

    def encode(
        self, moment: Float[Array, "*tile"], axis: int, dither: Dither
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*#tile"] | None]:
        root = jnp.sqrt(moment)
        largest = jnp.max(root, axis=axis, keepdims=True).astype(jnp.float32)
        smallest = jnp.min(root, axis=axis, keepdims=True).astype(jnp.float32)
        if not self.fitted:
            smallest = jnp.zeros_like(smallest)
        scales = encode_range(smallest, largest)
        scale, shift = decode_range(scales)
        factor = (LARGEST_CODE + shift) ** 2 / jnp.maximum(scale, NEGLIGIBLE_ROOT)
        factor, shift = factor.astype(moment.dtype), shift.astype(moment.dtype)
        # Rounding q by a threshold raises the mean of (q + t)^4 by 6 (q + t)^2 times
        # the variance; subtracting c from (q + t)^2 lowers it by 2 c (q + t)^2. The
        # variance is 1/6 for moments that move by many codes a step, less for others.
        square = jnp.maximum(root * factor - 0.25, shift * shift)
        codes = jnp.sqrt(square) - shift
        threshold = dither.code if self.dithered else jnp.asarray(0.5, jnp.float32)
        codes = jnp.floor(codes + threshold.astype(moment.dtype))
        return codes.astype(jnp.uint8), scales

    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*#tile"] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        assert scales is not None
        scale, shift = decode_range(scales)
        factor = (scale / (LARGEST_CODE + shift) ** 2).astype(dtype)
        shifted = codes.astype(dtype) + shift.astype(dtype)
        root = shifted * shifted * factor
        return root * root
