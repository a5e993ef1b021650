"""Sums of gradients as gradients."""

import dataclasses
from collections.abc import Collection
from typing import Any, TypeAlias

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._backends.dispatch import reads_host_memory
from .._common import memory
from .._model.trees import flatten, Leaf, match, Rebuild
from .._sharding import record
from .._storage.quant_moment import QuantMoment
from .._storage.split import decode_weight
from .._storage.tapered_read import TaperedReader
from .._tile.stored_gradient import StoredGradient
from .accumulation_state import reading_settings
from .engine import StepEngine
from .settings import Settings
from .state import OptimizerState, StepCount


# A sum, as it is stored, and its correction, if it has one.
Sum: TypeAlias = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class SumReader:
    """Makes gradients of sums. Where these are bfloat16, they are the ones nearest to
    the sums. On the device, they are in the memory of the sums, and those of sums in 16
    bits are the bits of such numbers.

    - `adding`: the settings of the optimizer that adds.
    - `leaves`, `rebuild`: the model.
    - `dtypes`: of leaves that have gradients, the dtypes of these.
    """

    call: str
    adding: Settings
    leaves: list[Leaf]
    rebuild: Rebuild
    dtypes: dict[int, Any]
    shardings: record.Shardings

    def read(
        self, model: PyTree, sums: dict[int, Sum]
    ) -> tuple[dict[int, Sum], dict[int, Array]]:
        """What has been read of these sums, which are on the device, in their place;
        and the gradients. `model` has the weights as they are now."""
        in_place = {
            i: x
            for i, (x, _) in sums.items()
            if isinstance(x, QuantMoment) and self.dtypes[i] == jnp.bfloat16
        }
        read = self._in_place(model, in_place)
        there: dict[int, Sum] = {}
        grads: dict[int, Array] = {}
        for i, (total, correction) in sums.items():
            there[i] = read.get(i, total), correction
            if i in read:
                grads[i] = read[i].codes
            elif isinstance(total, QuantMoment):
                grads[i] = total.decode_stored()
            elif total.dtype == self.dtypes[i]:
                # Of bfloat16 gradients, the correction is not looked at.
                grads[i] = total
            else:
                grads[i] = decode_weight(total, correction)
        return there, grads

    def stored(
        self, sums: dict[int, Sum], kept: Collection[int]
    ) -> dict[int, StoredGradient]:
        """Those of these sums that are in host memory, as gradients. `kept` are those
        that stay as they are."""
        return {
            i: StoredGradient.of(total, correction, self.dtypes[i], i in kept)
            for i, (total, correction) in sums.items()
            if memory.any_on_host((total, correction))
        }

    def by_kernels(self, sums: dict[int, Sum]) -> list[int]:
        """Which of these sums are in host memory where kernels take them."""
        trained = [i in self.dtypes for i in range(len(self.leaves))]
        found, unknown = self.adding.resolve_shardings(
            self.call, self.leaves, trained, self.shardings
        )
        if unknown or not reads_host_memory(self.adding.backend):
            return []
        return [
            i
            for i, x in sums.items()
            if found[i] is None and all(memory.are_on_host(jtu.tree_leaves(x)))
        ]

    def _in_place(
        self, model: PyTree, sums: dict[int, QuantMoment]
    ) -> dict[int, QuantMoment]:
        """Sums whose codes are the bits of bfloat16 numbers: of a step that changes
        nothing, by a codec that encodes them so. It has the kernels and the shardings
        of other steps."""
        if not sums:
            return {}
        moments: list[Any] = [None for _ in self.leaves]
        grads: list[Any] = [None for _ in self.leaves]
        now, _ = flatten(model)
        for i, x in sums.items():
            moments[i] = dataclasses.replace(x, codec=TaperedReader())
            # Which nobody reads.
            grads[i] = jnp.asarray(now[i].value)
        nothing: list[Any] = [None for _ in self.leaves]
        _, state = StepEngine(reading_settings(self.adding)).advance(
            "step",
            model,
            OptimizerState(
                steps=StepCount(jnp.zeros((), jnp.int32)),
                moments={"sum": self.rebuild.state(moments)},
                corrections=self.rebuild.state(nothing),
                shardings=self.shardings,
            ),
            self.rebuild.state(grads),
        )
        read = match(self.call, "state.sums", state.moments["sum"], self.leaves)
        return {i: dataclasses.replace(read[i], codec=x.codec) for i, x in sums.items()}
