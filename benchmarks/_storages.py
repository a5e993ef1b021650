"""Ways to store weights and moments that several benchmarks have. Weights of others are
rounded to nearest."""

import flashquinox as fq


# The paper's codec of moments, and its 24 bits of weights.
PAPER = fq.Storage(moments="flashoptim", dither_weights=False)
# Weights alone, as `model.astype(bfloat16)` has them.
BFLOAT16 = fq.Storage(master_weight_bits=None, moments="float32", dither_weights=False)
# The defaults, but first moments in 16 bits.
MOMENTUM_16_BITS = fq.Storage(
    moments=fq.MomentCodecs(fq.TaperedCodec(), fq.FittedLogCodec())
)
