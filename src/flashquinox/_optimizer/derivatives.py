"""Derivatives of a step.

Kernels have no derivatives, and rounding to codes has a derivative of zero almost
everywhere. So a leaf that is stored without rounding is differentiated through the
plain arithmetic of its rule. For other leaves, a derivative that is used is an error.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from .. import _compat
from .._backends.dispatch import LeafStep, Way
from .._common.dtypes import NARROW_DTYPES
from .._model.trees import Leaf
from .._sharding.update import update_leaves
from .._tile.step import TileState
from .._tile.tile import move, moved_moments


def differentiable(
    call: str,
    way: Way,
    leaves: Sequence[Leaf],
    steps: list[LeafStep],
    shardings: list[NamedSharding | None],
) -> tuple[Callable[..., list[TileState]], list[Array]]:
    """One step of all leaves, as a function of arrays, and these arrays. `leaves` are
    those of the model, for errors."""
    flat, structure = jtu.tree_flatten(steps)
    # Leaves share their scalars, and each is one argument of the function below.
    each = {id(x): x for x in flat if not isinstance(x, np.ndarray)}
    numbers = {key: i for i, key in enumerate(each)}

    def rebuild(values: Sequence[Any]) -> list[LeafStep]:
        """Numbers that are known now stay."""
        return structure.unflatten(
            [values[numbers[id(x)]] if id(x) in numbers else x for x in flat]
        )

    @jax.custom_jvp
    def update(*arrays: Array) -> list[TileState]:
        return update_leaves(way, rebuild(arrays), shardings)

    def jvp(primals: Any, tangents: Any) -> tuple[list[TileState], list[PyTree]]:
        new = update(*primals)
        moving = jtu.tree_map(_fixed, rebuild(tangents), is_leaf=_is_tangent)
        each = zip(leaves, rebuild(primals), moving, new, strict=True)
        return new, [_tangent(call, *one) for one in each]

    update.defjvp(jvp, symbolic_zeros=True)
    return update, [*each.values()]


def _is_tangent(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _fixed(x: Any) -> Any:
    """A tangent; zero in place of a number that is known."""
    return SymbolicZero(jax.typeof(x)) if isinstance(x, np.ndarray) else x


def _tangent(
    call: str, leaf: Leaf, step: LeafStep, tangent: LeafStep, new: TileState
) -> PyTree:
    """The tangents of a new leaf."""
    values, structure = jtu.tree_flatten(step)
    moves = {
        i: x
        for i, x in enumerate(jtu.tree_leaves(tangent))
        if not isinstance(x, SymbolicZero)
    }
    if not moves:
        return jtu.tree_map(_zero, new)
    reasons = _reasons(step)
    if reasons:
        moved = sum(jnp.sum(x.astype(jnp.float32)) for x in moves.values())
        refused = _refuse_p.bind(moved, message=_message(call, leaf.name, reasons))
        return jtu.tree_map(
            lambda x: (
                _zero(x)
                if not jnp.issubdtype(x.dtype, jnp.inexact)
                else jnp.zeros_like(x) + refused.astype(x.dtype)
            ),
            new,
        )

    def smooth(*moving: Array) -> TileState:
        known = dict(zip(moves, moving, strict=True))
        return _smooth(
            structure.unflatten([known.get(i, x) for i, x in enumerate(values)])
        )

    primals = tuple(values[i] for i in moves)
    return jax.jvp(smooth, primals, tuple(moves.values()))[1]


def _smooth(step: LeafStep) -> TileState:
    """A step of a leaf without codes and without the operations that only make the last
    bit exact. The values are equal up to rounding. The derivatives are right, also for
    a learning rate of 0."""
    structure, scalars, grad, old = step.structure, step.scalars, step.grad, step.old
    factors, kept = structure.factors(scalars), structure.rule.moments
    take = scalars.take
    if take is not None:
        # Otherwise the derivative of a step that is not taken would be 0 times
        # infinity.
        grad = jnp.where(take, grad, jnp.ones_like(grad))
    moments = {}
    for name, moment in old.codes.items():
        before = factors[name][0]
        if kept[name].kind == "nonnegative":
            # Keeps a square root away from 0, where it has no derivative. Far below
            # every moment that matters.
            moment = moment + 1024 * jnp.finfo(moment.dtype).tiny
        moments[name] = moment if before is None else moment * before
    weight = old.weight
    if weight is None:
        moments = moved_moments(structure, scalars, grad, moments)
    else:
        weight, moments = move(structure, scalars, grad, weight, moments)
    for name, moment in moments.items():
        after = factors[name][1]
        moments[name] = moment if after is None else moment * after
    if structure.as_update:
        assert weight is not None
        weight = weight - old.weight
    new = TileState(weight, None, moments, dict.fromkeys(moments))
    if take is None:
        return new
    held = old.weight
    if structure.as_update:
        held = jnp.zeros_like(held)
    kept = TileState(held, None, old.codes, old.scales)
    return jtu.tree_map(lambda x, y: jnp.where(take, x, y), new, kept)


def _reasons(step: LeafStep) -> list[str]:
    """Why the derivative of this step has no meaning. Empty if it has one."""
    reasons, weight = [], step.old.weight
    if weight is not None and step.old.correction is not None:
        reasons.append(f"its weight is {weight.dtype} with a correction")
    elif weight is not None and weight.dtype in NARROW_DTYPES:
        reasons.append(f"its weight is {weight.dtype}, to which each step rounds")
    for name, codec in step.structure.codec_of.items():
        if codec.dtypes is not None:
            bits = jnp.iinfo(step.old.codes[name].dtype).bits
            reasons.append(f"its moment {name!r} is stored in {bits} bits")
    return reasons


def _message(call: str, name: str, reasons: list[str]) -> str:
    return (
        f"`{call}`: the step was differentiated at `{name}`, where that has no "
        f"meaning: {' and '.join(reasons)}. To differentiate through steps, have "
        "weights in float32, by `flashquinox.cast(model, jnp.float32)`, and pass "
        '`storage=flashquinox.Storage(moments="float32")`; to treat what a step gives '
        "as constant, put it, or what comes into it, in `jax.lax.stop_gradient`."
    )


def _zero(x: Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _refuse(*args: Any, message: str, **kwargs: Any) -> NoReturn:
    del args, kwargs
    raise TypeError(message)


# Stands for a tangent that must not be used.
_refuse_p = _compat.refusal("flashquinox_no_derivative", _refuse)
