"""What a step of a tile is made of: what is known when it is compiled, the scalars,
and the arrays."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Scalar, Shaped, UInt32

from .._common.dtypes import compute_dtype
from .._rules.rule import AbstractRule, moments_of
from .._storage.codec import AbstractMomentCodec, Dither
from .._storage.learned_codec import with_parameter
from .._storage.split import Correction
from .._storage.thresholds import rounding_threshold
from .clipping import Factors


class StepStructure(eqx.Module):
    """What of a step is known when it is compiled. Hashable, free of arrays."""

    rule: AbstractRule = eqx.field(static=True)
    # One for each moment of the rule, in its order.
    codecs: tuple[AbstractMomentCodec, ...] = eqx.field(static=True)
    # Likewise, the name of the moment to the root of which it is stored relative.
    bases: tuple[str | None, ...] = eqx.field(static=True)
    # Decoupled decay changes the weight; L2 regularization, the gradient.
    decoupled: bool = eqx.field(static=True)
    # Give the difference that an Optax caller adds to the weight, not the new weight.
    as_update: bool = eqx.field(static=True)
    # Round narrow weights, or these and their corrections, by a rotating threshold.
    dither_weights: bool = eqx.field(static=True)
    # Give the update alone, in the dtype of the weight, whose numbers are not read: the
    # first of two passes.
    as_direction: bool = eqx.field(static=True, default=False)
    # Whether leaves of one shape that are updated together have a stack: of their
    # directions, as which a first pass gives it, or of gradients that were one.
    in_stack: bool = eqx.field(static=True, default=False)
    # Whether the arrays of the state are parts of common ones: of each kind, one array
    # with those of all leaves that are stored alike, in order.
    is_packed: bool = eqx.field(static=True, default=False)
    # Whether the arrays are layers that a loop over stacks has read. These need not be
    # where stacks are, in the large memory of a device.
    in_loop: bool = eqx.field(static=True, default=False)

    @property
    def codec_of(self) -> dict[str, AbstractMomentCodec]:
        return dict(zip(moments_of(self.rule), self.codecs, strict=True))

    @property
    def base_of(self) -> dict[str, str]:
        """For each moment that is stored relative to another, the name of that."""
        names = moments_of(self.rule)
        pairs = zip(names, self.bases, strict=True)
        return {name: base for name, base in pairs if base is not None}

    def codecs_before_and_after(
        self, scalars: "StepScalars"
    ) -> tuple[dict[str, AbstractMomentCodec], dict[str, AbstractMomentCodec]]:
        """What decodes the old moments, and what encodes the new ones."""
        codecs, learned = self.codec_of, scalars.leaf.parameters
        before, after = (
            {name: with_parameter(codecs[name], x[i]) for name, x in learned.items()}
            for i in (0, 1)
        )
        return codecs | before, codecs | after

    def factors(
        self, scalars: "StepScalars"
    ) -> dict[str, tuple[Scalar | None, Scalar | None]]:
        """For each moment, the factors before and after the rule."""
        found = {}
        for name, moment in moments_of(self.rule).items():
            before, after = [
                None if scalar is None else scalars.rule[scalar]
                for scalar in (moment.before, moment.after)
            ]
            found[name] = before, after
        return found


class LeafScalars(eqx.Module):
    """What of a step is the same for all elements of a leaf, but not for all leaves."""

    # Of NumPy where it is known when a step is traced.
    number: Scalar | UInt32[np.ndarray, ""]
    # Of moments whose codec learns, by their names: its parameter before the step, by
    # which they are decoded, and after.
    parameters: dict[str, tuple[Scalar, Scalar]]


class StepScalars(eqx.Module):
    """What of a step is the same for all elements of a leaf: computed once."""

    rule: dict[str, Scalar]
    # The share of the weight that decoupled decay subtracts from it, or that L2
    # regularization adds to the gradient. None for a leaf without decay.
    decay: Scalar | None
    # Of this step, from 0.
    count: Scalar
    leaf: LeafScalars
    # Whether to take this step at all. None if that was not asked.
    take: Bool[Array, ""] | None
    # What gradients are multiplied by. None if they are not clipped.
    clip: Factors | None

    def dithers(self, structure: StepStructure) -> dict[str, Dither]:
        """What each moment is rounded by."""
        bases = structure.base_of
        return {
            name: Dither.at(self.count, self.leaf.number, moment.kind, name in bases)
            for name, moment in moments_of(structure.rule).items()
        }

    @property
    def weight_threshold(self) -> Scalar:
        return rounding_threshold(self.count, self.leaf.number)


class TileState(eqx.Module):
    """A tile of a weight, with what is stored about it."""

    # A `Float[Array, "*tile"]`, or `None` in a step that changes moments alone.
    weight: Any
    correction: Correction | None
    # Of the shape of the tile, and of its groups.
    codes: dict[str, Shaped[Array, "..."]]
    scales: dict[str, Shaped[Array, "..."] | None]

    def map(self, of_elements: Callable[[Array], Array]) -> "TileState":
        """Applies a function to every array with an entry per element of the weight:
        all but the scales."""
        weight, correction, codes = jtu.tree_map(
            of_elements, (self.weight, self.correction, self.codes)
        )
        return TileState(weight, correction, codes, self.scales)

    @property
    def is_grouped(self) -> bool:
        """Whether any moment has scales."""
        return any([x is not None for x in self.scales.values()])

    @property
    def are_of_groups(self) -> list[bool]:
        """Of each array, in the order of the tree: whether it has an entry for each
        group, and not for each element."""
        of_elements = self.weight, self.correction, self.codes
        return [
            *[False for _ in jtu.tree_leaves(of_elements)],
            *[True for _ in jtu.tree_leaves(self.scales)],
        ]


def map_arrays(
    of_elements: Callable[..., Array], of_groups: Callable[..., Array], *each: TileState
) -> TileState:
    """Applies functions to the arrays of several states that correspond: to those with
    an entry for each element, and to those with one for each group."""
    elements = [(state.weight, state.correction, state.codes) for state in each]
    weight, correction, codes = jtu.tree_map(of_elements, *elements)
    scales = jtu.tree_map(of_groups, *[state.scales for state in each])
    return TileState(weight, correction, codes, scales)


def dtype_of(tile: TileState) -> Any:
    """The dtype in which a tile is computed."""
    if tile.weight is not None:
        return compute_dtype(tile.weight.dtype)
    is_wide = any([x.dtype == jnp.float64 for x in tile.codes.values()])
    return jnp.float64 if is_wide else jnp.float32
