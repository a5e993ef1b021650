"""The state of an optimizer."""

from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import Array, Int32, Integer, PyTree, UInt32

from .._model.variables import without_variables
from .._sharding.record import Shardings
from .._storage.quant_moment import StoredMoment, with_bases


class StepCount(NamedTuple):
    """The number of steps taken. It is a named tuple, because `optax.tree.get(state,
    "count")` and `optax.tree.set` do not look into modules."""

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


class OptimizerState(eqx.Module):
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

    steps: StepCount
    moments: dict[str, PyTree[StoredMoment | None]]
    corrections: PyTree[Integer[Array, "..."] | None]
    # The shardings of the weights when the state was made. Static, so that they are no
    # part of a checkpoint.
    shardings: Shardings = eqx.field(static=True, default=())
    checksums: PyTree[UInt32[Array, "*ensemble"] | None] = None

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """Of a copy, or of a state that was pickled."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def count(self) -> Int32[Array, "*ensemble"]:
        """The number of steps taken."""
        return without_variables(self.steps.count)

    @property
    def stored_moments(self) -> dict[str, PyTree[StoredMoment | None]]:
        """`moments`, as they are stored: they need not know what they are relative
        to."""
        return vars(self)["moments"]


class _Moments:
    """The field `moments` of a state: what is read from it knows what it is relative
    to. So does what outside of programs JAX puts into it, and takes out in its own way:
    in programs, this would be done each time that a state is put together."""

    def __get__(self, state: OptimizerState | None, owner: Any = None) -> Any:
        fields = {} if state is None else state.__dict__
        if "moments" not in fields:
            raise AttributeError("moments")
        return with_bases(fields["moments"])

    def __set__(self, state: OptimizerState, moments: Any) -> None:
        vars(state)["moments"] = with_bases(moments, traced=False)


OptimizerState.moments = _Moments()  # pyright: ignore[reportAttributeAccessIssue]
