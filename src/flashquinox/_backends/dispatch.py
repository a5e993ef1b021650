"""Which backend takes a step of which leaves."""

import functools
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from .. import _compat
from .._common import memory
from .._tile.step import LeafScalars, StepScalars, StepStructure, TileState
from . import platforms
from .base import (
    AbstractBackend,
    LeafStep as LeafStep,
    one_by_one,
    Unsupported,
    Update,
    View,
)
from .platforms import Backend as Backend, Way as Way
from .xla import BACKEND as XLA, PlainView


class _Batch(NamedTuple):
    """Leaves that are updated together, but for their arrays: what a program that
    updates them depends on."""

    structure: StepStructure
    # The one that the leaves are batched for.
    leader: AbstractBackend
    # As plain XLA sees each leaf.
    plain: tuple[PlainView, ...]
    # The other backends that the program may take, and how each sees each leaf. `None`
    # stands for leaves that it cannot take; no backend is here of which all are.
    kernels: tuple[tuple[AbstractBackend, tuple[View | None, ...]], ...]
    # Whether a backend was asked for: on other platforms, it is interpreted.
    is_asked: bool
    # Whether arrays of the state are in host memory.
    is_away: bool
    # Kernels ask for the device that they are traced for.
    device: Any


def update_leaves(way: Way, steps: list[LeafStep]) -> list[TileState]:
    """One step of all leaves.

    The platform is that of the compiled program, which a process for another platform
    may make. The state decides the layout, and the layout whether there is a kernel:
    without one, and on other platforms, plain XLA.
    """
    device = _compat.traced_device()
    kernels = [] if way == "divisible" else platforms.chosen(way, device)
    views = {kernel: [kernel.view(step) for step in steps] for kernel in kernels}
    plain = [XLA.view(step) for step in steps]
    if way == "divisible":
        plain = [view.whole for view in plain]
    leader = _leader(way, kernels, device)
    new: dict[int, TileState] = {}
    for numbers in _batches(leader, steps, views.get(leader, plain)):
        here = [steps[i] for i in numbers]
        batch = _Batch(
            here[0].structure,
            leader,
            tuple([plain[i] for i in numbers]),
            tuple(
                [
                    (kernel, tuple(own))
                    for kernel, of_all in views.items()
                    if (own := [of_all[i] for i in numbers]).count(None) < len(own)
                ]
            ),
            is_asked=way != "auto",
            is_away=memory.any_on_host([step.old for step in here]),
            device=device,
        )
        operands = (
            here[0].scalars,
            tuple([step.scalars.leaf for step in here]),
            tuple([step.grad for step in here]),
            tuple([step.old for step in here]),
        )
        updated = _update_batch(batch, *operands)
        new.update(zip(numbers, updated, strict=True))
    return [new[i] for i in range(len(steps))]


def reads_host_memory(way: Way) -> bool:
    """Whether the backend that leaves are batched for takes their states where they
    are, if these are in host memory."""
    if way == "divisible":
        return False
    device = _compat.traced_device()
    return _leader(way, platforms.chosen(way, device), device).reads_host_memory


def _leader(way: Way, kernels: list[AbstractBackend], device: Any) -> AbstractBackend:
    if kernels and (way != "auto" or kernels[0].serves(device)):
        return kernels[0]
    return XLA


def prefers_rows(backend: Backend) -> bool:
    """Whether new states shall have their groups along rows, as TPUs need them."""
    if backend != "auto":
        return platforms.named(backend).prefers_rows
    here = jax.local_devices()[0]
    return any(x.prefers_rows and x.serves(here) for x in platforms.backends())


def _batches(
    leader: AbstractBackend, steps: list[LeafStep], views: Sequence[View | None]
) -> list[list[int]]:
    """The numbers of the leaves of each batch: as the backend wants them that was
    chosen, and one by one those that it cannot take."""
    taken = [i for i, view in enumerate(views) if view is not None]
    found = leader.batches([steps[i] for i in taken], [views[i] for i in taken])
    left = [[i] for i, view in enumerate(views) if view is None]
    return sorted(left + [[taken[i] for i in batch] for batch in found])


