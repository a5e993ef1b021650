"""Checks that arguments are in the right order, and are a model, a state and gradients,
before their leaves are compared."""

import warnings
from typing import Any

import jax
import jax.core
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from .._common.text import shown
from .._model.trees import Leaf, path_name
from .state import OptimizerState


_ORDER = (
    "the model comes before the state in `step(model, state, grads)`, the gradients "
    "before it in `update(grads, state, params)`."
)


def check_model(call: str, model: Any) -> None:
    check_given(call, model)
    check_not_state(call, model)


def check_given(call: str, model: Any) -> None:
    if model is None:
        raise TypeError(f"`{call}`: the model is None. Pass a tree of arrays.")


def check_not_state(call: str, model: Any) -> None:
    if isinstance(model, OptimizerState):
        raise TypeError(
            f"`{call}`: a `flashquinox.OptimizerState` came where the model belongs: "
            f"{_ORDER}"
        )


def check_not_optimizer(call: str, state: Any) -> None:
    if isinstance(state, optax.GradientTransformation):
        raise TypeError(
            f"`{call}`: an optimizer came where its state belongs, which holds no "
            "arrays. Pass what `init` or the last step returned."
        )


def warn_of_nothing_to_train(call: str, leaves: list[Leaf], trained: Any) -> None:
    """Warns of a model with nothing to train. A model without leaves is no reason to
    warn: wrappers pass it to an optimizer of other parts."""
    present = [leaf for leaf in leaves if leaf.value is not None]
    if trained or not present:
        return
    example = present[0]
    warnings.warn(
        f"`{call}`: there is nothing to train: the model has no arrays of bfloat16, "
        f"float16, float32 or float64 (at `{example.name}` it has "
        f"{shown(example.value)}). Make such arrays of what is to be trained.",
        stacklevel=5,
    )


def check_grads(call: str, grads: Any, model: Any) -> None:
    if grads is None:
        raise TypeError(
            f"`{call}`: `grads` is None. Pass a tree like the model; `None` may stand "
            "in it for a leaf or a subtree that is frozen."
        )
    if isinstance(grads, OptimizerState):
        raise TypeError(
            f"`{call}`: `grads` is a `flashquinox.OptimizerState`: {_ORDER}"
        )
    if isinstance(grads, tuple) and not isinstance(model, tuple | list):
        raise TypeError(
            f"`{call}`: `grads` is a tuple, and the model is none. `value_and_grad` "
            "returns a pair of the value and the gradients, and so do functions with "
            "`has_aux=True`: pass the gradients alone."
        )


def check_update(call: str, params: Any, extra_args: dict[str, Any]) -> None:
    """Checks what `update` got beside the gradients and the state."""
    if extra_args.get("max_norm") is not None:
        # Others are those of other transformations.
        raise TypeError(
            f"`{call}` does not clip: `max_norm` is an argument "
            "of `step`. Put `optax.clip_by_global_norm` before the optimizer, in "
            "`optax.chain`."
        )
    if params is None:
        raise ValueError(
            f"`{call}(grads, state, params)` got no `params`. The "
            "weights are part of the computation: pass them as third argument."
        )


def check_order(call: str, leaves: list[Leaf], grads: list[Any]) -> None:
    """Where the model has `None`, gradients must not have a function or a Python
    number: it is the model that has these. Otherwise the two have changed places."""
    for leaf, grad in zip(leaves, grads, strict=True):
        if leaf.value is None and grad is not None and not hasattr(grad, "dtype"):
            raise TypeError(
                f"`{call}`: `grads` has {shown(grad)} at `{leaf.name}`, where the "
                f"model has None. Have they changed places? Note that {_ORDER}"
            )


def check_has_values(call: str, **trees: PyTree) -> None:
    """All arrays must have values: none was donated, and none is a
    `jax.ShapeDtypeStruct`."""
    for name, tree in trees.items():
        for path, x in jtu.tree_leaves_with_path(tree):
            if isinstance(x, jax.ShapeDtypeStruct):
                raise TypeError(
                    f"`{call}`: there is no array at `{path_name(path)}` of `{name}` "
                    f"but {shown(x)}. Pass arrays; to see the shapes of what this "
                    "gives, call it by `jax.eval_shape`."
                )
            if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
                continue
            if x.is_deleted():
                # JAX raises a RuntimeError for this as well.
                raise RuntimeError(
                    f"`{call}`: the array at `{path_name(path)}` of `{name}` was "
                    "deleted, as it was donated to an earlier call. Go on with what "
                    "that call returned."
                )
