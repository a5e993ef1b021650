"""Types and numbers of C++: those of dtypes, literals, and conversions."""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..base import Unsupported


class Operand(NamedTuple):
    """A value as an expression, whose dtype is that of its variable."""

    text: str
    dtype: Any
    # Whether it is the same for all elements of a leaf.
    is_uniform: bool


_TYPES = {
    "float32": "float",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int32": "int",
    "uint32": "unsigned",
    "int16": "short",
    "uint16": "unsigned short",
    "int8": "signed char",
    "uint8": "unsigned char",
    "bool": "bool",
}
# Floating-point numbers that are stored, and not computed with.
_NARROW = {"bfloat16", "float16"}


# A program asks a thousand times, and NumPy takes microseconds for a name.
@functools.cache
def type_of(dtype: Any) -> str:
    """The type of variables of a dtype."""
    name = jnp.dtype(dtype).name
    if name not in _TYPES:
        raise Unsupported(f"numbers of {name}")
    return _TYPES[name]


def literal(x: Any) -> str:
    """A number."""
    number = np.asarray(x)
    if number.shape:
        raise Unsupported("an array of constants")
    kind = type_of(number.dtype)
    if number.dtype == jnp.bool_:
        return "true" if number else "false"
    if jnp.issubdtype(number.dtype, jnp.integer):
        # -2^31 as an expression is the negative of a number that is no int.
        return f"({kind}){int(number) & 0xFFFF_FFFF:#x}u"
    wide = float(number.astype(np.float32))
    text = f"{wide.hex()}f"
    if not math.isfinite(wide):
        bits = int(np.float32(wide).view(np.uint32))
        text = f"bit_cast<float>({bits:#x}u)"
    elif wide < 0 or text.startswith("-"):
        text = f"({text})"
    return narrowed(text, number.dtype)


@functools.cache
def is_narrow(dtype: Any) -> bool:
    return jnp.dtype(dtype).name in _NARROW


@functools.cache
def is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def widened(x: Operand) -> str:
    return f"widened({x.text})" if is_narrow(x.dtype) else x.text


def narrowed(text: str, dtype: Any) -> str:
    return f"as_{jnp.dtype(dtype).name}({text})" if is_narrow(dtype) else text


def converted(x: Operand, dtype: Any) -> str:
    """A number in another dtype, as `astype` gives it."""
    to = type_of(dtype)
    if type_of(x.dtype) == to:
        return x.text
    wide = widened(x)
    if x.dtype == jnp.bool_:
        # Compilers for CPUs make vectors of a choice, and not of a conversion.
        wide = f"({wide} ? 1 : 0)"
    if is_float(dtype):
        if not is_float(x.dtype):
            wide = f"(float){wide}"
        return narrowed(wide, dtype)
    if to == "bool":
        return f"({wide} != 0)"
    if is_float(x.dtype):
        return f"to_integer<{to}>({wide})"
    return f"({to})({wide})"
