"""Restoring a model without the state of its optimizer: which arrays it comes from."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from .._common.errors import CheckpointError


class Source(NamedTuple):
    """The names of the arrays that a leaf is restored from.

    `widened` is whether the stored weight is narrower than the leaf, which then gets
    the float32 master weight: weight plus `correction`, if that was saved.
    """

    name: str
    widened: bool = False
    correction: str | None = None


def sources(
    call: str, where: str, arrays: dict[str, Any], likes: dict[str, Any]
) -> dict[str, Source]:
    """For each array of a model, by its name, where it comes from. `arrays` is from the
    manifest.

    Names must be equal, except that layers may be wrapped by [`flashquinox.cast`][] in
    one of the two models and not in the other.

    **Raises:**

    `CheckpointError` if it is not clear which is the correction of a weight.
    """
    others: dict[str, list[str]] = {}
    for name in arrays:
        if is_of_model(name) and name not in likes:
            others.setdefault(_without_wraps(name), []).append(name)
    found = {}
    for name, like in likes.items():
        source = name
        if name not in arrays:
            candidates = others.get(_without_wraps(name), [])
            source = candidates[0] if len(candidates) == 1 else name
        found[name] = Source(source)
        if _is_widened(arrays.get(source), like):
            correction = _correction(call, where, arrays, source)
            found[name] = Source(source, True, correction)
    return found


def is_of_model(name: str) -> bool:
    return name.startswith("model")


def as_stored(like: Any, description: dict[str, Any]) -> Any:
    """The shape and the stored dtype of a weight that a correction is added to."""
    return jax.ShapeDtypeStruct(np.shape(like), description["dtype"])


def _is_widened(stored: dict[str, Any] | None, like: Any) -> bool:
    narrow = ("bfloat16", "float16")
    wide = str(like.dtype) == "float32"
    return wide and stored is not None and stored["dtype"] in narrow


def _correction(call: str, where: str, arrays: dict[str, Any], name: str) -> str | None:
    stored = arrays[name]
    corrections = [other for other in arrays if re.search(r"\bcorrections\b", other)]
    path = name.removeprefix("model")
    own = [other for other in corrections if other.endswith(f".corrections{path}")]
    if not own:
        # The state may be that of a part of the model, with shorter paths.
        known = tuple(
            f".corrections{other.removeprefix('model')}"
            for other in arrays
            if is_of_model(other)
        )
        own = [
            other
            for other in corrections
            if _corrects(arrays[other], stored) and not other.endswith(known)
        ]
        if not own:
            return None
    elif len(own) == 1 and _corrects(arrays[own[0]], stored):
        return own[0]
    raise CheckpointError(
        f"`{call}`: in {where}, the float32 master weight of `{name}` may be that of "
        f"{' or '.join(f'`{other}`' for other in own[:3])}. Restore the model in the "
        "dtypes that it was saved in; or with the state that was saved, and use "
        "`flashquinox.master_weights`."
    )


def _corrects(correction: dict[str, Any], weight: dict[str, Any]) -> bool:
    same = correction["shape"] == weight["shape"]
    return same and correction["dtype"] in ("int8", "int16")


def _without_wraps(name: str) -> str:
    return re.sub(r"\.layer(?=[.\[]|$)", "", name)
