"""Codecs with a parameter that follows the moment that they store.

A backend takes a sample of the leaf every few steps, and a learner moves the parameter
to where the error of what is stored is smallest. What counts is what that error does to
the next update, to first order: it is multiplied by the derivative of the rule by this
moment.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Scalar, Shaped

from .codec import AbstractMomentCodec, GroupConstants


class Observation(NamedTuple):
    """A sample of a moment, in units of its groups. Where a leaf has fewer elements
    than a sample, both are negative."""

    # What codes stand for on the curve.

    n: Float32[Array, "*moments sample"]
    # The square of what an error of the moment, in that unit, does to an update.
    weight: Float32[Array, "*moments sample"]


class AbstractLearner(eqx.Module):
    """How the parameter of a codec follows its moment. Static, with a hash: one for
    each moment that is stored so. All moments whose learners are of one class are
    fitted together, of all leaves of a mesh."""

    @staticmethod
    @abc.abstractmethod
    def errors(
        learners: Sequence[Any],
        observations: Sequence[Observation],
        parameters: Float32[Array, " moments"],
    ) -> Float32[Array, "moments ..."]:
        """Is called when a fit is due, on each device that has parts of the leaves,
        with samples of these parts.

        **Arguments:**

        - `learners`: those of the moments, in this order.
        - `observations`: the samples.
        - `parameters`: what the moments were encoded with.

        **Returns:**

        What `follow` needs to know: numbers that are added over devices.
        """

    @staticmethod
    @abc.abstractmethod
    def follow(
        parameters: Float32[Array, " moments"], errors: Float32[Array, "moments ..."]
    ) -> Float32[Array, " moments"]:
        """Is called after `errors`, with the sums over all devices: the new
        parameters."""


class AbstractLearnedCodec(AbstractMomentCodec):
    """A codec that may have a parameter. Each moment of each leaf has its own, which
    the state keeps (see [`flashquinox.QuantMoment`][])."""

    @property
    @abc.abstractmethod
    def initial(self) -> float | None:
        """Where the parameter begins. Asked when a state is made. `None` for a codec of
        this class that does not learn."""

    @property
    @abc.abstractmethod
    def learner(self) -> AbstractLearner:
        """How the parameter follows. Asked when a step is traced."""

    @abc.abstractmethod
    def with_parameter(self, parameter: Scalar) -> "AbstractLearnedCodec":
        """Is called in each step, before anything is decoded or encoded: the codec with
        this parameter, which is traced."""

    @abc.abstractmethod
    def observe(
        self,
        codes: Shaped[Array, "*sample"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> tuple[Float[Array, "*sample"], Float[Array, "*sample"]]:
        """Is called when a fit is due, for a sample of the codes. `decode_constants`
        has an entry for each of them.

        **Returns:**

        A 2-tuple of the `n` of the [`Observation`][], and of the unit of the group.
        """


def initial_parameter(codec: AbstractMomentCodec) -> float | None:
    """Where the parameter of a codec begins. `None` for a codec that does not learn."""
    return codec.initial if isinstance(codec, AbstractLearnedCodec) else None


def with_parameter(
    codec: AbstractMomentCodec, parameter: Scalar | None
) -> AbstractMomentCodec:
    """The codec with this parameter; `None` is that of a codec that does not learn."""
    if parameter is None:
        return codec
    assert isinstance(codec, AbstractLearnedCodec)
    return codec.with_parameter(parameter)
