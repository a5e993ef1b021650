r"""Learned companding: the parameter of a curve follows the error that it makes.

A curve $y = f_a(n)$ whose codes are $\delta$ apart stores $n$ with an error of about
$\delta / f_a'(n)$, uniformly distributed: a smooth function of $a$, although codes are
integers. What counts is what it does to the next update, to first order: it is
multiplied by the derivative of the rule by this moment. The mean square over a sample
of the leaf, of the moments as they are stored, is what the parameter descends.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Scalar, Shaped

from ._body import StepScalars, StepStructure, TileState
from ._codecs.companded import CompandedCodec
from ._layout import Layout
from ._split import compute_dtype


# Elements of a leaf, and how many of them along its groups at least. They are others
# in each fit.
_SAMPLE, _ALONG = 4096, 16
# Steps between fits, at first and then.
_EARLY, _LATE = 4, 64
# Until when the parameter is free to move. After that, only where a sample says that
# there are some percent to gain: all codes are rounded again when it moves, and errors
# of what is seldom updated, such as rows of an embedding, would add up.
_SETTLED = 32
_FLAT = 0.5
# In units of the logarithm of 1 + a, of which the largest value is this.
_RATE = 0.25
_LARGEST = math.log1p(1e4)


class Observation(NamedTuple):
    """A sample of a learned moment: magnitudes in units of the largest of the group,
    roots taken; and what an error of the moment, in those units, does to an update."""

    n: Float32[Array, "*moments sample"]
    weight: Float32[Array, "*moments sample"]


def is_due(count: Int32[Array, ""]) -> Bool[Array, ""]:
    """Whether this step begins with a fit."""
    return count % jnp.where(count <= _SETTLED, _EARLY, _LATE) == 0


def learned_names(structure: StepStructure) -> list[str]:
    """The moments whose codecs learn."""
    codecs = structure.codec_of
    return [name for name, codec in codecs.items() if codec.initial is not None]


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
        constants[name] = codec.dequantizer(
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
            return structure.rule.update(nothing, nothing, known, scalars.rule)[0]

        _, derivative = jax.jvp(update, (moment,), (jnp.ones_like(moment),))
        n = codec.normalized(elements(old.codes[name]), dtype)
        unit = constants[name][0]
        weight = jnp.where(moment == 0, 0, (derivative * unit) ** 2)
        missing = (0, _SAMPLE - n.size)
        observations.append(
            Observation(*(jnp.pad(x.astype(jnp.float32), missing) for x in (n, weight)))
        )
    return observations


def slopes(
    codecs: Sequence[CompandedCodec],
    observations: Sequence[Observation],
    parameters: Sequence[Scalar],
) -> Float32[Array, "moments 2 2"]:
    """For each moment, the error of its sample and the derivative by the logarithm of
    1 + a: first with the weights, then of the moment itself. Of parts of a leaf, these
    can be added.
    """
    n, weight = (jnp.stack(x) for x in zip(*observations, strict=True))
    signed = np.array([codec.kind == "signed" for codec in codecs])[:, None]
    roots = np.array([codec.curve.root for codec in codecs], np.float32)[:, None]
    logs = jnp.log1p(jnp.stack(list(parameters)))[:, None]
    # Of a threshold that is one half, or uniform over [0, 1).
    variance = np.where(signed, np.float32(127**-2 / 12), np.float32(255**-2 / 6))
    with jax.numpy_rank_promotion("allow"):
        there = n > 0
        n = jnp.where(there, n, 1)
        # No more than all of a signed moment is lost; of the reciprocal root of an
        # average of squares likewise.
        most = np.where(signed, np.float32(1), np.float32(4))

        def relative_error(logs: Array) -> Array:
            a = jnp.expm1(logs)
            error = variance * ((1 + a * n) ** 2 / ((1 + a) * n)) ** 2
            return jnp.minimum(roots**2 * error, most)

        error, derivative = jax.jvp(relative_error, (logs,), (jnp.ones_like(logs),))
        square = n ** (2 * roots)
        # Where no update depends on a moment, as of a sign.
        plain = jnp.where(signed, square, 1)
        found = [
            [
                jnp.sum(jnp.where(there & jnp.isfinite(w), w * x, 0), axis=1)
                for x in (error, derivative)
            ]
            for w in (weight * square, plain)
        ]
    return jnp.stack([jnp.stack(x, axis=1) for x in found], axis=1)


def follow(
    parameters: Sequence[Scalar],
    slopes: Float32[Array, "moments 2 2"],
    count: Int32[Array, ""],
) -> list[Scalar]:
    """A step down these slopes, where there are any."""
    old = jnp.stack(list(parameters))
    slope = jnp.where(slopes[:, :1, 0] > 0, slopes[:, 0], slopes[:, 1])
    error, derivative = slope[:, 0], slope[:, 1]
    known = (error > 0) & jnp.isfinite(error) & jnp.isfinite(derivative)
    relative = jnp.where(known, derivative, 0) / jnp.where(known, error, 1)
    logs = jnp.log1p(old) - _RATE * jnp.clip(relative, -1, 1)
    new = jnp.expm1(jnp.clip(logs, 0, _LARGEST))
    worth_it = (count <= _SETTLED) | (jnp.abs(relative) > _FLAT)
    return list(jnp.where(known & worth_it, new, old))


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
