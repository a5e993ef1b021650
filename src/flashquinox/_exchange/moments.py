"""Moments as arrays of numbers, into a state and out of it."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from .._codec import AbstractMomentCodec, QuantMoment, StoredMoment
from .._place import compute_like, put_like
from .._regroup import encode_nearest


def store(call: str, name: str, moment: Any, like: StoredMoment) -> StoredMoment:
    """A moment as `like` is stored, and where it is: its codes rounded to nearest.

    **Raises:**

    `TypeError` or `ValueError` if it is no floating-point array of the shape of `like`.
    """
    stored = like.codes if isinstance(like, QuantMoment) else like
    dtype = getattr(moment, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{call}`: {name} is no floating-point array but {dtype or repr(moment)}. "
            "Pass the state of the model's weights, all of them trained by one "
            "optimizer."
        )
    if moment.shape != stored.shape:
        raise ValueError(
            f"`{call}`: {name} has shape {moment.shape}, and the state to fill "
            f"{stored.shape}. Pass states of the same model."
        )
    if not isinstance(like, QuantMoment):
        cast = partial(_cast, dtype=like.dtype)
        moment = compute_like(call, name, cast, [moment], [like])
        return put_like(call, name, moment, like)
    if not is_of_one_leaf(like):
        raise ValueError(
            f"`{call}`: {name} is to be stored in scales of shape {like.scales.shape}, "
            f"where its groups need {like.layout.scale_shape}. Convert an ensemble "
            "under `jax.vmap`."
        )
    encode = partial(_encode, codec=like.codec, groups=(like.axis, like.group_size))
    codes, scales = compute_like(
        call, name, encode, *_with_parameter([moment], [like.codes], like)
    )
    return with_bits(call, name, codes, scales, like)


def is_of_one_leaf(like: QuantMoment) -> bool:
    """Whether a moment has the scales of one leaf; not of an ensemble of them."""
    is_one = like.parameter is None or like.parameter.ndim == 0
    return is_one and like.scales.shape == like.layout.scale_shape


def with_bits(
    call: str, name: str, codes: Any, scales: Any, like: QuantMoment
) -> QuantMoment:
    """A moment of these codes and scales, where `like` is."""
    parts = (
        put_like(call, name, codes, like.codes),
        put_like(call, name, scales, like.scales),
    )
    return eqx.tree_at(lambda x: (x.codes, x.scales), like, parts)


def load(call: str, name: str, stored: StoredMoment, like: Any) -> Any:
    """A stored moment as numbers in the dtype of `like`, and where that is."""
    if isinstance(stored, QuantMoment):
        groups = stored.axis, stored.group_size
        function = partial(_decode, codec=stored.codec, groups=groups, dtype=like.dtype)
        arrays: list[Any] = [stored.codes, stored.scales]
        arrays, _ = _with_parameter(arrays, arrays, stored)
    else:
        function, arrays = partial(_cast, dtype=like.dtype), [stored]
    moment = compute_like(call, name, function, arrays, arrays)
    return put_like(call, name, moment, like)


def to_numpy(call: str, name: str, stored: StoredMoment) -> Float32[np.ndarray, "..."]:
    """A stored moment as numbers on the host."""
    return load(call, name, stored, np.zeros((), np.float32))


def _with_parameter(
    arrays: list[Any], likes: list[Any], stored: QuantMoment
) -> tuple[list[Any], list[Any]]:
    if stored.parameter is None:
        return arrays, likes
    return [*arrays, stored.parameter], [*likes, stored.parameter]


@partial(jax.jit, static_argnames=("codec", "groups"))
def _encode(
    moment: Float[Array, "*shape"],
    parameter: Float32[Array, ""] | None = None,
    *,
    codec: AbstractMomentCodec,
    groups: tuple[int | None, int],
) -> tuple[Shaped[Array, "*shape"], Shaped[Array, "..."]]:
    return encode_nearest(moment.astype(jnp.float32), codec, groups, parameter)


@partial(jax.jit, static_argnames=("codec", "groups", "dtype"))
def _decode(
    codes: Shaped[Array, "*shape"],
    scales: Shaped[Array, "..."],
    parameter: Float32[Array, ""] | None = None,
    *,
    codec: AbstractMomentCodec,
    groups: tuple[int | None, int],
    dtype: DTypeLike,
) -> Float[Array, "*shape"]:
    return QuantMoment(codes, scales, *groups, codec, parameter).decode().astype(dtype)


@partial(jax.jit, static_argnames="dtype")
def _cast(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    return x.astype(dtype)
