"""A step of one optimizer, or of several that each train a group of the leaves, as
`optax.partition` divides a model."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, PyTree, ScalarLike

from .._backends.dispatch import reads_host_memory
from .._common import memory
from .._common.text import shown
from .._model.trees import flatten, is_within, Leaf
from .._optimizer.close_step import close_step
from .._optimizer.device_checks import warn_of_parts
from .._optimizer.gradients import clipping
from .._optimizer.open_step import open_step
from .._optimizer.optimizer import Optimizer, settings_of
from .._optimizer.settings import Settings
from .._optimizer.state import OptimizerState
from .._optimizer.state_checks import check_has_one_state, check_not_in_two_states
from .._optimizer.states import find
from .._optimizer.step_in_progress import StepInProgress
from .._optimizer.stored_leaf import Learned
from .._storage.layout import Layout
from .._tile.clipping import Clipping
from .._tile.step import TileState
from .checks import check_sums_no_gradients


# For each group, whether its gradients and its learning rate are all finite. `None`
# without `skip_nonfinite`.
AllFinite = list[Bool[Array, ""] | None]


@dataclasses.dataclass(frozen=True)
class GroupedStep:
    """The steps of all groups, in progress.

    - `leaves`, `rebuild`: the model. Methods take the numbers of leaves in this list.
    - `owners`: for each leaf that is trained, its group and its number in that group,
        on which the dithering of codecs depends.
    - `replace`: a function from the new state of each group to the state of all.
    - `updated`: for each group, whether its leaves were updated, each time that some
        may have been.
    """

    leaves: list[Leaf]
    rebuild: Callable[[list[Any]], PyTree]
    groups: list[StepInProgress]
    owners: dict[int, tuple[int, int]]
    replace: Callable[[list[OptimizerState]], PyTree]
    updated: list[list[Bool[Array, ""]]]

    def verified(self) -> "GroupedStep":
        return dataclasses.replace(self, groups=[x.verified() for x in self.groups])

    def check(self, number: int) -> None:
        group, index = self.owners[number]
        self.groups[group].check(index)

    def sharding(self, number: int) -> NamedSharding | None:
        group, index = self.owners[number]
        return self.groups[group].shardings[index]

    def read(self, number: int) -> TileState:
        group, index = self.owners[number]
        return self.groups[group].read(index)

    def write(self, number: int, new: TileState, learned: Learned) -> None:
        group, index = self.owners[number]
        self.groups[group].write(index, new, learned)

    def read_updated(
        self, numbers: Iterable[int]
    ) -> dict[int, tuple[TileState, Learned]]:
        """Leaves that have been updated, as `write` takes them."""
        found = {}
        for number in numbers:
            group, index = self.owners[number]
            step = self.groups[group]
            found[number] = step.new[index], step.learned[index]
        return found

    def layout(self, number: int) -> Layout:
        group, index = self.owners[number]
        return self.groups[group].layout(index)

    def counts_for_copies(self) -> list[Array]:
        """The count of each group in host memory, where copies by engines have to be
        kept out of CUDA graphs: see `host_layers.py`. Elsewhere, nothing."""
        if not any([reads_host_memory(group.way) for group in self.groups]):
            return []
        # Not the arrays of the state, which may stay where they are.
        counts = lax.optimization_barrier([group.count for group in self.groups])
        return memory.to_host(counts)

    def with_counts(self, counts: list[Array]) -> "GroupedStep":
        """The same step, with these for its counts, if there are any."""
        if not counts:
            return self
        groups = [
            dataclasses.replace(group, count=count)
            for group, count in zip(self.groups, counts, strict=True)
        ]
        return dataclasses.replace(self, groups=groups)

    def layers_are_apart(self, number: int) -> bool:
        group, index = self.owners[number]
        return self.groups[group].layers_are_apart(index)

    def update(self, grads: dict[int, Array], max_norm: ScalarLike | None) -> None:
        """Updates the leaves that `grads` has, after scaling these gradients to at most
        `max_norm` together, if that is given."""
        shardings = {number: self.sharding(number) for number in grads}
        clip = self.clip(grads, shardings, max_norm)
        for group, numbers in self._divided([*grads]).items():
            own = {self.owners[number][1]: grads[number] for number in numbers}
            self.count(group, self.groups[group].update(own, clip))

    def count(self, group: int, all_finite: Bool[Array, ""] | None) -> None:
        """Notes whether leaves of a group were updated: only finite gradients do so."""
        if all_finite is not None:
            self.updated[group].append(all_finite)

    def clip(
        self,
        grads: dict[int, Array],
        shardings: dict[int, NamedSharding | None],
        max_norm: ScalarLike | None,
    ) -> Clipping | None:
        """The scaling of gradients of all groups to at most this norm together."""
        there = [shardings[number] for number in grads]
        if max_norm is not None:
            of = [self.leaves[number] for number in grads]
            recorded = tuple(x for group in self.groups for x in group.recorded)
            what = "`max_norm` is for the norm"
            warn_of_parts("release_step", of, what, recorded)
        return clipping([*grads.values()], there, max_norm)

    def all_finite(
        self,
        grads: dict[int, Array],
        shardings: dict[int, NamedSharding | None],
        clip: Clipping | None,
    ) -> AllFinite:
        """For each group, whether these gradients of it are all finite."""
        found: AllFinite = [None for _ in self.groups]
        for group, numbers in self._divided([*grads]).items():
            found[group] = self.groups[group].all_finite(
                [self.owners[number][1] for number in numbers],
                [grads[number] for number in numbers],
                [shardings[number] for number in numbers],
                clip,
            )
        return found

    def learn(
        self, numbers: list[int], finite: Callable[[], Bool[Array, ""]]
    ) -> dict[int, Learned]:
        """The new parameters of codecs that learn. `finite` gives whether any part of
        this step will be taken; it is only called with `skip_nonfinite`."""
        learned = {}
        for group, here in self._divided(numbers).items():
            step = self.groups[group]
            all_finite = finite() if step.settings.skip_nonfinite else None
            found = step.learn([self.owners[number][1] for number in here], all_finite)
            learned.update(zip(here, found, strict=True))
        return learned

    def update_parts(
        self,
        parts: dict[int, TileState],
        shardings: dict[int, NamedSharding | None],
        grads: dict[int, Array],
        learned: dict[int, Learned],
        finite: AllFinite,
        clip: Clipping | None,
    ) -> dict[int, TileState]:
        """Updates parts of leaves on the device, such as single layers of stacks."""
        new = {}
        for group, numbers in self._divided([*parts]).items():
            updated = self.groups[group].update_parts(
                [self.owners[number][1] for number in numbers],
                [parts[number] for number in numbers],
                [shardings[number] for number in numbers],
                [grads[number] for number in numbers],
                [learned[number] for number in numbers],
                finite[group],
                clip,
            )
            new.update(zip(numbers, updated, strict=True))
        return new

    def close(self) -> tuple[PyTree, PyTree]:
        """The new model, and the new state in the structure of the old."""
        states = []
        for group, updated in zip(self.groups, self.updated, strict=True):
            all_finite = None
            if group.settings.skip_nonfinite:
                all_finite = (
                    jnp.any(jnp.stack(updated)) if updated else jnp.asarray(True)
                )
            states.append(close_step(group, all_finite)[1])
        values = [leaf.value for leaf in self.leaves]
        for number in self.owners:
            values[number] = self.read(number).weight
        return self.rebuild(values), self.replace(states)

    def _divided(self, numbers: list[int]) -> dict[int, list[int]]:
        """The numbers of these leaves by the groups that train them."""
        divided: dict[int, list[int]] = {}
        for number in numbers:
            divided.setdefault(self.owners[number][0], []).append(number)
        return divided


def check_optimizers(call: str, optim: Any) -> None:
    if isinstance(optim, Mapping):
        for label, one in optim.items():
            _settings(call, f"optim[{label!r}]", one)
    else:
        _settings(call, "optim", optim)


def open_groups(call: str, optim: Any, model: PyTree, state: PyTree) -> GroupedStep:
    """Begins a step: takes apart a model and the state of its optimizers."""
    leaves, rebuild = flatten(model)
    if isinstance(optim, Mapping):
        settings, states, replace = _of_partition(call, optim, state)
        masked = [_masked(x) for x in states]
    else:
        settings = [_settings(call, "optim", optim)]
        states, replace = [state], lambda new: new[0]
        masked = [set()]
    groups, owners = [], {}
    for group, of_group in enumerate(settings):
        # Codecs dither by the numbers that leaves have in a group, which must be those
        # that they have in the tree that `optax.partition` passes on.
        hidden = lambda leaf, group=group: is_within(leaf.unwrapped, masked[group])
        own = rebuild(
            [optax.MaskedNode() if hidden(leaf) else leaf.value for leaf in leaves]
        )
        opened = open_step(of_group, call, own, states[group])
        numbers = {leaf.unwrapped: i for i, leaf in enumerate(leaves)}
        for index, leaf in enumerate(opened.leaves):
            if index in opened.stored:
                number = numbers[leaf.unwrapped]
                owner, _ = owners.get(number, (None, None))
                check_not_in_two_states(call, leaf, owner)
                owners[number] = group, index
        groups.append(opened)
    updated = [[] for _ in groups]
    return GroupedStep(
        leaves, rebuild, groups, dict(sorted(owners.items())), replace, updated
    )


def _of_partition(
    call: str, optim: Mapping[Any, Any], state: Any
) -> tuple[list[Settings], list[OptimizerState], Callable[[list[Any]], PyTree]]:
    """For each group, the engine of its optimizer and its state; and a function from
    new states to that of `optax.partition`."""
    if not isinstance(state, optax.PartitionState):
        raise TypeError(
            f"`{call}`: several optimizers take the state of `optax.partition`; got a "
            f"{type(state).__name__}. Pass what "
            "`optax.partition(optimizers, labels).init(model)` or the previous step "
            "returned."
        )
    inner = dict(state.inner_states)
    ours = {label: find(x) for label, x in inner.items()}
    # Groups without a state of this library are frozen.
    labels = [label for label, found in ours.items() if found.values]
    if set(labels) != set(optim):
        raise ValueError(
            f"`{call}`: there are optimizers for the labels {sorted(map(str, optim))}, "
            "and states of optimizers of this library for "
            f"{sorted(map(str, labels))}. Pass one for each of these states, by the "
            "labels of `optax.partition`, and none for weights that are frozen by "
            "`optax.set_to_zero`."
        )
    settings, states = [], []
    for label in labels:
        name = f"optim[{label!r}]"
        settings.append(_settings(call, name, optim[label]))
        check_has_one_state(call, ours[label].values)
        states.append(ours[label].values[0])

    def replace(new: list[Any]) -> PyTree:
        changed = {
            label: ours[label].replace([x])
            for label, x in zip(labels, new, strict=True)
        }
        return state._replace(inner_states=inner | changed)

    return settings, states, replace


def _settings(call: str, name: str, optim: Any) -> Settings:
    if isinstance(optim, Optimizer):
        return settings_of(optim)
    check_sums_no_gradients(call, name, optim)
    raise TypeError(
        f"`{call}`: `{name}` is no `flashquinox.Optimizer` but {shown(optim)}. What "
        "`optax.chain`, `optax.MultiSteps` and others add, "
        "such as clipping by the global norm and the accumulation of gradients, needs "
        "the gradients of all layers at once, and here there is only one layer's at a "
        "time. Pass the optimizer itself, or a dictionary of those that "
        "`optax.partition` got, and "
        f"`{call}(max_norm=...)` to clip each layer's; or take an ordinary step."
    )


def _masked(state: OptimizerState) -> set[tuple[Any, ...]]:
    """The paths of the leaves that other optimizers train."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    hidden = jtu.tree_map(
        lambda x: _MASKED if is_masked(x) else x, state.corrections, is_leaf=is_masked
    )
    return {leaf.unwrapped for leaf in flatten(hidden)[0] if leaf.value is _MASKED}


# Stands for an `optax.MaskedNode`, which is an empty subtree, as a leaf.
_MASKED = object()
