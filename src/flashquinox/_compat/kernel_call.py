"""A function that kernels of one platform compute, whose types are known everywhere."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jax.interpreters import batching, mlir

from .primitives import Primitive


class KernelCall:
    """A function that kernels of Pallas compute in programs for one platform, and other
    operations in all others.

    Pallas takes all results of its kernels for arrays on the device, and only its
    platform has semaphores. Here, a result is in the memory in which `elsewhere`
    returns it; and where that returns `None`, it is one that only kernels use. Both
    functions return a list, and take what they are called with: pytrees of arrays, and
    static arguments by keyword. It can be called in functions that are traced, alone.
    Under `vmap`, it is the other operations on all platforms, and `stand_in` makes what
    only kernels use, from its type.
    """

    def __init__(
        self,
        name: str,
        platform: str,
        kernel: Callable[..., list[Any]],
        elsewhere: Callable[..., list[Any]],
        stand_in: Callable[[Any], jax.Array],
    ):
        self._kernel, self._elsewhere, self._stand_in = kernel, elsewhere, stand_in
        self._primitive = Primitive(name)
        self._primitive.multiple_results = True
        self._primitive.def_abstract_eval(self._types)
        batching.primitive_batchers[self._primitive] = self._batch
        mlir.register_lowering(self._primitive, self._lower_elsewhere)
        mlir.register_lowering(self._primitive, self._lower, platform=platform)

    def __call__(self, *operands: Any, **static: Any) -> list[jax.Array]:
        flat, structure = jtu.tree_flatten(operands)
        return self._primitive.bind(*flat, structure=structure, **static)

    def _types(self, *avals: Any, **static: Any) -> list[Any]:
        of_kernel = _types_of(partial(_flat, self._kernel, **static), avals)
        missing = self._missing(avals, **static)
        others = iter(_types_of(partial(_flat, self._elsewhere, **static), avals))
        return [
            x if is_missing else next(others)
            for x, is_missing in zip(of_kernel, missing, strict=True)
        ]

    def _missing(
        self, avals: Sequence[Any], structure: Any, **static: Any
    ) -> list[bool]:
        """Which results are `None` elsewhere."""
        found: list[bool] = []

        def function(*flat: Any) -> list[Any]:
            results = self._elsewhere(*structure.unflatten(flat), **static)
            found.extend([x is None for x in results])
            return jtu.tree_leaves(results)

        _types_of(function, avals)
        return found

    def _batch(
        self, flat: Sequence[Any], axes: Sequence[Any], **static: Any
    ) -> tuple[list[Any], list[Any]]:
        axes = tuple(axes)
        one = [
            jax.typeof(x) if axis is None else _without(jax.typeof(x), axis)
            for x, axis in zip(flat, axes, strict=True)
        ]
        missing = self._missing(one, **static)
        function = partial(_flat, self._elsewhere, **static)
        # Without others, nothing is mapped.
        others = iter([] if all(missing) else jax.vmap(function, axes)(*flat))
        types = self._types(*one, **static)
        pairs = [*zip(types, missing, strict=True)]
        new = [self._stand_in(x) if there else next(others) for x, there in pairs]
        return new, [None if there else 0 for there in missing]

    def _lower(self, ctx: Any, *flat: Any, **static: Any) -> Any:
        function = partial(_flat, self._kernel, **static)
        # As kernels have no numbers of 64 bits.
        with jax.enable_x64(False):
            return mlir.lower_fun(function, multiple_results=True)(ctx, *flat)

    def _lower_elsewhere(self, ctx: Any, *flat: Any, **static: Any) -> Any:
        function = partial(_flat, self._elsewhere, **static)
        missing = self._missing(ctx.avals_in, **static)
        pairs = [*zip(ctx.avals_out, missing, strict=True)]
        own = ctx.replace(avals_out=[x for x, is_missing in pairs if not is_missing])
        with jax.enable_x64(False):
            results = iter(mlir.lower_fun(function, multiple_results=True)(own, *flat))
        # Semaphores are numbers, as lowered.
        zeros = lambda x: mlir.ir_constant(np.zeros(x.shape, np.int32))
        return [zeros(x) if is_missing else next(results) for x, is_missing in pairs]


def _flat(
    function: Callable[..., Any], *flat: Any, structure: Any, **static: Any
) -> list[Any]:
    return jtu.tree_leaves(function(*structure.unflatten(flat), **static))


def _types_of(function: Callable[..., Any], avals: Sequence[Any]) -> list[Any]:
    with jax.enable_x64(False):
        return jax.make_jaxpr(function)(*avals).out_avals


def _without(aval: Any, axis: int) -> Any:
    """The type of one member of a batch."""
    shape = (*aval.shape[:axis], *aval.shape[axis + 1 :])
    return aval.update(shape=shape, sharding=None)
