"""Functions of stacks of matrices, such as a Newton-Schulz iteration: each device of a
mesh gets whole matrices, and computes none that another one computes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from .._common import meshes
from .parts import on_parts


class MatrixAxes(NamedTuple):
    """The axes of an array that are the rows of its matrices, and those that are the
    columns, counted from the end. All others are of a stack."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def of_matrix(self) -> tuple[int, ...]:
        return self.rows + self.columns

    def of_stack(self, ndim: int) -> tuple[int, ...]:
        return tuple(i for i in range(-ndim, 0) if i not in self.of_matrix)

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The numbers of rows and columns."""
        rows, columns = (math.prod(shape[i] for i in x) for x in self)
        return rows, columns


# Of a stack of matrices, a stack of the same shape.
OfMatrices = Callable[[Float[Array, "stack rows columns"]], Array]


# Compiled once, also where the caller does not.
@partial(jax.jit, static_argnums=(0, 1, 2))
def map_matrices(
    function: OfMatrices,
    axes: MatrixAxes,
    sharding: NamedSharding | None,
    arrays: list[Array],
) -> list[Array]:
    """Applies a function to the stack of all matrices of these arrays, which are of one
    shape and dtype, and divided alike. `function` must have a hash.

    On a mesh, the stack is divided among all devices. Those that hold parts of the same
    matrices exchange them by one all-to-all before the function, and one after it, for
    each axis of the mesh that divides matrices. Axes that divide the stack already need
    none; devices along an axis that divides nothing share the work, and gather the
    results.
    """
    if sharding is None:
        return _unstacked(axes, arrays, _apply(function, axes, _stacked(axes, arrays)))

    def of_parts(arrays: list[Array]) -> list[Array]:
        stack = _stacked(axes, arrays)
        matrices, exchanges = stack.shape[0], _exchanges(axes, sharding, arrays[0].ndim)
        devices = math.prod([sharding.mesh.shape[name] for name, _ in exchanges])
        missing = -matrices % devices
        stack = jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1))
        for name, axis in exchanges:
            stack = _with_whole(stack, name, axis, sharding.mesh.shape[name])
        stack = _apply(function, axes, stack)
        for name, axis in reversed(exchanges):
            stack = _with_all(stack, name, axis, sharding.mesh.shape[name])
        return _unstacked(axes, arrays, stack[:matrices])

    specs = [sharding.spec for _ in arrays]
    return on_parts(of_parts, sharding.mesh, (specs,), specs)(arrays)


def _exchanges(
    axes: MatrixAxes, sharding: NamedSharding, ndim: int
) -> list[tuple[str, int | None]]:
    """The axes of the mesh over which devices divide the stack anew, and the axis of
    the stack that each of them divides: of a matrix, or none."""
    names = [*meshes.mesh_axes(sharding)]
    names += [()] * (ndim - len(names))
    found: list[tuple[str, int | None]] = []
    for place, axis in enumerate(axes.of_matrix):
        # The last name divides the parts of the others.
        found += [(name, place + 1) for name in reversed(names[axis])]
    used = {name for of_axis in names for name in of_axis}
    unused = [name for name in meshes.free_axes(sharding.mesh) if name not in used]
    return [(name, None) for name in unused] + found


def _with_whole(stack: Array, name: str, axis: int | None, devices: int) -> Array:
    """This device's share of the stack, whole along an axis of the matrices."""
    if axis is not None:
        return lax.all_to_all(stack, name, 0, axis, tiled=True)
    share = stack.shape[0] // devices
    start = lax.axis_index(name) * share
    return lax.dynamic_slice_in_dim(stack, start, share, axis=0)


def _with_all(stack: Array, name: str, axis: int | None, devices: int) -> Array:
    """The inverse of `_with_whole`."""
    if axis is None:
        return lax.all_gather(stack, name, axis=0, tiled=True)
    if devices == 1:
        return stack
    shape = list(stack.shape)
    shape[axis : axis + 1] = [devices, shape[axis] // devices]
    # What each device gets is put together before. XLA would do that in two copies.
    parts = jnp.moveaxis(stack.reshape(shape), axis, 0)
    parts = lax.all_to_all(parts, name, 0, 0, tiled=True)
    return parts.reshape(-1, *parts.shape[2:])


def _stacked(axes: MatrixAxes, arrays: list[Array]) -> Array:
    """The matrices of these arrays, with all axes of a matrix."""
    ndim = arrays[0].ndim
    order = axes.of_stack(ndim) + axes.of_matrix
    shape = [arrays[0].shape[i] for i in axes.of_matrix]
    # Not transposed one by one: arrays that were one are not copied to be one again.
    stack = jnp.stack(arrays).transpose(0, *[i + ndim + 1 for i in order])
    return stack.reshape(-1, *shape)


def _unstacked(axes: MatrixAxes, like: list[Array], stack: Array) -> list[Array]:
    """The inverse of `_stacked`."""
    ndim = like[0].ndim
    order = [i + ndim for i in axes.of_stack(ndim) + axes.of_matrix]
    inverse = sorted(range(ndim), key=order.__getitem__)
    shape = [like[0].shape[i] for i in order]
    arrays = stack.reshape(len(like), *shape).transpose(0, *[i + 1 for i in inverse])
    return [lax.index_in_dim(arrays, i, keepdims=False) for i in range(len(like))]


def _apply(function: Any, axes: MatrixAxes, stack: Array) -> Array:
    columns = math.prod(stack.shape[1 + len(axes.rows) :])
    matrices = stack.reshape(stack.shape[0], -1, columns)
    return function(matrices).reshape(stack.shape)
