"""Which leaves have means over rows and columns in place of a mean square."""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
from jaxtyping import PyTree

from .._model.trained import is_float_array
from .._model.trees import Leaf
from .._rules.adafactor import Adafactor, factored_axes
from .groups import AbstractChoice, Group, LeafRule


class ByLength(AbstractChoice):
    """The first group trains leaves with two axes that are long enough, by their two
    longest axes; the second one trains all others."""

    min_dim_size_to_factor: int = eqx.field(static=True)
    factored: bool = eqx.field(static=True)

    def __call__(
        self,
        call: str,
        params: PyTree,
        leaves: Sequence[Leaf],
        groups: tuple[Group, ...],
    ) -> list[LeafRule]:
        del call, params
        factored, others = groups
        assert isinstance(factored.rule, Adafactor)
        found = []
        for leaf in leaves:
            shape = leaf.value.shape if is_float_array(leaf.value) else ()
            axes = factored_axes(shape, self.min_dim_size_to_factor)
            axes = axes if self.factored else None
            rule = dataclasses.replace(factored.rule, axes=axes)
            found.append(
                LeafRule(1, others.rule) if axes is None else LeafRule(0, rule)
            )
        return found
