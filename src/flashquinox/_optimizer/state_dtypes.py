"""Checks of the dtypes of a state's arrays.

`jax.tree.map` over a state, to cast it or to average several, changes their dtypes. A
step would then compute nonsense without an error.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._common.dtypes import compute_dtype
from .._model.trees import Leaf
from .._storage.learned_codec import initial_parameter
from .._storage.quant_moment import QuantMoment, StoredMoment
from .._storage.split import CORRECTION_DTYPES
from .state import OptimizerState


def check_count_dtype(call: str, state: OptimizerState) -> None:
    """The count of steps must be a Python integer, or an array of 32 bits or more."""
    count = state.count
    dtype = jnp.dtype(getattr(count, "dtype", type(count)))
    if not jnp.issubdtype(dtype, jnp.integer) or dtype.itemsize < 4:
        _raise_dtype(call, "count of steps", "`state.steps.count`", count, "int32")


def check_moment_dtypes(call: str, leaf: Leaf, name: str, moment: StoredMoment) -> None:
    what = f"moment {name!r}"
    if not isinstance(moment, QuantMoment):
        expected = [(what, moment, compute_dtype(leaf.value.dtype))]
    else:
        assert moment.codec.dtypes is not None
        codes, scales = moment.codec.dtypes
        expected = [
            (f"codes of the {what}", moment.codes, codes),
            (f"scales of the {what}", moment.scales, scales),
        ]
        if moment.parameter is not None and initial_parameter(moment.codec) is not None:
            expected.append((f"parameter of the {what}", moment.parameter, jnp.float32))
    for part, x, dtype in expected:
        if getattr(x, "dtype", None) != jnp.dtype(dtype):
            _raise_dtype(call, part, f"`{leaf.name}`", x, jnp.dtype(dtype).name)


def check_correction_dtype(call: str, leaf: Leaf, correction: Any) -> None:
    if getattr(correction, "dtype", None) not in CORRECTION_DTYPES.values():
        _raise_dtype(call, "correction", f"`{leaf.name}`", correction, "int8 or int16")


def _raise_dtype(call: str, what: str, where: str, x: Any, expected: str) -> None:
    found = getattr(x, "dtype", None) or repr(x)
    if isinstance(x, np.ndarray | jax.Array):
        found = x.dtype.name
    raise TypeError(
        f"`{call}`: the {what} at {where} in the state is {found}, and must be "
        f"{expected}. It was cast after it was stored: pass the state as `init` or the "
        "previous step returned it."
    )
