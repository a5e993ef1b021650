"""What an optimizer was built from."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import PyTree, Scalar, ScalarLike

from .._backends.dispatch import Backend
from .._model.trees import Leaf, match
from .._rules.rule import AbstractRule, rule_scalars
from .._sharding import record
from .._sharding.resolve import resolve_all, Resolved
from .._storage.storage import Storage
from .checksums import Verify
from .device_checks import warn_of_unknown_division
from .groups import AbstractChoice, Group, LeafRule
from .mask import decayed
from .options import StateMemory
from .schedules import scheduled


# The learning rate and the weight decay of a group.
Rates = tuple[ScalarLike, ScalarLike]


class Settings(eqx.Module):
    """What an optimizer was built from, and what follows from it for each step."""

    call: str = eqx.field(static=True)
    groups: tuple[Group, ...]
    # `None` if there is one group.
    choice: AbstractChoice | None
    storage: Storage = eqx.field(static=True)
    skip_nonfinite: bool = eqx.field(static=True)
    verify_weights: Verify = eqx.field(static=True)
    backend: Backend = eqx.field(static=True)
    # As leaves and their structure, which have a hash.
    shardings: tuple[tuple[NamedSharding, ...], Any] = eqx.field(static=True)
    state_memory: StateMemory = eqx.field(static=True)

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the moments of all groups."""
        names = [name for group in self.groups for name in group.rule.moments]
        return tuple(dict.fromkeys(names))

    def rules(
        self, call: str, params: PyTree, leaves: Sequence[Leaf]
    ) -> list[LeafRule]:
        """For each leaf, trained or not, its rule."""
        if self.choice is None:
            return [LeafRule(0, self.groups[0].rule) for _ in leaves]
        return self.choice(call, params, leaves, self.groups)

    def decayed(
        self, call: str, params: PyTree, leaves: list[Leaf], rules: Sequence[LeafRule]
    ) -> list[bool]:
        """For each leaf, whether weight decay applies to it."""
        found = [
            decayed(call, x.decay.mask, params, leaves, x.decay.mask_name)
            for x in self.groups
        ]
        return [found[rule.group][i] for i, rule in enumerate(rules)]

    def rates(self, count: Scalar) -> list[Rates]:
        """For each group, the learning rate and the weight decay after so many
        steps."""
        return [
            (
                scheduled(
                    self.call, f"{x.prefix}learning_rate", x.learning_rate, count
                ),
                scheduled(
                    self.call, f"{x.prefix}{x.decay.rate_name}", x.decay.rate, count
                ),
            )
            for x in self.groups
        ]

    def scalars(
        self, rule: AbstractRule, learning_rate: Any, count: Scalar, dtype: DTypeLike
    ) -> dict[str, Scalar]:
        """The scalars of a rule in the step after so many, in the precision `dtype`."""
        rate = jnp.asarray(learning_rate, dtype)
        return rule_scalars(rule, self.number(count), rate, dtype)

    def number(self, count: Scalar) -> Scalar:
        """The number of the step after so many, from 1."""
        # The last count is taken again and again, as by Optax. It is computed apart
        # from the count of the next state. A GPU computes what both share in a kernel
        # of its own, after a copy: 3% of a step of 4096 x 4096 weights (H100).
        return jnp.minimum(count, jnp.iinfo(count.dtype).max - 1) + 1

    def decay_scalar(self, group: int, rates: Rates, dtype: DTypeLike) -> Scalar | None:
        """The scalar of a group's weight decay, in the precision `dtype`."""
        learning_rate = jnp.asarray(rates[0], dtype)
        return self.groups[group].decay.scalar(rates[1], learning_rate, dtype)

    def resolve_shardings(
        self,
        call: str,
        leaves: list[Leaf],
        trained: list[bool],
        recorded: record.Shardings,
    ) -> Resolved:
        """For each leaf, how it is divided among devices; `None` for those that are not
        trained."""
        values, structure = self.shardings
        tree = jtu.tree_unflatten(structure, values)
        given = match(call, "shardings", tree, leaves, prefix=True)
        found = resolve_all(
            call,
            [
                leaf if is_trained else None
                for leaf, is_trained in zip(leaves, trained, strict=True)
            ],
            given,
            recorded,
        )
        warn_of_unknown_division(call, found.unknown)
        return found
