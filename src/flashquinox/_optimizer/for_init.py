"""What of a model `init` of an optimizer gets."""

from typing import Any

import equinox as eqx

from .._model.trained import is_float_array
from .._model.trees import Model
from .._model.variables import flax_types
from .accumulate import AccumulatingOptimizer
from .optimizer import Optimizer


def for_init(optim: Any, model: Model) -> Model:
    """The model itself, or its floating-point arrays alone for Optax's wrappers: these
    make arrays like every leaf, functions among them, and their `update` gets what has
    gradients."""
    takes_any_model = isinstance(optim, Optimizer | AccumulatingOptimizer)
    is_wrapper = hasattr(optim, "init") and not takes_any_model
    if is_wrapper and not isinstance(model, flax_types()):
        return eqx.filter(model, is_float_array)
    return model
