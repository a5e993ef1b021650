"""Own primitives: elementwise functions, and errors."""

import inspect
from collections.abc import Callable
from typing import NoReturn, TypeAlias

import jax
import jax.extend.core as jex
from jax.interpreters import ad, batching, mlir


Primitive: TypeAlias = jex.Primitive


def operation(name: str, function: Callable[..., jax.Array]) -> Primitive:
    """A primitive for an elementwise function. It is compiled, batched and
    differentiated as that function, and kernels can recognize it."""
    primitive = Primitive(name)
    compiled = jax.jit(function)
    primitive.def_impl(compiled)
    primitive.def_abstract_eval(
        lambda *avals: jax.make_jaxpr(compiled)(*avals).out_avals[0]
    )
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
