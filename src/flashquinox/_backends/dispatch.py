"""Which backend takes a step of which leaves."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._storage.layout import Layout
from .._tile.tile import LeafScalars, StepScalars, StepStructure, TileState
from . import platforms, xla
from .tpu import layout as tpu_layout


Backend: TypeAlias = Literal["auto", "xla", "tpu", "gpu"]
# A `View` of the GPU backend, which need not be there.
View: TypeAlias = Any
BACKENDS: tuple[Backend, ...] = ("auto", "xla", "tpu", "gpu")


class LeafStep(eqx.Module):
    """What a step of one leaf needs."""

    structure: StepStructure
    layout: Layout = eqx.field(static=True)
    scalars: StepScalars
    grad: Float[Array, "*shape"]
    old: TileState


def update_leaves(backend: Backend, steps: list[LeafStep]) -> list[TileState]:
    """One step of all leaves.

    The platform is that of the compiled program, which a process for another platform
    may make. The state decides the layout, and the layout whether there is a kernel:
    without one, and on other platforms, plain XLA.
    """
    views = [_gpu_view(backend, step) for step in steps]
    new: dict[int, TileState] = {}
    for batch in _batches(steps, views):
        updated = _update_batch(
            backend, [steps[i] for i in batch], tuple(views[i] for i in batch)
        )
        new.update(zip(batch, updated, strict=True))
    return [new[i] for i in range(len(steps))]


def prefers_rows(backend: Backend) -> bool:
    """Whether new states shall have their groups along rows, as TPUs need them."""
    return backend == "tpu" or (backend == "auto" and jax.default_backend() == "tpu")


def _gpu_view(backend: Backend, step: LeafStep) -> View | None:
    if backend != "gpu" and not (backend == "auto" and platforms.is_gpu()):
        return None
    gpu = platforms.kernels("gpu")
    return None if gpu is None else gpu.view_of(step.layout, step.grad, step.old)


def _batches(steps: list[LeafStep], views: list[View | None]) -> Iterator[list[int]]:
    """Which leaves share a kernel on GPUs: those that are stored alike. First leaves of
    the same size, so that many kernels are the same one, which is compiled once; then
    what is left of them."""
    alike: dict[Any, dict[View, list[int]]] = {}
    for i, (step, view) in enumerate(zip(steps, views, strict=True)):
        if view is None:
            yield [i]
        else:
            same_kind = alike.setdefault(_kind(step, view), {})
            same_kind.setdefault(view, []).append(i)
    for same_kind in alike.values():
        most = next(iter(same_kind)).most_leaves
        rest = []
        for indices in same_kind.values():
            size = _even_size(len(indices), most)
            whole = len(indices) // size * size
            yield from _split(indices[:whole], size)
            rest += indices[whole:]
        yield from _split(rest, most)


def _even_size(number: int, most: int) -> int:
    """How many of so many equal leaves shall share a kernel: where that can be, so many
    that none are left."""
    sizes = range(most, most // 2, -1)
    return next((size for size in sizes if number % size == 0), most)


def _split(indices: list[int], most: int) -> list[list[int]]:
    return [indices[i : i + most] for i in range(0, len(indices), most)]


def _kind(step: LeafStep, view: View) -> tuple[Any, ...]:
    """What leaves must have in common to share a kernel."""
    leaves, structure = jtu.tree_flatten((step.grad, step.old))
    dtypes = tuple(x.dtype for x in leaves)
    scalars = jtu.tree_structure(step.scalars)
    return step.structure, scalars, view.kind, structure, dtypes


def _update_batch(
    backend: Backend, steps: list[LeafStep], views: tuple[View | None, ...]
) -> tuple[TileState, ...]:
    structure = steps[0].structure
    layouts = [step.layout for step in steps]
    operands = (
        steps[0].scalars,
        tuple(step.scalars.leaf for step in steps),
        tuple(step.grad for step in steps),
        tuple(step.old for step in steps),
    )
    plain = partial(_one_by_one, xla.update_leaf, structure, layouts)
    kernels: dict[str, Callable] = {}
    if backend in ("auto", "tpu") and any(map(_suits_tpu, steps)):
        # A program that is made on another machine may be for a TPU as well.
        tpu = platforms.kernels("tpu", warn=platforms.is_tpu())
        if tpu is not None:
            on_tpu = partial(_tpu_or_plain, tpu.update_leaf)
            kernels["tpu"] = partial(_one_by_one, on_tpu, structure, layouts)
    if None not in views:
        gpu = platforms.kernels("gpu")
        assert gpu is not None
        kernels["cuda"] = partial(gpu.update_leaves, structure, views)
    if not kernels:
        return plain(*operands)
    default = plain
    if backend != "auto":
        (kernel,) = kernels.values()
        default = partial(kernel, interpret=True)
    return lax.platform_dependent(*operands, **kernels, default=default)


def _one_by_one(
    update_leaf: Callable[..., TileState],
    structure: StepStructure,
    layouts: list[Layout],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Array, ...],
    old: tuple[TileState, ...],
    **options: Any,
) -> tuple[TileState, ...]:
    def one(
        layout: Layout, leaf: LeafScalars, grad: Array, old: TileState
    ) -> TileState:
        of_leaf = eqx.tree_at(lambda x: x.leaf, scalars, leaf)
        return update_leaf(structure, layout, of_leaf, grad, old, **options)

    return tuple(map(one, layouts, leaves, grads, old))


def _suits_tpu(step: LeafStep) -> bool:
    layout = tpu_layout.layout_of(step.layout, step.old)
    return tpu_layout.supports(layout, step.old, step.grad)


def _tpu_or_plain(
    update_leaf: Callable[..., TileState],
    structure: StepStructure,
    layout: Layout,
    scalars: StepScalars,
    grad: Float[Array, "*shape"],
    old: TileState,
    interpret: bool = False,
) -> TileState:
    own = tpu_layout.layout_of(layout, old)
    if not tpu_layout.supports(own, old, grad):
        return xla.update_leaf(structure, layout, scalars, grad, old)
    return update_leaf(structure, own, scalars, grad, old, interpret=interpret)
