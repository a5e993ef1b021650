"""What a state holds, by kind, and where."""

import dataclasses
from typing import Any, NamedTuple

import jax.tree_util as jtu
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from .._optimizer.ema import EMAState
from .._optimizer.states import find
from .._storage.quant_moment import QuantMoment
from .accumulated import without_sums
from .device_bytes import arrays_of_state, bytes_on_device


class Held(NamedTuple):
    """Arrays of one kind, and those of them that are in host memory."""

    arrays: list[Any]
    away: list[Any]

    @property
    def device_bytes(self) -> int:
        return bytes_on_device(self.arrays) - self.host_bytes

    @property
    def host_bytes(self) -> int:
        return bytes_on_device(self.away)


@dataclasses.dataclass(frozen=True)
class Contents:
    """- `codes`: of compressed moments, and uncompressed moments.
    - `scales`: of moments, and the parameters of codecs that learn.
    - `sums`: of gradients that are accumulated.
    - `averages`: of weights.
    - `other`: everything else, none of which is in host memory.
    """

    corrections: Held
    codes: Held
    scales: Held
    sums: Held
    averages: Held
    other: list[Any]

    @property
    def host_bytes(self) -> int:
        kinds = self.corrections, self.codes, self.scales, self.sums, self.averages
        return sum(x.host_bytes for x in kinds)


def contents(
    state: PyTree,
    average: EMAState | None,
    there: dict[Any, NamedSharding],
    away: set[tuple[Any, ...]],
) -> Contents:
    """**Arguments:**

    - `state`: the shapes of the state of an optimizer, of ours or around one or more.
    - `average`: the shapes of an average of the weights, if there is one.
    - `there`: the shardings of the weights, by their paths.
    - `away`: the paths of those whose state is in host memory.
    """
    states = find(state).values
    rest, of_sums = without_sums(state)
    of_averages: list[PyTree] = []
    counts: list[Any] = []
    if average is not None:
        of_averages = [average.weights, average.corrections]
        counts = [average.count, average.steps_seen]

    def held(trees: list[PyTree]) -> Held:
        return Held(arrays_of_state(trees, there), arrays_of_state(trees, there, away))

    moments = held([tree for x in states for tree in x.moments.values()])
    ours = find(rest)
    outside = ours.replace([None for _ in ours.values])
    return Contents(
        corrections=held([x.corrections for x in states]),
        codes=Held(_codes(moments.arrays), _codes(moments.away)),
        # What codecs learn stays on the device.
        scales=Held(_beside_codes(moments.arrays), _scales(moments.away)),
        sums=Held(*(jtu.tree_leaves(x) for x in held(of_sums))),
        averages=held(of_averages),
        other=jtu.tree_leaves([outside, counts, [x.steps for x in states]]),
    )


def _codes(moments: list[Any]) -> list[Any]:
    return [x.codes if isinstance(x, QuantMoment) else x for x in moments]


def _scales(moments: list[Any]) -> list[Any]:
    return [x.scales for x in moments if isinstance(x, QuantMoment)]


def _beside_codes(moments: list[Any]) -> list[Any]:
    compressed = [x for x in moments if isinstance(x, QuantMoment)]
    return [y for x in compressed for y in jtu.tree_leaves(x) if y is not x.codes]
