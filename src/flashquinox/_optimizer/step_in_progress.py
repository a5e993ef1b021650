"""A step in progress."""

import dataclasses
import itertools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int32, PyTree, ScalarLike

from .._backends.dispatch import reads_host_memory, Way
from .._common import memory, meshes
from .._common.dtypes import compute_dtype, largest_gradient
from .._model.trees import Leaf, Rebuild
from .._sharding import record, reductions
from .._sharding.state_specs import holds_whole_groups
from .._storage.layout import Layout
from .._tile.clipping import Clipping, division
from .._tile.step import TileState
from .advance import Advance, Part
from .checksums import checksums, verified
from .device_checks import check_state_is_with_weight, warn_of_divided_groups
from .groups import LeafRule
from .passes import layers_are_apart, Passes, PassMaker
from .settings import Rates, Settings
from .state import OptimizerState, StepCount
from .state_checks import check_checksum, check_correction, check_moments, check_width
from .stored_leaf import Learned, StoredLeaf


@dataclasses.dataclass(frozen=True)
class StepInProgress:
    """A step in progress: a model and its state, leaf by leaf.

    - `leaves`, `rebuild`: the model. Everything else that belongs to leaves goes by
        their numbers in this list.
    - `decayed`: whether weight decay applies to a leaf.
    - `shardings`: how a leaf is divided among devices, if it is.
    - `recorded`: what the state remembers of that.
    - `count`: the number of steps before this one. `old_count` is that of the state,
        which may be in host memory.
    - `rules`: the rule of a leaf.
    - `rates`: for each group, the learning rate and the weight decay of this step.
    - `stored`: what the state had, for each leaf that is trained.
    - `passes`: those of each leaf that is trained, with what is the same for leaves.
    - `new`, `learned`: what leaves that have been updated are now.
    """

    call: str
    settings: Settings
    leaves: list[Leaf]
    rebuild: Rebuild
    decayed: list[bool]
    shardings: list[NamedSharding | None]
    way: Way
    recorded: record.Shardings
    count: Int32[Array, ""]
    old_count: Int32[Array | np.ndarray, ""]
    rules: list[LeafRule]
    rates: list[Rates]
    stored: dict[int, StoredLeaf]
    passes: dict[int, Passes]
    new: dict[int, TileState] = dataclasses.field(default_factory=dict)
    learned: dict[int, Learned] = dataclasses.field(default_factory=dict)

    def check(self, index: int) -> None:
        """Checks that a leaf that is trained and its state go together."""
        call, leaf, sharding = self.call, self.leaves[index], self.shardings[index]
        settings, (moments, correction, checksum) = self.settings, self.stored[index]
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
            for index, (_, _, checksum) in self.stored.items()
            if checksum is not None
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
        return self.stored[index].taken_apart(self.leaves[index].value)

    def write(self, index: int, new: TileState, learned: Learned) -> None:
        self.new[index], self.learned[index] = new, learned

    def layout(self, index: int) -> Layout:
        """The groups of a leaf that is trained."""
        return self.stored[index].layout(self.leaves[index].value.shape)

    def update(
        self,
        grads: dict[int, Array],
        clip: Clipping | None,
        as_update: bool = False,
    ) -> Bool[Array, ""] | None:
        """Updates the leaves of these numbers.

        **Returns:**

        Whether all gradients were as `all_finite` says, or else nothing has changed.
        `None` if that was not asked.
        """
        shardings = [self.shardings[index] for index in grads]
        arrived = _as_typed([*grads.values()], shardings)
        all_finite = self.all_finite([*grads], arrived, shardings, clip)
        of = [
            Part(i, self.read(i), grad, sharding, self.stored[i].not_learned)
            for i, grad, sharding in zip(grads, arrived, shardings, strict=True)
        ]
        advance = Advance(self, all_finite, clip, learn=True, as_update=as_update)
        for index, new in zip(grads, advance.all(of), strict=True):
            self.write(index, *new)
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
            of.append(Part(number, old, old.weight, there, not_learned))
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
        layer: Array | None = None,
    ) -> list[TileState]:
        """One step of parts of leaves, which need not be those of this object: only
        what does not depend on their values is. `numbers` are those of their leaves.
        Arrays in host memory are those of all layers, of which `layer` is updated."""
        arrived = _as_typed(grads, shardings)
        layers = [layer if memory.any_on_host(x) else None for x in old]
        each = zip(numbers, old, arrived, shardings, learned, layers, strict=True)
        advance = Advance(self, all_finite, clip, learn=False, in_loop=True)
        return [new for new, _ in advance.all([Part(*x) for x in each])]

    def is_taken_there(
        self, index: int, shape: tuple[int, ...], sharding: NamedSharding | None
    ) -> bool:
        """Whether the step of a leaf, or of a layer of it, is one that kernels take in
        host memory: of whole groups, in one pass, in codes that stay what they are."""
        stored = self.stored[index]
        is_whole = sharding is None or holds_whole_groups(
            stored.layout(shape), sharding
        )
        is_plain = is_whole and self.passes[index].between is None
        return is_plain and not stored.not_learned and reads_host_memory(self.way)

    def layers_are_apart(self, index: int) -> bool:
        """See [`flashquinox._optimizer.passes.layers_are_apart`][]."""
        return layers_are_apart(self.call, self.rules[index].rule, self.leaves[index])

    def clip(
        self,
        grads: list[Array],
        shardings: list[NamedSharding | None],
        max_norm: ScalarLike | None,
        divisor: ScalarLike | None = None,
    ) -> Clipping | None:
        """The scaling of these gradients, divided by a number, together to at most this
        norm."""
        if not grads or (max_norm is None and divisor is None):
            return None
        if max_norm is None:
            dtypes = [compute_dtype(grad.dtype) for grad in grads]
            return division(divisor, jnp.result_type(*dtypes))  # pyright: ignore
        arrived = _as_typed(grads, shardings)
        return reductions.clip(arrived, shardings, max_norm, divisor)

    def all_finite(
        self,
        numbers: list[int],
        grads: list[Array],
        shardings: list[NamedSharding | None],
        clip: Clipping | None,
    ) -> Bool[Array, ""] | None:
        """Whether all of these gradients are finite, and so are their squares, which
        their norm tells if it is known; and the learning rate and the weight decay.
        `None` if that was not asked. `numbers` are those of their leaves.

        Nothing here depends on weights and moments: a step that is not taken leaves
        these as they are, so that no later one would be taken either.
        """
        if not self.settings.skip_nonfinite:
            return None
        limits = [largest_gradient(self.leaves[i].value.dtype) for i in numbers]
        if clip is not None and clip.norm is not None:
            finite = clip.norm.is_finite & (clip.norm.largest <= min(limits))
        else:
            arrived = _as_typed(grads, shardings)
            finite = reductions.all_within(arrived, limits, shardings)
        for rate in itertools.chain(*self.rates):
            if isinstance(rate, jax.Array):
                finite = finite & jnp.isfinite(rate)
        return finite

    def close(
        self,
        all_finite: Bool[Array, ""] | None,
        updates_of: Collection[int] | None = None,
    ) -> tuple[PyTree, OptimizerState]:
        """The new model and the new state. A step of gradients that were not all finite
        does not count. With `updates_of`, the updates of these leaves in place of the
        model, and `None` for all others."""
        count = jnp.asarray(optax.safe_increment(self.count))
        if all_finite is not None:
            count = jnp.where(all_finite, count, self.count)
        values: list[Any] = [leaf.value for leaf in self.leaves]
        moments: dict[str, list[Any]] = {
            name: [None for _ in values] for name in self.settings.moments
        }
        corrections: list[Any] = [None for _ in values]
        for index, stored in self.stored.items():
            of_leaf, corrections[index] = stored.moments, stored.correction
            if index in self.new:
                new = self.new[index]
                values[index], corrections[index] = new.weight, new.correction
                of_leaf = stored.put_together(new, self.learned[index])
            for name, moment in of_leaf.items():
                moments[name][index] = moment
        if updates_of is not None:
            values = [x if i in updates_of else None for i, x in enumerate(values)]
        return self.rebuild(values), OptimizerState(
            steps=StepCount(memory.where(count, self.old_count)),
            moments={name: self.rebuild.state(x) for name, x in moments.items()},
            corrections=self.rebuild.state(corrections),
            shardings=record.record(self.leaves, self.shardings, self.recorded),
            checksums=self._new_checksums(as_update=updates_of is not None),
        )

    def _new_checksums(self, as_update: bool) -> PyTree:
        if self.settings.verify_weights is None:
            return None
        new: list[Any] = [None for _ in self.leaves]
        for index, stored in self.stored.items():
            new[index] = stored.checksum
        changed = [i for i in sorted(self.new) if new[i] is not None]
        held = [self.new[i].weight for i in changed]
        if as_update:
            # As the caller will round them.
            held = [
                jnp.asarray(self.leaves[i].value) + update
                for i, update in zip(changed, held, strict=True)
            ]
        for index, x in zip(changed, checksums(held), strict=True):
            new[index] = memory.where(x, new[index])
        return self.rebuild.state(new)


def _as_typed(grads: list[Array], shardings: list[NamedSharding | None]) -> list[Array]:
    return [
        meshes.as_typed(grad, sharding)
        for grad, sharding in zip(grads, shardings, strict=True)
    ]


def all_passes(
    call: str,
    settings: Settings,
    rates: list[Rates],
    count: Int32[Array, ""],
    leaves: list[Leaf],
    rules: list[LeafRule],
    decayed: list[bool],
    trained: list[int],
) -> dict[int, Passes]:
    """The passes of all leaves that are trained, in the step after so many."""
    maker = PassMaker(call, settings, rates, count)
    return {
        i: maker.of_leaf(
            leaves[i], rules[i], compute_dtype(leaves[i].value.dtype), decayed[i]
        )
        for i in trained
    }
