r"""Codecs that learn: when, and of which sample of a leaf.

What is learned, and how, is the codec's: see `_storage/learned_codec.py`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Scalar, Shaped

from .._common import memory
from .._rules.rule import AbstractRule
from .._storage.layout import Layout
from .._storage.learned_codec import AbstractLearnedCodec, AbstractLearner, Observation
from .._tile.step import dtype_of, StepScalars, StepStructure, TileState
from .._tile.tile import with_roots
from .interpreter.arithmetic import Arithmetic


# The elements of a sample, and how many of them lie along one group at most while other
# axes are long enough. Each fit takes other elements.
_SAMPLE, _ALONG = 16384, 32
# Steps between fits, each until which step: moments change most in the first steps.
_INTERVALS = {4: 32, 16: 128, 64: None}


def is_due(count: Int32[Array, ""]) -> Bool[Array, ""]:
    """Whether this step begins with a fit."""
    due = jnp.asarray(False)
    for interval, until in reversed(_INTERVALS.items()):
        now = count % interval == 0
        due = now if until is None else jnp.where(count <= until, now, due)
    return due


def learners(structure: StepStructure) -> dict[str, AbstractLearner]:
    """Those of the moments whose codecs learn."""
    return {
        name: codec.learner
        for name, codec in structure.codec_of.items()
        if isinstance(codec, AbstractLearnedCodec) and codec.initial is not None
    }


def observe(
    names: Sequence[str],
    structure: StepStructure,
    layout: Layout,
    scalars: StepScalars,
    old: TileState,
) -> list[Observation]:
    """A sample of each of these moments of a leaf."""
    dtype, old = dtype_of(old), memory.to_device(old)
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
    whole = with_roots(structure, moments)
    nothing = jnp.zeros(moments[next(iter(moments))].shape, dtype)

    observations = []
    for name in names:
        codec, moment = codecs[name], moments[name]
        assert isinstance(codec, AbstractLearnedCodec)

        def update(x: Array, name: str = name) -> Array:
            # A moment that is relative to this one stays: it is so to what this was
            # before it was rounded.
            known = whole | {name: with_roots(structure, moments | {name: x})[name]}
            operands = (nothing, nothing, known, scalars.rule)
            # The operations alone: functions with a `custom_vjp` have no forward
            # derivative.
            static = {"rule": structure.rule}
            return Arithmetic().trace(_update, *operands, static=static)(*operands)

        _, derivative = jax.jvp(update, (moment,), (jnp.ones_like(moment),))
        n, unit = codec.observe(elements(old.codes[name]), constants[name], dtype)
        weight = jnp.where(moment == 0, 0, (derivative * unit) ** 2)
        pad = lambda x: jnp.pad(
            x.astype(jnp.float32), (0, _SAMPLE - x.size), constant_values=-1
        )
        observations.append(Observation(pad(n), pad(weight)))
    return observations


def _update(
    grad: Shaped[Array, " sample"],
    weight: Shaped[Array, " sample"],
    moments: dict[str, Array],
    scalars: dict[str, Scalar],
    rule: AbstractRule,
) -> Shaped[Array, " sample"]:
    """The update alone, of a sample."""
    return rule.update(grad, weight, moments, scalars)[0]


def _places(layout: Layout, count: Int32[Array, ""]) -> tuple[Any, Any]:
    """Functions that take a sample of a leaf, and the scales of its elements."""
    # With the run as one axis; also that of a scalar.
    shape, group_axis = list(layout.scale_shape), layout.tile_axis
    shape[group_axis] = layout.run
    indices: list[Any] = [None] * len(shape)
    sizes = _sizes(tuple(shape), group_axis % len(shape))
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
        of_groups[group_axis] = of_groups[group_axis] // layout.group_size
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
