"""Steps of AdamW by this library and by Optax, and the shapes of their arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _models import Shapes

import flashquinox as fq
from flashquinox._backends.dispatch import Backend


def ours(
    backend: Backend, shapes: Shapes, is_asked: bool = False
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The step, and the shapes of its arguments. `is_asked`: by this backend, also
    where JAX's default device is another."""
    params = _structs(shapes, jnp.bfloat16)
    # Groups are as the backend wants them where its device is.
    state = jax.eval_shape(fq.adamw(1e-3, backend=backend).init, params)
    optim = fq.adamw(1e-3, backend=backend if is_asked or backend == "xla" else "auto")
    return optim.step, (params, state, params)


def optax_step(shapes: Shapes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    params = _structs(shapes, jnp.float32)
    optim = optax.adamw(1e-3)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optim.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, jax.eval_shape(optim.init, params), params)


def _structs(shapes: Shapes, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x, dtype) for x in shapes.values()]
