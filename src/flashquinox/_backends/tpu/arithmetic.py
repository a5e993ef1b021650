"""Instructions of a TPU's vector unit."""

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Int32

from ..interpreter.arithmetic import Arithmetic


# JAX moved it.
_pallas_reciprocal = (pltpu if hasattr(pltpu, "reciprocal") else pl).reciprocal


def arithmetic_of(generation: int | None) -> Arithmetic:
    """That of a generation (4, 5, 6, 7); of an unknown one, what all can do.

    All have an instruction for reciprocals. Its relative error is at most 2^-15 in the
    oldest. From the sixth on, `rsqrt` is one instruction without guards. Before,
    logarithms and powers are; the relative error of the root is 5e-5, half of the
    logarithm's absolute one.
    """
    return Arithmetic(
        reciprocal=_reciprocal,
        square_root=_root if generation is not None and generation >= 6 else _old_root,
        sign=_sign,
        canonical_pattern=_canonical_pattern,
        only_words=generation is not None and generation <= 4,
    )


def _reciprocal(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return _pallas_reciprocal(x, approx=True)


def _root(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return _reciprocal(lax.rsqrt(x))


def _old_root(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return lax.exp2(0.5 * jnp.log2(x))


def _sign(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    # 2^126 times the smallest normal number is 1, and there are no smaller ones.
    return jnp.clip(x * np.float32(2.0**126), -1, 1)


def _canonical_pattern(x: Float32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    # A comparison and a choice are two operations.
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(jnp.isnan(x), np.int32(0x7FC0_0000), bits)
