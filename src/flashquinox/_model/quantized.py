"""Parameters of quantized weights among the leaves of a model: scales and zero points,
which are floating-point arrays as weights are, but are not meant to be trained."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .._common.text import shown
from .trained import is_float_array
from .trees import is_array, Leaf


# Names as of Qwix, AQT, bitsandbytes, GPTQ and AWQ, and parts of such names.
_SCALES = re.compile(r"scale|zero|absmax|amax")
# Other things have these names, too, next to integers of more than 8 bits.
_SHORT_SCALES = re.compile(r"(^|_)(s|z|zp)$")
_CODES = re.compile(r"code|qvalue|quant|qweight|packed|int[48]")
_CODE_DTYPES = ("float8", "float4", "int", "uint")

# What is left of two paths that differ in one key: what is before it, and behind it.
_Around = tuple[tuple[Any, ...], tuple[Any, ...]]


def check_no_scales(call: str, leaves: Sequence[Leaf], trained: Iterable[int]) -> None:
    """What would be trained must not be a scale or a zero point of a quantized weight.

    Which is one is told by its name, `scale` for instance, and by codes next to it: an
    array of integers, or of floats of 8 or 4 bits, that has more elements, and whose
    path differs in that name alone. In a tuple, which has no names, the shape decides.

    Where codes were left out, as `eqx.filter(model, eqx.is_inexact_array)` does, the
    caller may have chosen the scales: that gives a warning.

    **Raises:**

    `ValueError` with the first one, and their number.
    """
    codes, left_out = _codes(leaves), {}
    for leaf in leaves:
        if leaf.value is None:
            for around, key in _keys(leaf):
                if isinstance(key, str) and _CODES.search(key.lower()):
                    left_out[around] = leaf
    if not codes and not left_out:
        return
    chosen = [leaves[i] for i in trained]
    found = list(_scales(chosen, codes))
    remedy = (
        "Make the state of what is to be trained: `trained, frozen = "
        "eqx.partition(model, spec)`, where `spec` has False for them and for their "
        f"codes, and `{call}(trained)`."
    )
    if found:
        scale, code = found[0]
        raise ValueError(
            f"`{call}`: the leaf at `{scale.name}` looks like a scale or a zero point "
            f"of the quantized weight at `{code.name}`, {shown(code.value)}"
            f"{_and_others(found)}. It would be trained. {remedy}"
        )
    found = list(_scales(chosen, left_out))
    if found:
        scale, code = found[0]
        warnings.warn(
            f"`{call}`: the leaf at `{scale.name}` looks like a scale or a zero point "
            f"of a quantized weight whose codes, at `{code.name}`, were left out"
            f"{_and_others(found)}. It will be trained. Was it meant to be? {remedy}",
            stacklevel=5,
        )


def scales(leaves: Sequence[Leaf]) -> list[Leaf]:
    """The floating-point leaves that look like scales or zero points of quantized
    weights, whose codes are next to them."""
    codes = _codes(leaves)
    if not codes:
        return []
    chosen = [leaf for leaf in leaves if is_float_array(leaf.value)]
    return [leaf for leaf, _ in _scales(chosen, codes)]


def _codes(leaves: Sequence[Leaf]) -> dict[_Around, Leaf]:
    found = {}
    for leaf in leaves:
        if _is_code(leaf.value):
            found |= {around: leaf for around, _ in _keys(leaf)}
    return found


def _is_code(x: Any) -> bool:
    # The dtype of random keys is none of NumPy's.
    return is_array(x) and str(x.dtype).startswith(_CODE_DTYPES)


def _keys(leaf: Leaf) -> Iterator[tuple[_Around, Any]]:
    path = leaf.unwrapped
    for i, key in enumerate(path):
        yield (path[:i], path[i + 1 :]), key


def _scales(
    chosen: list[Leaf], codes: dict[_Around, Leaf]
) -> Iterator[tuple[Leaf, Leaf]]:
    """Each leaf that looks like a scale, with the codes next to it."""
    for leaf in chosen:
        for around, key in _keys(leaf):
            code = codes.get(around)
            if code is not None and _belong_together(key, leaf.value, code.value):
                yield leaf, code
                break


def _belong_together(key: Any, scale: Any, code: Any) -> bool:
    if code is not None and not scale.size < code.size:
        return False
    if isinstance(key, str):
        names = [_SCALES]
        if code is not None and code.dtype.itemsize == 1:
            names.append(_SHORT_SCALES)
        return any(name.search(key.lower()) for name in names)
    # An entry of a tuple: codes and scales have as many axes, and tiles share a scale.
    if code is None or code.dtype.itemsize > 1 or scale.ndim != code.ndim:
        return False
    pairs = zip(code.shape, scale.shape, strict=True)
    return all(length > 0 and whole % length == 0 for whole, length in pairs)


def _and_others(found: list[Any]) -> str:
    count = len(found) - 1
    some = {0: "", 1: "; and so does 1 other leaf"}
    return some.get(count, f"; and so do {count} other leaves")
