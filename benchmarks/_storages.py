"""Ways to store weights and moments that several benchmarks have. Weights of others are
rounded to nearest."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

import flashquinox as fq


class NeverZero(fq.FlashOptimCodec):
    """The paper's second moments, of which none is stored as zero: what is below half a
    code is stored as one."""

    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        encode_constants: tuple[Shaped[Array, "..."], ...],
    ) -> Shaped[Array, "*tile"]:
        codes = super().quantize(prepared, encode_constants)
        return jnp.maximum(codes, jnp.ones_like(codes))


def second_moments_alone(codec: fq.AbstractMomentCodec) -> fq.Storage:
    """Second moments in a codec, beside exact first ones."""
    return fq.Storage(
        dither_weights=False,
        moments=fq.MomentCodecs(
            fq.FullPrecision(), codec, relative=None, smallest_vector=0
        ),
    )


# The paper's codec of moments, and its 24 bits of weights.
PAPER = fq.Storage(moments="flashoptim", dither_weights=False)
# Weights alone, as `model.astype(bfloat16)` has them.
BFLOAT16 = fq.Storage(master_weight_bits=None, moments="float32", dither_weights=False)
# The defaults, but first moments in 16 bits.
MOMENTUM_16_BITS = fq.Storage(
    moments=fq.MomentCodecs(fq.TaperedCodec(), fq.FittedLogCodec())
)