# Leaves that are alike are traced once in a process; and compiled once where the caller
# compiles nothing.
@partial(jax.jit, static_argnums=0)
def _update_batch(
    batch: _Batch,
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Array, ...],
    old: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    """A batch, on whichever platform."""
    for kernel, _ in batch.kernels:
        by_platform.serve(kernel.platform)
    return by_platform(batch, scalars, leaves, grads, old)


def _update_on(batch: _Batch, platform: str, is_exported: bool) -> Update:
    """What updates the leaves of a batch in programs for a platform."""
    for kernel, views in batch.kernels:
        if kernel.platform == platform and (kernel.is_portable or not is_exported):
            return _update_for(batch, kernel, views)
    for kernel, views in batch.kernels if batch.is_asked else ():
        if not kernel.is_interpreted:
            continue
        return partial(_update_for(batch, kernel, views), interpret=True)
    return _update_by_xla(batch, platform)


def _update_by_xla(batch: _Batch, platform: str) -> Update:
    """Plain XLA, which takes chunks on CPUs."""
    if platform == "cpu":
        return _update_for(batch, XLA, batch.plain)
    return partial(_one_by_one, batch, XLA, _whole(batch))


by_platform = _compat.ByPlatform("flashquinox_step", _update_on)
by_platform.serve("cpu")


def _update_for(
    batch: _Batch, backend: AbstractBackend, views: tuple[View | None, ...]
) -> Update:
    """What updates the leaves of a batch, of their scalars and arrays."""
    if backend is XLA:
        return partial(_update_of(XLA, batch.is_away), batch.structure, views)
    if backend is batch.leader or len(views) == 1:
        update = partial(_update_of(backend, batch.is_away), batch.structure, views)
    else:
        update = partial(_one_by_one, batch, backend, views)
    return partial(_by_kernels, batch, backend, update)


def _by_kernels(
    batch: _Batch, backend: AbstractBackend, update: Update, *operands: Any, **kwargs
) -> tuple[TileState, ...]:
    """What kernels make of a batch; plain XLA, if they have not what its rule needs."""
    try:
        return update(*operands, **kwargs)
    except Unsupported as error:
        _warn_of(backend.name, type(batch.structure.rule).__name__, str(error))
    return _update_by_xla(batch, backend.platform)(*operands)


@functools.cache
def _warn_of(backend: str, rule: str, reason: str) -> None:
    warnings.warn(
        f"flashquinox: no kernel for {backend.upper()}s of the rule {rule}, which has "
        f"{reason}. Its steps take plain XLA instead: the same results, in more time "
        "and memory.",
        stacklevel=2,
    )


def _whole(batch: _Batch) -> tuple[PlainView, ...]:
    """As plain XLA sees each leaf of a batch on other platforms than CPUs."""
    return tuple([view.whole for view in batch.plain])


def _one_by_one(
    batch: _Batch,
    backend: AbstractBackend,
    views: tuple[View | None, ...],
    *operands: Any,
) -> tuple[TileState, ...]:
    """The leaves of another backend's batch."""
    # Those that it cannot take, on another platform than CPUs.
    known = [
        plain.whole if view is None else view
        for view, plain in zip(views, batch.plain, strict=True)
    ]

    def update(structure: StepStructure, views: Any, *operands: Any) -> Any:
        (view,) = views
        taken_by = XLA if isinstance(view, PlainView) else backend
        return _update_alone(taken_by, batch.is_away)(structure, views, *operands)

    return one_by_one(update, batch.structure, known, *operands)


@functools.cache
def _update_alone(backend: AbstractBackend, is_away: bool) -> Update:
    """What updates a batch of one leaf. Leaves that are alike are traced once."""
    return jax.jit(_update_of(backend, is_away), static_argnums=(0, 1))


@functools.cache
def _update_of(backend: AbstractBackend, is_away: bool) -> Update:
    """What updates a batch, wherever its state is."""
    update = platforms.update_of(backend)
    assert update is not None
    if backend.reads_host_memory or not is_away:
        return update

    def on_device(
        structure: StepStructure,
        views: Any,
        scalars: StepScalars,
        leaves: tuple[LeafScalars, ...],
        grads: tuple[Array, ...],
        old: tuple[TileState, ...],
        **kwargs: Any,
    ) -> tuple[TileState, ...]:
        here = memory.to_device(old)
        new = update(structure, views, scalars, leaves, grads, here, **kwargs)
        return memory.where(new, old)

    return on_device
