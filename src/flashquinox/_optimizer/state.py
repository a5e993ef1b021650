"""The state of an optimizer."""

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.tree_util as jtu
from jaxtyping import Array, Int32, Integer, PyTree, UInt32

from .._model.variables import without_variables
from .._sharding.record import Shardings
from .._storage.moment_bases import Bases
from .._storage.quant_moment import StoredMoment
from .packing import FIELDS, Packing, Trees
from .weight_dtypes import WeightDtypes


class StepCount(NamedTuple):
    """The number of steps taken. It is a named tuple, because `optax.tree.get(state,
    "count")` and `optax.tree.set` do not look into modules."""

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


class _Form:
    """What a state is beside its arrays. All states that a program returns share the
    object of its trace, so that comparing two ends at once.

    `bases` is no part of it: what was found of the structure of such states."""

    __slots__ = ("bases", "packing", "shardings", "weight_dtypes")

    def __init__(
        self, shardings: Shardings, weight_dtypes: WeightDtypes, packing: Packing | None
    ):
        self.shardings = shardings
        self.weight_dtypes = weight_dtypes
        self.packing = packing
        self.bases = Bases()

    def opened(self, children: Sequence[Any]) -> Trees:
        """The trees of a state that has these children after its count."""
        if self.packing is not None:
            children = self.packing.unpacked(children)
        moments, corrections, checksums = children
        return self.bases.known(moments), corrections, checksums

    def _static(self) -> tuple[Shardings, WeightDtypes, Packing | None]:
        return self.shardings, self.weight_dtypes, self.packing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Form) and self._static() == other._static()

    def __hash__(self) -> int:
        return hash(self._static())

    def __repr__(self) -> str:
        text = f"shardings={self.shardings!r}, weight_dtypes={self.weight_dtypes!r}"
        return text if self.packing is None else f"{text}, packing={self.packing!r}"

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return _Form, self._static()


class _Stored:
    """What a state holds, in the slots that JAX takes apart and puts together: the
    count, and its trees, or the arrays that these are packed into, which are opened
    where somebody asks for the trees."""

    __slots__ = ("__weakref__", "_children", "_form", "_opened")

    _children: tuple[Any, ...]
    _form: _Form
    _opened: Trees

    def _hold(self, form: _Form, children: tuple[Any, ...]) -> None:
        self._form = form
        if form.packing is None:
            self._opened = form.opened(children[1:])
            children = children[0], *self._opened
        self._children = children

    @property
    def _trees(self) -> Trees:
        if hasattr(self, "_opened"):
            return self._opened
        trees = self._form.opened(self._children[1:])
        # Another program may ask the same object, as one that it closes over.
        if not any([isinstance(x, jax.core.Tracer) for x in jtu.tree_leaves(trees)]):
            self._opened = trees
        return trees

    steps = property(lambda self: self._children[0])
    # They know what they are relative to in this state.
    moments = property(lambda self: self._trees[0])
    corrections = property(lambda self: self._trees[1])
    checksums = property(lambda self: self._trees[2])
    shardings = property(lambda self: self._form.shardings)
    weight_dtypes = property(lambda self: self._form.weight_dtypes)
    packing = property(lambda self: self._form.packing)


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
    # Which small arrays are parts of common ones, if any are.
    packing: Packing | None = dataclasses.field(metadata={"static": True}, repr=False)

    def __init__(
        self,
        steps: StepCount,
        moments: dict[str, PyTree[StoredMoment | None]],
        corrections: PyTree[Integer[Array, "..."] | None],
        shardings: Shardings = (),
        checksums: PyTree[UInt32[Array, "*ensemble"] | None] = None,
        weight_dtypes: WeightDtypes = (),
        packing: Packing | None = None,
    ):
        form = _Form(shardings, weight_dtypes, packing)
        _fill(self, form, steps, (moments, corrections, checksums))

    def parts(self) -> list[Any]:
        """The arrays of the trees that are parts of others."""
        packing = self._form.packing
        return [] if packing is None else packing.parts(self._trees)

    @property
    def count(self) -> Int32[Array, "*ensemble"]:
        """The number of steps taken."""
        return without_variables(self.steps.count)

    def __eq__(self, other: object) -> Any:
        return eqx.tree_equal(self, other)

    def __repr__(self) -> str:
        return eqx.tree_pformat(self)

    def __getstate__(self) -> tuple[_Form, tuple[Any, ...]]:
        return self._form, self._children

    def __setstate__(self, stored: tuple[_Form, tuple[Any, ...]] | dict[str, Any]):
        """Of a copy, or of a state that was pickled. Earlier versions pickled its
        fields."""
        if isinstance(stored, dict):
            self.__init__(**stored)
        else:
            self._hold(*stored)


def _fill(state: OptimizerState, form: _Form, steps: Any, trees: Trees) -> None:
    arrays: tuple[Any, ...] = trees
    if form.packing is not None:
        members = len(getattr(getattr(steps, "count", None), "shape", ()))
        packing, arrays = form.packing.packed(trees, members)
        form = _Form(form.shardings, form.weight_dtypes, packing)
    state._hold(form, (steps, *arrays))


def opened(state: OptimizerState) -> OptimizerState:
    """The same state, whose trees have the same arrays whenever they are asked for: for
    use within one program."""
    new = object.__new__(OptimizerState)
    new._form, new._children = state._form, state._children
    new._opened = state._trees
    return new


def with_fields(
    state: OptimizerState, packing: Packing | None, **fields: Any
) -> OptimizerState:
    """The state with these fields, which can be anything, packed like this."""
    steps, *trees = [fields.get(x, getattr(state, x)) for x in ("steps", *FIELDS)]
    new = object.__new__(OptimizerState)
    form = _Form(state.shardings, state.weight_dtypes, packing)
    _fill(new, form, steps, tuple(trees))  # pyright: ignore[reportArgumentType]
    return new


# Takes a state apart without a frame of Python.
_flatten = operator.attrgetter("_children", "_form")


def _flatten_with_keys(state: OptimizerState) -> tuple[tuple[Any, ...], _Form]:
    children, form = _flatten(state)
    names = "steps", *(FIELDS if form.packing is None else form.packing.names)
    return tuple(zip(map(jtu.GetAttrKey, names), children, strict=True)), form


def _unflatten(form: _Form, children: Iterable[Any]) -> OptimizerState:
    state = object.__new__(OptimizerState)
    state._hold(form, tuple(children))
    return state


jtu.register_pytree_with_keys(OptimizerState, _flatten_with_keys, _unflatten, _flatten)
