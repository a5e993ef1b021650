"""The shapes of a model with adapters (LoRA) on a frozen or quantized base."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


# For each kind of base: the dtype of the codes, and how many elements of a row share a
# scale (`None`: all of them). The blocks of 64 are those of QLoRA, and those of 128
# those of GPTQ and AWQ.
BASES: dict[str, tuple[Any, int | None]] = {
    "int8": (jnp.int8, None),
    "fp8": (jnp.float8_e4m3fn, None),
    "int4": (jnp.int4, 128),
    "nf4": (jnp.uint4, 64),
}


def with_adapters(
    model: dict[str, Any], rank: int, base: str | None
) -> tuple[dict[str, Any], PyTree[bool]]:
    """A model of `architectures.structs` with low-rank adapters on all matrices of its
    blocks, and which of its leaves are trained: the adapters.

    A matrix (layers, out, in) gets the factors (layers, rank, in) and (layers, out,
    rank), of its dtype. It stays in its dtype, or is stored as codes and scales, which
    have that dtype.
    """

    def adapted(x: jax.ShapeDtypeStruct) -> Any:
        if len(x.shape) != 3:
            return x
        layers, out, into = x.shape
        struct = lambda *shape: jax.ShapeDtypeStruct(shape, x.dtype)
        weight: Any = x
        if base is not None:
            dtype, shared = BASES[base]
            scales = struct(layers, out, math.ceil(into / (shared or into)))
            weight = {"codes": jax.ShapeDtypeStruct(x.shape, dtype), "scales": scales}
        down, up = struct(layers, rank, into), struct(layers, out, rank)
        return {"weight": weight, "down": down, "up": up}

    blocks = jtu.tree_map(adapted, model["blocks"])
    shapes = model | {"blocks": blocks}
    is_adapter = lambda path, _: path[-1].key in ("down", "up")
    return shapes, jtu.tree_map_with_path(is_adapter, shapes)
