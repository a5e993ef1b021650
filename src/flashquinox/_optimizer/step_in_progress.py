"""A step in progress."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int32

from .._backends.dispatch import reads_host_memory, Way
from .._common import memory, meshes
from .._model.trees import Leaf, Rebuild
from .._rules.summed import Summed
from .._sharding import record
from .._sharding.state_specs import holds_whole_groups
from .._storage.layout import Layout
from .._tile.clipping import Clipping
from .._tile.step import TileState
from .._tile.stored_gradient import Gradient
from .advance import Advance
from .checksums import verified
from .device_checks import check_state_is_with_weight, warn_of_divided_groups
from .gradients import all_finite, as_typed
from .groups import LeafRule
from .packing import Packing
from .part import Part
from .passes import all_passes, layers_are_apart, Passes
from .settings import Rates, Settings
from .state_checks import check_checksum, check_correction, check_moments, check_width
from .stored_leaf import Learned, StoredLeaf
from .weight_dtypes import WeightDtypes


@dataclasses.dataclass(frozen=True)
class StepInProgress:
    """A step in progress: a model and its state, leaf by leaf.

    - `leaves`, `rebuild`: the model. Everything else that belongs to leaves goes by
        their numbers in this list.
    - `decayed`: whether weight decay applies to a leaf.
    - `shardings`: how a leaf is divided among devices, if it is.
    - `recorded`: what the state remembers of that.
    - `weight_dtypes`: what it remembers of the dtypes of weights.
    - `packing`: which of its arrays are parts of common ones.
    - `count`: the number of steps before this one. `old_count` is that of the state,
        which may be in host memory.
    - `moments`: the names of all moments of the state.
    - `rules`: the rule of a leaf.
    - `rates`: for each group, the learning rate and the weight decay of this step.
    - `stored`: what the state had, for each leaf that is trained.
    - `passes`: those of each leaf that is trained, with what is the same for leaves.
    - `new`, `learned`: what leaves that have been updated are now.
    - `totals`: what the sums are now that gradients of leaves are stored in.
    """

    call: str
    settings: Settings
    leaves: list[Leaf]
    rebuild: Rebuild
    decayed: list[bool]
    shardings: list[NamedSharding | None]
    way: Way
    recorded: record.Shardings
    weight_dtypes: WeightDtypes
    packing: Packing | None
    count: Int32[Array, ""]
    old_count: Int32[Array | np.ndarray, ""]
    moments: tuple[str, ...]
    rules: list[LeafRule]
    rates: list[Rates]
    stored: dict[int, StoredLeaf]
    passes: dict[int, Passes]
    new: dict[int, TileState] = dataclasses.field(default_factory=dict)
    learned: dict[int, Learned] = dataclasses.field(default_factory=dict)
    totals: dict[int, TileState] = dataclasses.field(default_factory=dict)

    def check(self, index: int) -> None:
        """Checks that a leaf that is trained and its state go together."""
        call, leaf, sharding = self.call, self.leaves[index], self.shardings[index]
        settings, stored = self.settings, self.stored[index]
        moments, correction, checksum = stored[:3]
        check_moments(call, leaf, moments, self.passes[index].moments, settings.storage)
        check_correction(call, leaf, correction)
        check_width(call, leaf, correction, settings.storage)
        check_checksum(call, leaf, correction, checksum, settings.verify_weights)
        if sharding is not None:
            check_state_is_with_weight(call, leaf, moments, correction, sharding)
            warn_of_divided_groups(call, leaf, moments, sharding)

    def verified(self) -> "StepInProgress":
        """The same step, which does not begin before its weights are verified: after
        `check` of all leaves that are trained."""
        verify = self.settings.verify_weights
        kept = {
            index: checksum
            for index, stored in self.stored.items()
            if (checksum := stored.checksum) is not None
        }
        if verify is None or not kept:
            return self
        on = meshes.everywhere(self.shardings)
        count = verified(
            self.call,
            verify,
            self.count,
            [self.leaves[i].name for i in kept],
            [jnp.asarray(self.leaves[i].value) for i in kept],
            memory.to_device([*kept.values()]),
            None if on is None else on.mesh,
        )
        passes = all_passes(
            self.call,
            self.settings,
            self.rates,
            count,
            self.leaves,
            self.rules,
            self.decayed,
            [*self.stored],
        )
        return dataclasses.replace(self, count=count, passes=passes)

    def read(self, index: int) -> TileState:
        """The arrays of a leaf that is trained, as they are now."""
        if index in self.new:
            return self.new[index]
        is_apart = isinstance(self.rules[index].rule, Summed)
        weight = None if is_apart else jnp.asarray(self.leaves[index].value)
        return self.stored[index].taken_apart(weight)

    def write(self, index: int, new: TileState, learned: Learned) -> None:
        self.new[index], self.learned[index] = new, learned

    def layout(self, index: int) -> Layout:
        """The groups of a leaf that is trained."""
        return self.stored[index].layout(self.leaves[index].value.shape)

    def update(
        self,
        grads: Mapping[int, Gradient],
        clip: Clipping | None,
        as_update: bool = False,
    ) -> Bool[Array, ""] | None:
        """Updates the leaves of these numbers.

        **Returns:**

        Whether all gradients were as `all_finite` says, or else nothing has changed.
        `None` if that was not asked.
        """
        shardings = [self.shardings[index] for index in grads]
        arrived = as_typed([*grads.values()], shardings)
        all_finite = self.all_finite([*grads], arrived, shardings, clip)
        of = [
            Part(i, self.read(i), grad, sharding, self.stored[i].not_learned)
            for i, grad, sharding in zip(grads, arrived, shardings, strict=True)
        ]
        advance = Advance(self, all_finite, clip, learn=True, as_update=as_update)
        for index, new in zip(grads, advance.all(of), strict=True):
            self.new[index], self.learned[index], total = new
            if total is not None:
                self.totals[index] = total
        return all_finite

    def learn(
        self, numbers: list[int], all_finite: Bool[Array, ""] | None
    ) -> list[Learned]:
        """For each of these leaves, the parameters of its codecs that learn, before
        this step and after: what `update_parts` asks of parts of them."""
        of = []
        for number in numbers:
            old, not_learned = self.read(number), self.stored[number].not_learned
            # No gradient is looked at; the weight stands for it.
            there = self.shardings[number]
            weight = jnp.asarray(self.leaves[number].value)
            of.append(Part(number, old, weight, there, not_learned))
        return Advance(self, all_finite, None, learn=True).learned(of)

    def update_parts(
        self,
        numbers: list[int],
        old: list[TileState],
        shardings: list[NamedSharding | None],
        grads: list[Array],
        learned: list[Learned],
        all_finite: Bool[Array, ""] | None,
        clip: Clipping | None,
    ) -> list[TileState]:
        """One step of parts of leaves, which need not be those of this object: only
        what does not depend on their values is. `numbers` are those of their leaves."""
        arrived = as_typed(grads, shardings)
        each = zip(numbers, old, arrived, shardings, learned, strict=True)
        advance = Advance(self, all_finite, clip, learn=False, in_loop=True)
        return [x.new for x in advance.all([Part(*x) for x in each])]

    def is_streamed(self, x: Part) -> bool:
        """Whether the state of a leaf is in host memory, and kernels do not take it
        there: they take steps of whole groups, in one pass, in codes that stay what
        they are."""
        if not memory.any_on_host(x.old):
            return False
        index = x.number
        stored, sharding = self.stored[index], self.shardings[index]
        is_whole = sharding is None or holds_whole_groups(self.layout(index), sharding)
        is_plain = is_whole and self.passes[index].between is None
        is_plain = is_plain and not stored.not_learned
        return not (is_plain and reads_host_memory(self.way))

    def layers_are_apart(self, index: int) -> bool:
        """See [`flashquinox._optimizer.passes.layers_are_apart`][]."""
        return layers_are_apart(self.call, self.rules[index].rule, self.leaves[index])

    def all_finite(
        self,
        numbers: list[int],
        grads: Sequence[Gradient],
        shardings: list[NamedSharding | None],
        clip: Clipping | None,
    ) -> Bool[Array, ""] | None:
        """Whether these gradients of the leaves of these numbers are all finite, and
        so are rates. `None` if that was not asked."""
        if not self.settings.skip_nonfinite:
            return None
        leaves = [self.leaves[i] for i in numbers]
        return all_finite(leaves, grads, shardings, clip, self.rates)
