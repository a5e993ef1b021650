"""Checks that the methods of a user's class are elementwise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .elementwise import NotElementwise, trace
from .text import shown


# The shapes of two tiles. A function that differs between them depends on the shape,
# which is the choice of a backend.
_TILES = (11, 13), (17,)

_WHY = "Backends cut leaves into tiles of different shapes, so results would differ."


def check_elementwise(
    call: str, method: str, function: Callable, arguments: Callable, remedy: str
) -> Any:
    """A function must be elementwise. It is called as `function(shape, *args)`, with
    `args` the `jax.ShapeDtypeStruct`s that `arguments(shape)` gives for a tile of this
    shape.

    **Returns:**

    The shapes of its result.
    """
    found = []
    for shape in _TILES:
        of_tile = lambda *args, shape=shape: function(shape, *args)
        try:
            found.append(told(call, method, trace, of_tile, *arguments(shape)))
        except NotElementwise as reason:
            raise ValueError(
                f"`{call}`: `{method}` is not elementwise: {reason}. {_WHY} {remedy}"
            ) from None
    if found[0].signature != found[1].signature:
        raise ValueError(
            f"`{call}`: `{method}` is not elementwise: it depends on the shape of what "
            f"it gets. {_WHY} {remedy}"
        )
    return found[0].out


def check_array(
    call: str, method: str, name: str, x: Any, shape: tuple[int, ...], dtype: Any
) -> None:
    """What a method returned on a tile must be an array of this shape and dtype."""
    if not isinstance(x, jax.Array):
        raise TypeError(
            f"`{call}`: `{method}` returned {shown(x)} as {name}. Return an array of "
            "the shape of the gradient: `jnp.full_like(grad, ...)`, say."
        )
    if x.shape != shape:
        raise ValueError(
            f"`{call}`: `{method}`, of a tile of shape {shape}, returned {name} in "
            f"shape {x.shape}. Return that of the tile: `jnp.broadcast_to(...)`, say."
        )
    if x.dtype != dtype:
        raise TypeError(
            f"`{call}`: `{method}`, of a tile of {jnp.dtype(dtype)}, returned {name} "
            f"as {x.dtype}. Return the dtype of the tile: `.astype(grad.dtype)`, say."
        )


def told(call: str, method: str, function: Callable, *args: Any) -> Any:
    """`function(*args)`, with a note added to errors that it raises."""
    try:
        return function(*args)
    except NotElementwise:
        raise
    except Exception as error:
        if str(error).startswith(f"`{call}`"):
            raise
        note = f"`{call}` found this when it tried `{method}` on a tile of float32."
        if "_Withheld" in str(error):
            note += (
                " Numeric fields are not available in `update`: pass them through "
                "`scalars`."
            )
        error.add_note(note)
        raise
