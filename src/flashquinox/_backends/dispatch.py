"""Which backend takes a step of a leaf."""

from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.lax as lax
from jaxtyping import Array, Float

from .._body import StepScalars, StepStructure, TileState
from .._layout import Layout
from . import tpu, xla


Backend: TypeAlias = Literal["auto", "xla", "tpu"]
BACKENDS: tuple[Backend, ...] = ("auto", "xla", "tpu")


def update_leaf(
    backend: Backend,
    structure: StepStructure,
    layout: Layout,
    scalars: StepScalars,
    grad: Float[Array, "*shape"],
    old: TileState,
) -> TileState:
    """One step of one leaf.

    The platform is that of the compiled program, which a process for another platform
    may make. The state decides the layout, and the layout whether there is a kernel:
    without one, and on other platforms, plain XLA.
    """
    plain = partial(xla.update_leaf, structure, layout)
    if backend == "xla" or not tpu.supports(tpu.layout_of(layout, old), old, grad):
        return plain(scalars, grad, old)
    kernel = partial(tpu.update_leaf, structure, tpu.layout_of(layout, old))
    elsewhere = plain if backend == "auto" else partial(kernel, interpret=True)
    return lax.platform_dependent(scalars, grad, old, tpu=kernel, default=elsewhere)


def prefers_rows(backend: Backend) -> bool:
    """Whether new states shall have their groups along rows, as TPUs need them."""
    return backend == "tpu" or (backend == "auto" and jax.default_backend() == "tpu")
