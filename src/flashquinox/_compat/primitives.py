"""Own primitives: elementwise functions, and errors."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike


Primitive: TypeAlias = jex.Primitive


def unchanged(
    name: str, function: Callable[..., Sequence[jax.Array]]
) -> Callable[..., list[jax.Array]]:
    """A function that gives its arrays as they are, as a primitive that is compiled as
    `function`. Under `vmap`, that has the arrays of all members, the axis of these
    first; and those that are the same for all."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda *arrays: list(arrays))
    primitive.def_abstract_eval(lambda *avals: list(avals))

    def batch(arrays: Sequence[Any], axes: Sequence[Any]) -> Any:
        first = [
            jnp.moveaxis(x, axis, 0) if axis else x
            for x, axis in zip(arrays, axes, strict=True)
        ]
        return primitive.bind(*first), [None if axis is None else 0 for axis in axes]

    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True))
    return primitive.bind


def operation(
    name: str, function: Callable[..., jax.Array], dtype: DTypeLike | None
) -> Primitive:
    """A primitive for an elementwise function. It is compiled, batched and
    differentiated as that function, and kernels can recognize it. `dtype` is that of
    its results, or `None` if they have that of its first argument."""
    primitive = Primitive(name)
    compiled = jax.jit(function)
    primitive.def_impl(compiled)

    def type_of_result(first: Any, *others: Any) -> Any:
        # Those of the others differ in their dtypes alone, but where meshes divide
        # them.
        kind: Any = first.update(weak_type=False)
        for x in others:
            if x.update(dtype=first.dtype, weak_type=False) != kind:
                return jax.make_jaxpr(compiled)(first, *others).out_avals[0]
        return kind if dtype is None else kind.update(dtype=jnp.dtype(dtype))

    primitive.def_abstract_eval(type_of_result)
    ad.primitive_jvps[primitive] = lambda primals, tangents: jax.jvp(
        function, primals, tuple(map(ad.instantiate_zeros, tangents))
    )
    is_unary = len(inspect.signature(function).parameters) == 1
    batched = batching.defvectorized if is_unary else batching.defbroadcasting
    batched(primitive)
    lowered = mlir.lower_fun(function, multiple_results=False)
    mlir.register_lowering(primitive, lowered)
    return primitive


def refusal(name: str, refuse: Callable[..., NoReturn]) -> Primitive:
    """A primitive that can be traced, differentiated and batched. It raises when its
    value is computed, or a cotangent is pulled back through it: `refuse` is called with
    the arguments of the primitive."""
    primitive = Primitive(name)
    primitive.def_impl(refuse)
    primitive.def_abstract_eval(lambda x, **_: x)
    ad.deflinear2(primitive, refuse)
    batching.primitive_batchers[primitive] = lambda args, axes, **kwargs: (
        primitive.bind(*args, **kwargs),
        axes[0],
    )
    mlir.register_lowering(primitive, refuse)
    return primitive
