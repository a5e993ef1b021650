"""What the ways to a kernel for GPUs have in common: an AdamW step of one matrix by the
library itself, in which another kernel stands in the place of the library's."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from _contenders import JaxStep, our_step
from jaxtyping import Array

from flashquinox._backends.gpu.backend import Gpu
from flashquinox._backends.interpreter.scalars import pack, with_leaf
from flashquinox._tile.step import StepScalars, StepStructure, TileState
from flashquinox._tile.tile import update_tile


GROUP = 32
NAME = "route"


class Problem(NamedTuple):
    """What a kernel updates: the scalars of the step in two arrays, and of one leaf the
    gradient and the arrays of its state, elements as (groups, 32)."""

    structure: StepStructure
    floats: Array
    integers: Array
    # Of functions that read these arrays at an index, the scalars.
    scalars: Callable[..., StepScalars]
    grad: Array
    arrays: list[Array]
    # Of arrays like these, the state that `update_tile` takes.
    state: Callable[..., TileState]

    @property
    def groups(self) -> int:
        return self.grad.shape[0]


# From a problem to the new arrays, in the places of the old ones.
Spike: TypeAlias = Callable[[Problem], list[Array]]


def step_by(spike: Spike | None, side: int) -> JaxStep:
    """A step of AdamW of one matrix; by the library's own kernel without a spike. A
    process can have one of them."""
    if spike is not None:
        put_in_place(spike)
    return our_step("adamw", {"matrix": (side, side)}, state_for="xla", backend="gpu")


def plain_step(side: int) -> JaxStep:
    return our_step("adamw", {"matrix": (side, side)}, state_for="xla", backend="xla")


def put_in_place(spike: Spike) -> None:
    def update(
        structure: Any, views: Any, scalars: Any, leaves: Any, grads: Any, old: Any
    ) -> tuple[TileState, ...]:
        del views
        ((own,), (grad,), (state,)) = leaves, grads, old
        scalars = dataclasses.replace(scalars, leaf=own)
        problem = _problem(structure, scalars, grad, state)
        arrays, treedef = jtu.tree_flatten(state)
        new = spike(problem)
        shaped = [x.reshape(y.shape) for x, y in zip(new, arrays, strict=True)]
        return (treedef.unflatten(shaped),)

    # What the library loads when the first optimizer is made.
    Gpu.load = lambda self: update


def _problem(
    structure: StepStructure, scalars: StepScalars, grad: Array, state: TileState
) -> Problem:
    floats, integers, unpack = pack(scalars)
    own, own_structure = jtu.tree_flatten(scalars.leaf)
    first = integers.size
    integers = jnp.concatenate([integers, *[x.astype(jnp.int32)[None] for x in own]])

    def unpacked(float_at: Callable, integer_at: Callable) -> StepScalars:
        here = own_structure.unflatten(integer_at(first + i) for i in range(len(own)))
        full = with_leaf(unpack(float_at, integer_at), here)
        return jtu.tree_map(lambda x, like: x.astype(like.dtype), full, scalars)

    arrays, treedef = jtu.tree_flatten(state)
    flat = lambda x: x.reshape((-1, GROUP) if x.size == grad.size else (-1,))
    return Problem(
        structure,
        floats,
        integers,
        unpacked,
        flat(grad),
        [flat(x) for x in arrays],
        treedef.unflatten,
    )


def traced_tile(problem: Problem, groups: int) -> Any:
    """`update_tile` for so many groups, as a jaxpr of the scalars in the order of their
    two arrays, of the gradient, and of the arrays of the state."""
    floats, integers = problem.floats, problem.integers

    def tile(*operands: Any) -> Any:
        of_integers, of_arrays = floats.size, floats.size + integers.size
        scalars = problem.scalars(
            operands[:of_integers].__getitem__,
            operands[of_integers:of_arrays].__getitem__,
        )
        grad, *state = operands[of_arrays:]
        old = problem.state(state)
        # A weight that does not move may become another zero, as in the library's.
        return jtu.tree_leaves(
            update_tile(problem.structure, scalars, -1, grad, old, keep_unmoved=False)
        )

    scalars = [jax.ShapeDtypeStruct((), x.dtype) for x in (floats, integers) for _ in x]
    arrays = [
        jax.ShapeDtypeStruct((groups, *x.shape[1:]), x.dtype)
        for x in (problem.grad, *problem.arrays)
    ]
    return jax.make_jaxpr(tile)(*scalars, *arrays)
