r"""Learned companding: the parameter of a curve follows the error that it makes.

A curve $y = f_a(n)$ whose codes are $\delta$ apart stores $n$ with an error of about
$\delta / f_a'(n)$, uniformly distributed: a smooth function of $a$, although codes are
integers. What counts is what it does to the next update, to first order: it is
multiplied by the derivative of the rule by this moment. The parameter goes down the
slope of the mean square over a sample of the leaf, of the moments as they are stored.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from .._common.dtypes import compute_dtype
from .._storage.codec import initial_parameter
from .._storage.companded import CompandedCodec
from .._storage.layout import Layout
from .._tile.tile import StepScalars, StepStructure, TileState
from .interpreter.arithmetic import Arithmetic


# Elements of a leaf, and how many of them along its groups at least. They are others
# in each fit.
_SAMPLE, _ALONG = 16384, 32
# Steps between fits, and until when: moments change most in the first steps.
_INTERVALS = {4: 32, 16: 128, 64: None}
# How much smaller an error has to be for the parameter to move. Codes are rounded again
# when it does, and errors of what is seldom updated, such as rows of an embedding,
# would add up. And how much smaller than softsign's, or it is softsign: a sample knows
# no better.
_WORTH, _WORTH_OF_SOFTSIGN = 0.1, 0.3
# The share of elements that no update depends on, for it to move, at most: of an
# embedding of rare tokens, what is rounded again stays so for long.
_SPARSE = 0.25
# How much an element may count, in units of the mean: a few of now would decide for all
# of the steps to come.
_LARGEST_SHARE = 3
# Of the logarithm of 1 + a: softsign's, the largest, and how far it moves at once.
_SOFTSIGN, _LARGEST, _FARTHEST = math.log(2), math.log1p(1e4), 1.0
# From that far away, they end within 1e-4 of the smallest error.
_NEWTON_STEPS = 6


class Observation(NamedTuple):
    """A sample of a learned moment: magnitudes in units of the largest of the group,
    roots taken; and what an error of the moment, in those units, does to an update.
    Negative where a leaf has fewer elements."""

    n: Float32[Array, "*moments sample"]
    weight: Float32[Array, "*moments sample"]


def is_due(count: Int32[Array, ""]) -> Bool[Array, ""]:
    """Whether this step begins with a fit."""
    due = jnp.asarray(False)
    for interval, until in reversed(_INTERVALS.items()):
        now = count % interval == 0
        due = now if until is None else jnp.where(count <= until, now, due)
    return due


def learned_names(structure: StepStructure) -> list[str]:
    """The moments whose codecs learn."""
    codecs = structure.codec_of
    return [
        name for name, codec in codecs.items() if initial_parameter(codec) is not None
    ]


def observe(
    structure: StepStructure, layout: Layout, scalars: StepScalars, old: TileState
) -> list[Observation]:
    """A sample of each of these moments of a leaf."""
    dtype = compute_dtype(old.weight.dtype)
    elements, groups = _places(layout, scalars.count)
    factors = structure.factors(scalars)
    codecs, _ = structure.codecs_before_and_after(scalars)
    moments, constants = {}, {}
    for name, codec in codecs.items():
        scales = old.scales[name]
        constants[name] = codec.decode_constants(
            None if scales is None else groups(scales), factors[name][0], dtype
        )
        codes = elements(old.codes[name])
        moments[name] = codec.dequantize(codes, constants[name], dtype)
    nothing = jnp.zeros(moments[next(iter(moments))].shape, dtype)

    observations = []
    for name in learned_names(structure):
        codec, moment = codecs[name], moments[name]
        assert isinstance(codec, CompandedCodec)

        def update(x: Array, name: str = name) -> Array:
            known = moments | {name: x}
            # The operations alone: functions with a `custom_vjp` have no forward
            # derivative.
            rule = lambda *args: structure.rule.update(*args)[0]
            return Arithmetic().evaluate(rule, nothing, nothing, known, scalars.rule)

        _, derivative = jax.jvp(update, (moment,), (jnp.ones_like(moment),))
        n = codec.normalized(elements(old.codes[name]), dtype)
        unit = constants[name][0]
        weight = jnp.where(moment == 0, 0, (derivative * unit) ** 2)
        pad = lambda x: jnp.pad(
            x.astype(jnp.float32), (0, _SAMPLE - x.size), constant_values=-1
        )
        observations.append(Observation(pad(n), pad(weight)))
    return observations


def errors(
    codecs: Sequence[CompandedCodec],
    observations: Sequence[Observation],
    parameters: Float32[Array, " moments"],
) -> Float32[Array, "moments 2 6"]:
    r"""For each moment, the error of its sample as a function of the parameter: first
    with the weights, then of the moment itself. Of parts of a leaf, these can be added.

    With $s = 1 + a$, the square of an error is in proportion to

    $$\frac{(1 + a n)^4}{(1 + a)^2} = \frac{(1 - n + s n)^4}{s^2}
    = \sum_{k=0}^4 \binom 4 k (1 - n)^{4 - k} n^k s^{k - 2}.$$

    The five coefficients are what is returned; and after the first ones how many
    elements there are, after the second ones how many of them no update depends on.
    """
    n, weight = (jnp.stack(x) for x in zip(*observations, strict=True))
    signed = np.array([codec.kind == "signed" for codec in codecs])[:, None]
    roots = np.array([codec.curve.root for codec in codecs], np.float32)[:, None]
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
            found.append(jnp.stack([*coefficients, elements.astype(jnp.float32)], 1))
    return jnp.stack(found, axis=1)


def follow(
    parameters: Float32[Array, " moments"],
    errors: Float32[Array, "moments 2 6"],
) -> Float32[Array, " moments"]:
    """To where the error is smallest, if that is worth it. In the logarithm of $s$, it
    is a sum of exponentials, and so convex: Newton's method."""
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


