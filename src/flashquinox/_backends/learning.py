r"""Codecs that learn: when, and of which sample of a leaf.

What is learned, and how, is the codec's: see `_storage/learned_codec.py`.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Int32, Scalar, Shaped

from .._common import memory
from .._rules.rule import AbstractRule
from .._storage.layout import Layout
from .._storage.learned_codec import AbstractLearnedCodec, AbstractLearner, Observation
from .._tile.step import dtype_of, StepScalars, StepStructure
from .._tile.tile import with_roots
from .base import grouped, kind_of, LeafStep
from .interpreter.arithmetic import Arithmetic


# The elements of a sample, and how many of them lie along one group at most while other
# axes are long enough. Each fit takes other elements.
_SAMPLE, _ALONG = 16384, 32
# Leaves whose samples are looked at together: each takes 2.3 MB meanwhile.
_LEAVES = 8
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


class Sample(eqx.Module):
    """Some elements of each moment of a leaf: codes, the scales of their groups, and
    how many there are. What follows these is zeros."""

    codes: dict[str, Shaped[Array, " sample"]]
    scales: dict[str, Shaped[Array, " sample"] | None]
    size: Int32[np.ndarray, ""] | Int32[Array, ""]

    @staticmethod
    def of(step: LeafStep) -> "Sample":
        old = memory.to_device(step.old)
        elements, groups = _places(step.layout, step.scalars.count)
        codes = {name: elements(x) for name, x in old.codes.items()}
        scales = {k: None if x is None else groups(x) for k, x in old.scales.items()}
        (size,) = {x.size for x in codes.values()}
        pad = lambda x: jnp.pad(x, (0, _SAMPLE - size))
        codes, scales = jtu.tree_map(pad, (codes, scales))
        return Sample(codes, scales, np.asarray(size, np.int32))


def errors(
    kind: type[AbstractLearner],
    names: Sequence[Sequence[str]],
    steps: Sequence[LeafStep],
) -> Shaped[Array, "moments ..."]:
    """What learners of one kind find in samples of these leaves, of the moments of each
    that have these names: one moment after another."""
    kinds = [
        (tuple(of_leaf), kind_of(x)) for of_leaf, x in zip(names, steps, strict=True)
    ]
    alike = grouped(kinds)
    found = [
        _errors_of_alike(kind, names[numbers[0]], [steps[i] for i in numbers])
        for numbers in alike
    ]
    keys = [(i, name) for numbers in alike for i in numbers for name in names[i]]
    places = {key: place for place, key in enumerate(keys)}
    wanted = [(i, name) for i, of_leaf in enumerate(names) for name in of_leaf]
    return jnp.concatenate(found)[np.array([places[key] for key in wanted])]


def _errors_of_alike(
    kind: type[AbstractLearner], names: Sequence[str], steps: Sequence[LeafStep]
) -> Shaped[Array, "moments ..."]:
    """The same of leaves of one kind: one program looks at a few of them at a time."""
    structure, dtype = steps[0].structure, dtype_of(steps[0].old)
    chosen = [learners(structure)[name] for name in names]

    def look(x: tuple[StepScalars, Sample]) -> Shaped[Array, "moments ..."]:
        scalars, sample = x
        known = [scalars.leaf.parameters[name][0] for name in names]
        observed = observe(names, structure, dtype, scalars, sample)
        return kind.errors(chosen, observed, jnp.stack(known))

    each = [(step.scalars, Sample.of(step)) for step in steps]
    stacked = jtu.tree_map(lambda *xs: jnp.stack(xs), *each)
    return jnp.concatenate(lax.map(look, stacked, batch_size=_LEAVES))


def observe(
    names: Sequence[str],
    structure: StepStructure,
    dtype: Any,
    scalars: StepScalars,
    sample: Sample,
) -> list[Observation]:
    """A sample of a leaf that computes in `dtype`, as learners of these moments take
    it."""
    factors = structure.factors(scalars)
    codecs, _ = structure.codecs_before_and_after(scalars)
    moments, constants = {}, {}
    for name, codec in codecs.items():
        constants[name] = codec.decode_constants(
            sample.scales[name], factors[name][0], dtype
        )
        moments[name] = codec.dequantize(sample.codes[name], constants[name], dtype)
    whole = with_roots(structure, moments)
    nothing = jnp.zeros(_SAMPLE, dtype)
    is_there = np.arange(_SAMPLE, dtype=np.int32) < sample.size

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
        n, unit = codec.observe(sample.codes[name], constants[name], dtype)
        weight = jnp.where(moment == 0, 0, (derivative * unit) ** 2)
        there = lambda x: jnp.where(is_there, x.astype(jnp.float32), -1)
        observations.append(Observation(there(n), there(weight)))
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
