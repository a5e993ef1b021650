"""Which rule trains which leaf."""

import abc
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
from jaxtyping import PyTree

from .._model.trees import Leaf
from .._rules.whole_leaf import AnyRule
from .schedules import ScalarOrSchedule
from .weight_decay import WeightDecay


class Group(eqx.Module):
    """What leaves that are trained alike have in common. An argument of the group is
    called `prefix` and its name in the call that makes the optimizer."""

    rule: AnyRule
    learning_rate: ScalarOrSchedule
    decay: WeightDecay
    prefix: str = eqx.field(static=True, default="")


class LeafRule(NamedTuple):
    """The number of a leaf's group, and its rule, which may differ from that of the
    group in static fields."""

    group: int
    rule: AnyRule


class AbstractChoice(eqx.Module):
    """Assigns leaves to the groups of an optimizer that has several."""

    @abc.abstractmethod
    def __call__(
        self,
        call: str,
        params: PyTree,
        leaves: Sequence[Leaf],
        groups: tuple[Group, ...],
    ) -> list[LeafRule]:
        """For each leaf of a model, trained or not, its rule. Is called when a state is
        made and when a step is traced. It may depend on paths and shapes."""
