"""A function with another implementation on each platform."""

import contextlib
import functools
import gc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.interpreters import batching, mlir

from .primitives import Primitive


class ByPlatform:
    """A function with another implementation on each platform. Unlike those of
    `jax.lax.platform_dependent`, only the one of the platform that a program is
    compiled for is ever traced.

    `implementation(key, platform, is_exported)` is the function for programs of a
    platform, of which `"default"` stands for all that `serve` was not called with. It
    takes the operands, and returns arrays as those of the last operand, `like`.
    `is_exported`: by `jax.export`, so that other processes run the program.
    """

    def __init__(
        self, name: str, implementation: Callable[[Any, str, bool], Callable[..., Any]]
    ):
        self.name = name
        self._implementation = implementation
        # Traced once in a process, whatever the program.
        self._function = functools.lru_cache(maxsize=1024)(self._make_function)
        self._primitive = Primitive(name)
        self._primitive.multiple_results = True
        self._primitive.def_impl(self._compute)
        self._primitive.def_abstract_eval(_avals_of_like)
        batching.primitive_batchers[self._primitive] = self._batch
        mlir.register_lowering(self._primitive, partial(self._lower, "default"))
        self._served: set[str] = set()

    def serve(self, platform: str) -> None:
        """From now on, programs for this platform have an implementation of their
        own."""
        if platform not in self._served:
            self._served.add(platform)
            rule = partial(self._lower, platform)
            mlir.register_lowering(self._primitive, rule, platform=platform)

    def __call__(self, key: Hashable, *operands: Any) -> Any:
        flat, structure = jtu.tree_flatten(operands)
        likes, structure_of_like = jtu.tree_flatten(operands[-1])
        new = self._primitive.bind(
            *flat,
            key=key,
            structure=structure,
            likes=len(likes),
            # Of each `vmap` around it, which operands have an axis of its members.
            maps=(),
            # As when it was traced.
            mesh=jax.sharding.get_abstract_mesh(),
            # Without operands of 64 bits, as if that were not set: Python's numbers
            # would be of 64 bits, which kernels have not.
            x64=any([x.dtype.itemsize == 8 for x in flat]),
        )
        return structure_of_like.unflatten(new)

    def function_of(self, params: Mapping[str, Any], platform: str) -> Callable:
        """What an equation of this primitive with these parameters computes there."""
        key, structure, maps = [params[x] for x in ("key", "structure", "maps")]
        return self._function(platform, False, key, structure, maps)

    def _make_function(
        self,
        platform: str,
        is_exported: bool,
        key: Hashable,
        structure: Any,
        maps: tuple[tuple[bool, ...], ...],
    ) -> Callable[..., list[Any]]:
        """The implementation, of flat arrays."""

        def function(*flat: Any) -> list[Any]:
            compute = self._implementation(key, platform, is_exported)
            return jtu.tree_leaves(compute(*structure.unflatten(flat)))

        for mapped in maps:
            in_axes = tuple([0 if x else None for x in mapped])
            function = jax.vmap(function, in_axes=in_axes)
        return jax.jit(function)

    def _compute(
        self,
        *flat: Any,
        key: Hashable,
        structure: Any,
        maps: Any,
        x64: bool,
        **_: Any,
    ) -> list[Any]:
        """Without compiling it."""
        devices = {device for x in flat for device in getattr(x, "devices", set)()}
        platform = devices.pop().platform if devices else "default"
        platform = {"gpu": "cuda"}.get(platform, platform)
        with jax.enable_x64(x64):
            return self._function(platform, False, key, structure, maps)(*flat)

    def _lower(
        self,
        platform: str,
        ctx: Any,
        *flat: Any,
        key: Hashable,
        structure: Any,
        maps: Any,
        mesh: Any,
        x64: bool,
        **_: Any,
    ) -> Any:
        is_exported = ctx.module_context.lowering_parameters.for_export
        function = self._function(platform, is_exported, key, structure, maps)
        with (
            jax.sharding.use_abstract_mesh(mesh),
            jax.enable_x64(x64),
            _without_collections(),
        ):
            return mlir.lower_fun(function, multiple_results=True)(ctx, *flat)

    def _batch(
        self, flat: Sequence[Any], axes: Sequence[Any], **params: Any
    ) -> tuple[list[Any], list[int]]:
        is_mapped = [axis is not None for axis in axes]
        arrays = [
            x if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(flat, axes, strict=True)
        ]
        size = arrays[is_mapped.index(True)].shape[0]
        # What is new depends on all operands.
        first_like = len(flat) - params["likes"]
        for i in range(first_like, len(flat)):
            if not is_mapped[i]:
                arrays[i] = jnp.broadcast_to(arrays[i], (size, *arrays[i].shape))
        is_mapped[first_like:] = [True] * params["likes"]
        params["maps"] = (*params["maps"], tuple(is_mapped))
        return self._primitive.bind(*arrays, **params), [0] * params["likes"]


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Python collects garbage after so many new objects, and goes through all that
    there are: in a program of a large model, for a third of the time that it takes to
    lower a step, which leaves little garbage."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _avals_of_like(*avals: Any, likes: int, **_: Any) -> list[Any]:
    # What varies over an axis of a mesh makes everything vary.
    varying = frozenset().union(*[getattr(x, "vma", ()) for x in avals])
    new = [x.update(weak_type=False) for x in avals[len(avals) - likes :]]
    return [x.update(vma=varying) if varying else x for x in new]
