"""The scalars of a step as operands of a kernel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int32, Scalar

from ..._tile.step import LeafScalars, StepScalars
from .types import type_of


class Words(NamedTuple):
    """The scalars of a step in 32-bit words: those of all leaves, and those of each, if
    there are any that are not known now. XLA would make every further array by another
    launch, and even constant ones take time."""

    arrays: tuple[Int32[Array, " words"], ...]
    # What they are in terms of the words.
    scalars: tuple[str, ...]

    @staticmethod
    def of(
        scalars: StepScalars, leaves: Sequence[LeafScalars], numbered: bool
    ) -> "Words":
        """`numbered`: whether the numbers of leaves are known now."""
        unknown = [x.parameters if numbered else x for x in leaves]
        width = len(jtu.tree_leaves(unknown[0]))
        shared, texts, own = [], [], 0
        for path, x in jtu.tree_leaves_with_path(scalars):
            if path == _NUMBER and numbered:
                texts.append("number")
                continue
            if path[0] == _NUMBER[0]:
                word, own = f"own[leaf * {width} + {own}]", own + 1
            else:
                word = f"shared[{len(shared)}]"
                shared.append(x)
            texts.append(_of_word(word, x.dtype))
        every = [shared, jtu.tree_leaves(unknown)]
        arrays = [jnp.stack([_word(x) for x in xs]) for xs in every if xs]
        return Words(tuple(arrays), tuple(texts))


_NUMBER = jtu.GetAttrKey("leaf"), jtu.GetAttrKey("number")


def _word(x: Scalar) -> Int32[Array, ""]:
    """A scalar in 32 bits."""
    if x.dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.int32)
    return x.astype(jnp.int32)


def _of_word(word: str, dtype: Any) -> str:
    """The scalar that a 32-bit word stands for."""
    kind = type_of(dtype)
    if kind == "float":
        return f"bit_cast<float>({word})"
    return f"({word} != 0)" if kind == "bool" else f"({kind}){word}"