def _places(layout: Layout, count: Int32[Array, ""]) -> tuple[Any, Any]:
    """Functions that take a sample of a leaf, and the scales of its elements."""
    shape = (math.prod(layout.shape),) if layout.axis is None else layout.shape
    indices: list[Any] = [None] * len(shape)
    sizes = _sizes(shape, layout.tile_axis % len(shape))
    for axis, (length, size) in enumerate(zip(shape, sizes, strict=True)):
        # Which begins elsewhere each time.
        turn = count.astype(jnp.uint32) * np.uint32(0x9E3779B9) >> 8
        start = turn.astype(jnp.float32) * np.float32(2.0**-24 * length)
        spread = np.arange(size) * (length / size)
        indices[axis] = (start.astype(jnp.int32) + spread.astype(np.int32)) % length

    def take(x: Shaped[Array, "..."], indices: list[Any]) -> Shaped[Array, " sample"]:
        return x[jnp.ix_(*indices)].ravel()

    def elements(x: Shaped[Array, "..."]) -> Shaped[Array, " sample"]:
        return take(x.reshape(shape), indices)

    def groups(x: Shaped[Array, "..."]) -> Shaped[Array, " sample"]:
        of_groups = list(indices)
        axis = layout.tile_axis
        of_groups[axis] = of_groups[axis] // layout.group_size
        return take(x, of_groups)

    return elements, groups


def _sizes(shape: tuple[int, ...], group_axis: int) -> list[int]:
    """How many places of each axis a sample is of. Few along groups, whose elements are
    alike: the rows of an embedding are not."""
    along = min(shape[group_axis], _ALONG)
    wanted, left = _SAMPLE // along, len(shape) - 1
    sizes = [0] * len(shape)
    # As even a share of the others as their lengths allow.
    for axis in sorted(range(len(shape)), key=lambda i: shape[i]):
        if axis == group_axis:
            continue
        sizes[axis] = min(shape[axis], max(1, int(wanted ** (1 / left) + 1e-9)))
        wanted, left = wanted // sizes[axis], left - 1
    # And what is left.
    sizes[group_axis] = min(shape[group_axis], along * max(1, wanted))
    return sizes
