"""What dispatch knows of a backend.

A backend says how tiles of leaves reach the one tile function on devices of one
platform. To add one, add a folder beside this file with a `BACKEND`, and its name to
the line of `Backend` in `platforms.py`.
"""

import abc
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, ClassVar, TypeAlias

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, Shaped

from .._common import memory
from .._storage.layout import Layout
from .._tile.step import LeafScalars, StepScalars, StepStructure, TileState


class LeafStep(eqx.Module):
    """What a step of one leaf needs."""

    structure: StepStructure
    layout: Layout = eqx.field(static=True)
    scalars: StepScalars
    grad: Shaped[Array, "*shape"]
    old: TileState


# How a backend sees a leaf: whatever its update needs to know of it beside its arrays.
View: TypeAlias = Hashable
# See `AbstractBackend.load`.
Update: TypeAlias = Callable[..., tuple[TileState, ...]]


class Unsupported(Exception):
    """A rule needs something that kernels do not have. The text names it."""


class AbstractBackend(abc.ABC):
    """One way to take steps of leaves.

    There is one object of each subclass. Its methods are called in this order: `load`
    once in a process; then, whenever a step is traced, `serves`, `view` for each leaf,
    and `batches`. The function from `load` is called for each batch, and JAX caches
    what it traces: once for each distinct batch in a process.
    """

    # By which users choose the backend: `backend="tpu"`.
    name: ClassVar[str]
    # What JAX calls the platform whose programs take this
    # backend: "tpu", "cuda". "default" means all platforms without a backend of their
    # own.
    platform: ClassVar[str]
    # What `load` may miss, for messages: its name, and what to install. `None` if it is
    # always there.
    needs: ClassVar[str | None]
    remedy: ClassVar[str] = ""
    # Whether "auto" warns where that is not there, on devices that it serves.
    is_missed: ClassVar[bool] = True
    # Whether new states should have their groups along rows.
    prefers_rows: ClassVar[bool]
    # Whether `backend="auto"` puts this backend also into programs that are traced for
    # a device of another platform, as they may be compiled for this one elsewhere. Each
    # leaf is a batch there.
    in_every_program: ClassVar[bool]
    # Whether kernels are interpreted on devices of other platforms, if this backend is
    # asked for. Else these take plain XLA.
    is_interpreted: ClassVar[bool]
    # Whether other processes can run a compiled program with its kernels.
    is_portable: ClassVar[bool]
    # Whether it takes states in host memory as they are. For others, the leaves of a
    # batch are copied to the device and back.
    reads_host_memory: ClassVar[bool]

    @abc.abstractmethod
    def load(self) -> Update:
        """Imports what the backend is made with, and gives the function that updates a
        batch.

        It is called when the first optimizer is built that may take this backend, and
        not when this library is imported: kernels need parts of JAX that are
        experimental.

        **Returns:**

        A function `update(structure, views, scalars, leaves, grads, old, interpret)`:

        - `structure`: the `StepStructure` that the leaves of the batch share;
        - `views`: what `view` gave for each of them;
        - `scalars`: the `StepScalars` of the first one; of the others, only
            `scalars.leaf` differs;
        - `leaves`: that part, the `LeafScalars`, of each leaf;
        - `grads`, `old`: the gradient and the `TileState` of each leaf, in arrays of
            its shape;
        - `interpret`: whether the program is for a device of another platform, where
            kernels are interpreted. `False` by default.

        It returns the new `TileState` of each leaf. `structure` and `views` are static:
        JAX finds what it has traced by their equality.

        **Raises:**

        `ImportError` if what `needs` says is not there. Steps then
        take plain XLA; an optimizer that was asked for this backend is an error. The
        function itself may raise `Unsupported`, before it computes anything: its batch
        then takes plain XLA, with one warning for each rule.
        """

    @abc.abstractmethod
    def serves(self, device: Any) -> bool:
        """Whether `backend="auto"` chooses this backend in programs for a device: a
        `jax.Device` or, of an abstract mesh, a `jax.sharding.AbstractDevice`."""

    @abc.abstractmethod
    def view(self, step: LeafStep) -> View | None:
        """How the backend sees a leaf. `None` if it cannot take it: then plain XLA
        does. Called after `load`."""

    @abc.abstractmethod
    def batches(
        self, steps: Sequence[LeafStep], views: Sequence[View]
    ) -> list[list[int]]:
        """Which of these leaves are updated together: numbers from 0, each once. They
        have the same structure, the same scalars but for their own, and arrays of the
        same dtypes. Called with all leaves of a step that the backend can take, if it
        is the one that was chosen."""


def kind_of(step: LeafStep) -> Hashable:
    """What the leaves of a batch have in common."""
    arrays, structure = jtu.tree_flatten((step.grad, step.old))
    types = tuple([x.dtype for x in arrays]), tuple(memory.are_on_host(arrays))
    return step.structure, jtu.tree_structure(step.scalars), structure, types


def takes_place_of_gradient(
    structure: StepStructure, grad: Shaped[Array, "..."], old: TileState
) -> bool:
    """Whether a kernel writes its first result to where the gradient is, and not to
    where the old weight is. It does so with an update, which will be added to the old
    weight: XLA would copy that. Nobody else needs the gradient in most programs."""
    if not structure.as_update or old.weight is None:
        return False
    is_like_grad = grad.dtype == old.weight.dtype
    return is_like_grad and not memory.any_on_host((grad, old))


def grouped(
    kinds: Iterable[Hashable], most: Callable[[int], int] | None = None
) -> list[list[int]]:
    """The numbers of those that are equal, from 0, in the order of the first ones.
    `most`: of the first number, how many are in a list at most."""
    alike: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(i)
    if most is None:
        return [*alike.values()]
    found = []
    for numbers in alike.values():
        count = most(numbers[0])
        found += [numbers[i : i + count] for i in range(0, len(numbers), count)]
    return found


def one_by_one(
    update: Update,
    structure: StepStructure,
    views: Sequence[View],
    scalars: StepScalars,
    leaves: Sequence[LeafScalars],
    grads: Sequence[Shaped[Array, "..."]],
    old: Sequence[TileState],
) -> tuple[TileState, ...]:
    """A batch, by what updates one leaf."""
    new = []
    for view, leaf, grad, state in zip(views, leaves, grads, old, strict=True):
        own = dataclasses.replace(scalars, leaf=leaf)
        new += update(structure, (view,), own, (leaf,), (grad,), (state,))
    return tuple(new)
