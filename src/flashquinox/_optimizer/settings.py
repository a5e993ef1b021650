"""What an optimizer was built from."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Scalar, ScalarLike

from .._backends.dispatch import Backend
from .._model.trees import Leaf, match
from .._rules.rule import AbstractRule, rule_scalars
from .._sharding import record
from .._sharding.resolve import resolve_all, Resolved
from .._storage.storage import Storage
from .checksums import Verify
from .device_checks import warn_of_unknown_division
from .schedules import ScalarOrSchedule, scheduled
from .weight_decay import WeightDecay


class Settings(eqx.Module):
    """What an optimizer was built from, and what follows from it for each step."""

    call: str = eqx.field(static=True)
    rule: AbstractRule
    learning_rate: ScalarOrSchedule
    decay: WeightDecay
    storage: Storage = eqx.field(static=True)
    skip_nonfinite: bool = eqx.field(static=True)
    verify_weights: Verify = eqx.field(static=True)
    backend: Backend = eqx.field(static=True)
    # As leaves and their structure, which have a hash.
    shardings: tuple[tuple[NamedSharding, ...], Any] = eqx.field(static=True)

    def rates(self, count: Scalar) -> tuple[ScalarLike, ScalarLike]:
        """The learning rate and the weight decay after so many steps."""
        return (
            scheduled(self.call, "learning_rate", self.learning_rate, count),
            scheduled(self.call, "weight_decay", self.decay.rate, count),
        )

    def scalars(
        self, rates: tuple[ScalarLike, ScalarLike], count: Scalar, dtype: DTypeLike
    ) -> tuple[dict[str, Scalar], Scalar | None]:
        """The rule's scalars and the scalar of weight decay, in the precision
        `dtype`."""
        learning_rate = jnp.asarray(rates[0], dtype)
        # The last count is taken again and again, as by Optax. It is computed apart
        # from the count of the next state. A GPU computes what both share in a kernel
        # of its own, after a copy: 3% of a step of 4096 x 4096 weights (H100).
        number = jnp.minimum(count, jnp.iinfo(count.dtype).max - 1) + 1
        rule = rule_scalars(self.rule, number, learning_rate, dtype)
        return rule, self.decay.scalar(rates[1], learning_rate, dtype)

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
