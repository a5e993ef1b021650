"""The state of an optimizer."""

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, Int32, Integer, PyTree, UInt32

from .._model.variables import without_variables
from .._sharding.record import Shardings
from .._storage.moment_bases import Bases
from .._storage.quant_moment import StoredMoment
from .weight_dtypes import WeightDtypes


class StepCount(NamedTuple):
    """The number of steps taken. It is a named tuple, because `optax.tree.get(state,
    "count")` and `optax.tree.set` do not look into modules."""

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


class _Form:
    """What a state is beside its arrays. All states that a program returns share the
    object of its trace, so that comparing two ends at once.

    `bases` is no part of it: what was found of the structure of such states."""

    __slots__ = ("bases", "shardings", "weight_dtypes")

    def __init__(self, shardings: Shardings, weight_dtypes: WeightDtypes):
        self.shardings = shardings
        self.weight_dtypes = weight_dtypes
        self.bases = Bases()

    def _static(self) -> tuple[Shardings, WeightDtypes]:
        return self.shardings, self.weight_dtypes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Form) and self._static() == other._static()

    def __hash__(self) -> int:
        return hash(self._static())

    def __repr__(self) -> str:
        return f"shardings={self.shardings!r}, weight_dtypes={self.weight_dtypes!r}"

    def __reduce__(self) -> tuple[type, tuple[Shardings, WeightDtypes]]:
        return _Form, self._static()


class _Stored:
    """What a state holds, in the slots that JAX takes apart and puts together."""

    __slots__ = ("__weakref__", "_form", "_trees")

    _trees: tuple[Any, Any, Any, Any]
    _form: _Form

    steps = property(lambda self: self._trees[0])
    # They know what they are relative to in this state.
    moments = property(lambda self: self._trees[1])
    corrections = property(lambda self: self._trees[2])
    checksums = property(lambda self: self._trees[3])
    shardings = property(lambda self: self._form.shardings)
    weight_dtypes = property(lambda self: self._form.weight_dtypes)


# No `eqx.Module`, for the reason that `QuantMoment` is none.
@dataclasses.dataclass(init=False, eq=False, repr=False)
class OptimizerState(_Stored):
    """What an optimizer keeps between steps. Fields other than `steps` hold trees of
    the structure of the model, with `None` for leaves that are not trained.

    - `steps.count`, or `count` for short: the number of steps taken.
    - `moments`: for each moment of the rule, by its name: `QuantMoment`s, or plain
        arrays if moments are uncompressed.
    - `corrections`: for each weight that is narrower than its master weight, the
        integer correction: see [`flashquinox.ECCWeight`][].
    - `checksums`: with `verify_weights`, for each weight with a correction, a number
        that tells whether it is the weight that the correction belongs to. Otherwise
        `None`.
    """

    __slots__ = ()

    # Fields without a default, whose properties are those of `_Stored`.
    steps: StepCount = dataclasses.field()
    moments: dict[str, PyTree[StoredMoment | None]] = dataclasses.field()
    corrections: PyTree[Integer[Array, "..."] | None] = dataclasses.field()
    # The shardings of the weights when the state was made. Static, so that they are no
    # part of a checkpoint.
    shardings: Shardings = dataclasses.field(metadata={"static": True})
    checksums: PyTree[UInt32[Array, "*ensemble"] | None] = dataclasses.field()
    # What the corrections were made for.
    weight_dtypes: WeightDtypes = dataclasses.field(metadata={"static": True})

    def __init__(
        self,
        steps: StepCount,
        moments: dict[str, PyTree[StoredMoment | None]],
        corrections: PyTree[Integer[Array, "..."] | None],
        shardings: Shardings = (),
        checksums: PyTree[UInt32[Array, "*ensemble"] | None] = None,
        weight_dtypes: WeightDtypes = (),
    ):
        self._form = _Form(shardings, weight_dtypes)
        moments = self._form.bases.known(moments)
        self._trees = steps, moments, corrections, checksums

    @property
    def count(self) -> Int32[Array, "*ensemble"]:
        """The number of steps taken."""
        return without_variables(self.steps.count)

    def __eq__(self, other: object) -> Any:
        return eqx.tree_equal(self, other)

    def __repr__(self) -> str:
        return eqx.tree_pformat(self)

    def __getstate__(self) -> dict[str, Any]:
        return {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """Of a copy, or of a state that was pickled."""
        self.__init__(**fields)


_KEYS = tuple(map(jtu.GetAttrKey, ("steps", "moments", "corrections", "checksums")))
# Takes a state apart without a frame of Python.
_flatten = operator.attrgetter("_trees", "_form")


def _flatten_with_keys(state: OptimizerState) -> tuple[tuple[Any, ...], _Form]:
    trees, form = _flatten(state)
    return tuple(zip(_KEYS, trees, strict=True)), form


def _unflatten(form: _Form, trees: Iterable[Any]) -> OptimizerState:
    state = object.__new__(OptimizerState)
    steps, moments, corrections, checksums = trees
    state._trees = steps, form.bases.known(moments), corrections, checksums
    state._form = form
    return state


jtu.register_pytree_with_keys(OptimizerState, _flatten_with_keys, _unflatten, _flatten)
