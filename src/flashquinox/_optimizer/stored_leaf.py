"""What a state stores for a leaf of the model: taken apart once for a step, and put
together once after it."""

import math
from collections.abc import Collection
from typing import NamedTuple, TypeAlias

import jax.tree_util as jtu
from jaxtyping import Array, Float, Scalar, UInt32

from .._common import memory
from .._storage.codec import AbstractMomentCodec
from .._storage.full_precision import FULL_PRECISION
from .._storage.layout import flattened, Layout
from .._storage.quant_moment import QuantMoment, StoredMoment
from .._storage.split import Correction
from .._tile.step import TileState


# Of moments whose codecs learn, by their names: the parameter before a step and after.
Learned: TypeAlias = dict[str, tuple[Scalar, Scalar]]


class StoredLeaf(NamedTuple):
    """What a state has at a leaf that is trained.

    - `codecs`, `bases`: of each moment, its codec, and the name of the moment that it
        is stored relative to, or `None`.
    - `groups`: those of the moments; `None` without any. The state decides, not the
        options of the optimizer.
    - `not_learned`: the parameters of codecs that learn, in a step that learns nothing.
    - `is_packed`: whether all arrays are parts of common ones.
    """

    moments: dict[str, StoredMoment]
    correction: Correction | None
    checksum: UInt32[Array, ""] | None
    codecs: dict[str, AbstractMomentCodec]
    bases: dict[str, str | None]
    groups: Layout | None
    not_learned: Learned
    is_packed: bool

    @staticmethod
    def of(
        moments: dict[str, StoredMoment],
        correction: Correction | None,
        checksum: UInt32[Array, ""] | None,
        parts: Collection[int] = (),
    ) -> "StoredLeaf":
        """`parts`: the `id`s of the arrays that are parts of common ones."""
        codecs, bases, groups, not_learned = {}, {}, None, {}
        for name, moment in moments.items():
            if not isinstance(moment, QuantMoment):
                codecs[name], bases[name] = FULL_PRECISION, None
                continue
            codecs[name], bases[name] = moment.codec, moment.relative_to
            groups = groups or moment.layout
            if moment.parameter is not None:
                parameter = memory.to_device(moment.parameter)
                not_learned[name] = parameter, parameter
        arrays = jtu.tree_leaves((moments, correction))
        return StoredLeaf(
            moments,
            correction,
            checksum,
            codecs,
            bases,
            groups,
            not_learned,
            bool(parts) and all([id(x) in parts for x in arrays]),
        )

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The groups of a leaf of this shape, or of one layer of a stack."""
        if self.groups is not None:
            return self.groups.of_shape(shape)
        # Without groups, a tile is a row of all elements.
        return flattened(shape, max(1, math.prod(shape)))

    def taken_apart(self, weight: Float[Array, "..."] | None) -> TileState:
        """The arrays of the leaf."""
        codes, scales = {}, {}
        for name, moment in self.moments.items():
            quantized = isinstance(moment, QuantMoment)
            codes[name] = moment.codes if quantized else moment
            scales[name] = moment.scales if quantized else None
        return TileState(weight, self.correction, codes, scales)

    def put_together(self, new: TileState, learned: Learned) -> dict[str, StoredMoment]:
        """The moments of a new state of the leaf, stored as the old ones were."""
        moments = {}
        for name, old in self.moments.items():
            codes, scales = new.codes[name], new.scales[name]
            if not isinstance(old, QuantMoment):
                moments[name] = codes
                continue
            assert scales is not None
            _, parameter = learned.get(name, (None, None))
            if parameter is not None:
                parameter = memory.where(parameter, old.parameter)
            moments[name] = old.with_arrays(codes, scales, parameter)
        return moments
