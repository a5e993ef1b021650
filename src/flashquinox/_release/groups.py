"""A step under way of one optimizer, or of several, each of which trains a group of the
leaves of a model: as `optax.partition` divides it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, PyTree, ScalarLike

from .._common.text import shown
from .._model.trees import flatten, is_within, Leaf
from .._optimizer.engine import LeafState, Learned, OpenedStep, Transformation
from .._optimizer.optimizer import Optimizer, transformation_of
from .._optimizer.state import OptimizerState
from .._optimizer.state_checks import check_has_one_state, check_not_in_two_states
from .._optimizer.states import find
from .._tile.clipping import Clipping


# For each group, whether its gradients were finite. `None` if that was not asked.
Takes = list[Bool[Array, ""] | None]


@dataclasses.dataclass(frozen=True)
class GroupedStep:
    """The steps of all groups. Leaves have their numbers in the model; `places` has the
    group of each leaf that is trained, and its number there, by which codecs dither."""

    leaves: list[Leaf]
    rebuild: Callable[[list[Any]], PyTree]
    groups: list[OpenedStep]
    places: dict[int, tuple[int, int]]
    replace: Callable[[list[OptimizerState]], PyTree]
    # For each group, whether its leaves were updated, each time that some were.
    took: list[list[Bool[Array, ""]]]

    def verified(self) -> "GroupedStep":
        return dataclasses.replace(self, groups=[x.verified() for x in self.groups])

    def check(self, number: int) -> None:
        group, place = self.places[number]
        self.groups[group].check(place)

    def sharding(self, number: int) -> NamedSharding | None:
        group, place = self.places[number]
        return self.groups[group].shardings[place]

    def read(self, number: int) -> LeafState:
        group, place = self.places[number]
        return self.groups[group].read(place)

    def write(self, number: int, new: LeafState) -> None:
        group, place = self.places[number]
        self.groups[group].write(place, new)

    def update(self, grads: dict[int, Array], max_norm: ScalarLike | None) -> None:
        """Updates the leaves of these numbers, by gradients that are scaled to at most
        this norm together, if one is given."""
        shardings = {number: self.sharding(number) for number in grads}
        clip = self.clip(grads, shardings, max_norm)
        for group, numbers in self._divided([*grads]).items():
            own = {self.places[number][1]: grads[number] for number in numbers}
            self.count(group, self.groups[group].update(own, clip))

    def count(self, group: int, take: Bool[Array, ""] | None) -> None:
        """Notes that leaves of a group were updated, if this is true."""
        if take is not None:
            self.took[group].append(take)

    def clip(
        self,
        grads: dict[int, Array],
        shardings: dict[int, NamedSharding | None],
        max_norm: ScalarLike | None,
    ) -> Clipping | None:
        """As of `OpenedStep`, for gradients of all groups together."""
        # Any group: none looks at its state for this.
        there = [shardings[number] for number in grads]
        return self.groups[0].clip([*grads.values()], there, max_norm)

    def takes(
        self,
        grads: dict[int, Array],
        shardings: dict[int, NamedSharding | None],
        clip: Clipping | None,
    ) -> Takes:
        takes: Takes = [None for _ in self.groups]
        for group, numbers in self._divided([*grads]).items():
            takes[group] = self.groups[group].take(
                [grads[number] for number in numbers],
                [shardings[number] for number in numbers],
                clip,
            )
        return takes

    def learn(
        self, numbers: list[int], finite: Callable[[], Bool[Array, ""]]
    ) -> dict[int, Learned]:
        """As of `OpenedStep`; `finite` is asked whether this step is taken at all."""
        learned = {}
        for group, here in self._divided(numbers).items():
            step = self.groups[group]
            take = finite() if step.transformation.skip_nonfinite else None
            found = step.learn([self.places[number][1] for number in here], take)
            learned.update(zip(here, found, strict=True))
        return learned

    def update_parts(
        self,
        parts: dict[int, LeafState],
        shardings: dict[int, NamedSharding | None],
        grads: dict[int, Array],
        learned: dict[int, Learned],
        takes: Takes,
        clip: Clipping | None,
    ) -> dict[int, LeafState]:
        """As of `OpenedStep`, for the parts of the leaves of these numbers."""
        new = {}
        for group, numbers in self._divided([*parts]).items():
            updated = self.groups[group].update_parts(
                [self.places[number][1] for number in numbers],
                [parts[number] for number in numbers],
                [shardings[number] for number in numbers],
                [grads[number] for number in numbers],
                [learned[number] for number in numbers],
                takes[group],
                clip,
            )
            new.update(zip(numbers, updated, strict=True))
        return new

    def close(self) -> tuple[PyTree, PyTree]:
        """The new model, and a state like the one that came."""
        states = []
        for group, took in zip(self.groups, self.took, strict=True):
            take = None
            if group.transformation.skip_nonfinite:
                take = jnp.any(jnp.stack(took)) if took else jnp.asarray(True)
            states.append(group.close(take)[1])
        values = [leaf.value for leaf in self.leaves]
        for number in self.places:
            values[number] = self.read(number).value
        return self.rebuild(values), self.replace(states)

    def _divided(self, numbers: list[int]) -> dict[int, list[int]]:
        """These leaves by their groups."""
        divided: dict[int, list[int]] = {}
        for number in numbers:
            divided.setdefault(self.places[number][0], []).append(number)
        return divided


def check_optimizers(call: str, optim: Any) -> None:
    if isinstance(optim, Mapping):
        for label, one in optim.items():
            _transformation(call, f"optim[{label!r}]", one)
    else:
        _transformation(call, "optim", optim)


def open_groups(call: str, optim: Any, model: PyTree, state: PyTree) -> GroupedStep:
    """Takes a model and the state of its optimizers apart, for one step."""
    leaves, rebuild = flatten(model)
    if isinstance(optim, Mapping):
        transformations, states, replace = _of_partition(call, optim, state)
        masked = [_masked(x) for x in states]
    else:
        transformations = [_transformation(call, "optim", optim)]
        states, replace = [state], lambda new: new[0]
        masked = [set()]
    groups, places = [], {}
    for group, transformation in enumerate(transformations):
        # The numbers of leaves are those of what `optax.partition` passes on.
        hidden = lambda leaf, group=group: is_within(leaf.unwrapped, masked[group])
        own = rebuild(
            [optax.MaskedNode() if hidden(leaf) else leaf.value for leaf in leaves]
        )
        opened = transformation.open(call, own, states[group])
        numbers = {leaf.unwrapped: i for i, leaf in enumerate(leaves)}
        for place, leaf in enumerate(opened.leaves):
            if opened.trained[place]:
                number = numbers[leaf.unwrapped]
                owner, _ = places.get(number, (None, None))
                check_not_in_two_states(call, leaf, owner)
                places[number] = group, place
        groups.append(opened)
    took = [[] for _ in groups]
    return GroupedStep(
        leaves, rebuild, groups, dict(sorted(places.items())), replace, took
    )


def _of_partition(
    call: str, optim: Mapping[Any, Any], state: Any
) -> tuple[list[Transformation], list[OptimizerState], Callable[[list[Any]], PyTree]]:
    """What makes the steps of each group, its state, and a function from new ones to
    the state of all."""
    if not isinstance(state, optax.PartitionState):
        raise TypeError(
            f"`{call}`: several optimizers take the state of `optax.partition`; got a "
            f"{type(state).__name__}. Pass what "
            "`optax.partition(optimizers, labels).init(model)` or the previous step "
            "returned."
        )
    inner = dict(state.inner_states)
    ours = {label: find(x) for label, x in inner.items()}
    # Weights of a group without a state of this library are frozen.
    labels = [label for label, found in ours.items() if found.values]
    if set(labels) != set(optim):
        raise ValueError(
            f"`{call}`: there are optimizers for the labels {sorted(map(str, optim))}, "
            "and states of optimizers of this library for "
            f"{sorted(map(str, labels))}. Pass one for each of these states, by the "
            "labels of `optax.partition`, and none for weights that are frozen by "
            "`optax.set_to_zero`."
        )
    transformations, states = [], []
    for label in labels:
        name = f"optim[{label!r}]"
        transformations.append(_transformation(call, name, optim[label]))
        check_has_one_state(call, ours[label].values)
        states.append(ours[label].values[0])

    def replace(new: list[Any]) -> PyTree:
        changed = {
            label: ours[label].replace([x])
            for label, x in zip(labels, new, strict=True)
        }
        return state._replace(inner_states=inner | changed)

    return transformations, states, replace


def _transformation(call: str, name: str, optim: Any) -> Transformation:
    if isinstance(optim, Optimizer):
        return transformation_of(optim)
    raise TypeError(
        f"`{call}`: `{name}` is no `flashquinox.Optimizer` but {shown(optim)}. What "
        "`optax.chain`, `optax.MultiSteps` and other wrappers add, such as clipping by "
        "the global norm and the accumulation of gradients, needs the gradients of all "
        "layers at once, and here there is only one layer's at a time. Pass the "
        "optimizer itself, or a dictionary of those that `optax.partition` got, and "
        f"`{call}(max_norm=...)` to clip each layer's; or take an ordinary step."
    )


def _masked(state: OptimizerState) -> set[tuple[Any, ...]]:
    """The paths of what other optimizers train."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    hidden = jtu.tree_map(
        lambda x: _MASKED if is_masked(x) else x, state.corrections, is_leaf=is_masked
    )
    return {leaf.unwrapped for leaf in flatten(hidden)[0] if leaf.value is _MASKED}


# A leaf, unlike `optax.MaskedNode`.
_MASKED = object()
