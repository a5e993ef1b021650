import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from .learned_codec import AbstractLearner, Observation


# The parameter moves only if its error is larger than the new one by this share. All
# codes are rounded again when it moves, and in rarely updated parts of a leaf, such as
# rows of an embedding, these roundings would add up.
_WORTH = 0.1
# The parameter is softsign's, a = 1, unless its error is larger than the smallest one
# by this share: a sample cannot tell smaller differences.
_WORTH_OF_SOFTSIGN = 0.3
# The parameter does not move if no update depends on more than this share of elements:
# in the embeddings of rare tokens, a rounding would stay for long.
_SPARSE = 0.25
# The largest weight of an element, in units of the mean weight. Otherwise a few
# elements of this step would decide for all steps until the next fit.
_LARGEST_SHARE = 3
# log(1 + a) of softsign, its largest value, and its largest change in one fit.
_SOFTSIGN, _LARGEST, _FARTHEST = math.log(2), math.log1p(1e4), 1.0
# From a distance of `_FARTHEST`, this many steps end within 1e-4 of the smallest error.
_NEWTON_STEPS = 6


class RationalLearner(AbstractLearner):
    r"""The parameter $a$ of a rational curve $y = f_a(n)$.

    With codes $\delta$ apart, the curve stores $n$ with an error of about
    $\delta / f_a'(n)$, uniformly distributed: a smooth function of $a$, although codes
    are integers.
    """

    signed: bool = eqx.field(static=True)
    root: int = eqx.field(static=True)

    @staticmethod
    def errors(
        learners: Sequence["RationalLearner"],
        observations: Sequence[Observation],
        parameters: Float32[Array, " moments"],
    ) -> Float32[Array, "moments 2 6"]:
        r"""For each moment, the error of its sample as a function of the parameter:
        first with the weights, then of the moment itself.

        With $s = 1 + a$, the square of an error is in proportion to

        $$\frac{(1 + a n)^4}{(1 + a)^2} = \frac{(1 - n + s n)^4}{s^2}
        = \sum_{k=0}^4 \binom 4 k (1 - n)^{4 - k} n^k s^{k - 2}.$$

        Of both, the five coefficients are returned, and a number: of the elements of
        the sample, then of those that no update depends on.
        """
        n, weight = (jnp.stack(x) for x in zip(*observations, strict=True))
        signed = np.array([learner.signed for learner in learners])[:, None]
        roots = np.array([learner.root for learner in learners], np.float32)[:, None]
        a = parameters[:, None]
        # Of a threshold that is one half, or uniform over [0, 1).
        variance = np.where(signed, np.float32(127**-2 / 12), np.float32(255**-2 / 6))
        with jax.numpy_rank_promotion("allow"):
            there = n > 0
            effective = jnp.any(weight > 0, axis=1, keepdims=True)
            idle = (n == 0) | ((weight == 0) & effective)
            counts = jnp.sum(n >= 0, axis=1), jnp.sum(idle, axis=1)
            n = jnp.where(there, n, 1)
            # No more than all of a signed moment is lost; of the reciprocal root of an
            # average of squares likewise.
            most = np.where(signed, np.float32(1), np.float32(4))
            relative = roots**2 * variance / n**2
            now = relative * (1 + a * n) ** 4 / (1 + a) ** 2
            relative = relative * jnp.minimum(1, most / now)
            square = n ** (2 * roots)
            # Where no update depends on a moment, as of a sign.
            plain = jnp.where(signed, square, 1)
            found = []
            for share, elements in zip((weight * square, plain), counts, strict=True):
                known = there & jnp.isfinite(share)
                share = jnp.where(known, share, 0)
                count = jnp.sum(known, axis=1, keepdims=True).astype(jnp.float32)
                mean = jnp.sum(share, axis=1, keepdims=True) / jnp.maximum(1, count)
                share = jnp.minimum(share, _LARGEST_SHARE * mean) * relative
                coefficients = [
                    jnp.sum(share * math.comb(4, k) * (1 - n) ** (4 - k) * n**k, axis=1)
                    for k in range(5)
                ]
                found.append(
                    jnp.stack([*coefficients, elements.astype(jnp.float32)], 1)
                )
        return jnp.stack(found, axis=1)

    @staticmethod
    def follow(
        parameters: Float32[Array, " moments"],
        errors: Float32[Array, "moments 2 6"],
    ) -> Float32[Array, " moments"]:
        """To where the error is smallest, if that is worth it. In the logarithm of
        $s$, it is a sum of exponentials, and so convex: Newton's method."""
        dense = errors[:, 1, 5] <= _SPARSE * errors[:, 0, 5]
        errors = errors[:, :, :5]
        known = jnp.sum(errors[:, :1], axis=2) > 0
        # In other units, for squares to be no subnormal numbers.
        coefficients = jnp.where(known, errors[:, 0], errors[:, 1])
        total = jnp.sum(coefficients, axis=1, keepdims=True)
        coefficients = coefficients / jnp.where(total > 0, total, 1)
        powers = np.arange(-2, 3, dtype=np.float32)

        def moment_of(order: int, logs: Array) -> Array:
            with jax.numpy_rank_promotion("allow"):
                terms = coefficients * powers**order * jnp.exp(powers * logs[:, None])
            return jnp.sum(terms, axis=1)

        start = logs = jnp.log1p(parameters)
        for _ in range(_NEWTON_STEPS):
            slope, curvature = moment_of(1, logs), moment_of(2, logs)
            newton = slope / jnp.where(curvature > 0, curvature, 1)
            logs = jnp.clip(logs - jnp.clip(newton, -1, 1), 0, _LARGEST)
        softsign = jnp.full_like(logs, _SOFTSIGN)
        enough = moment_of(0, softsign) > (1 + _WORTH_OF_SOFTSIGN) * moment_of(0, logs)
        logs = jnp.where(enough, logs, softsign)
        logs = start + jnp.clip(logs - start, -_FARTHEST, _FARTHEST)
        move = dense & (moment_of(0, start) > (1 + _WORTH) * moment_of(0, logs))
        return jnp.where(move, jnp.expm1(logs), parameters)
