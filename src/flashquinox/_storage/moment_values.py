"""Stores arrays of numbers as moments of a state, and loads them again."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Shaped

from .._common import eager
from .._common.placement import compute_like, put_like
from .codec import AbstractMomentCodec
from .groups_of_small import decoding, encoding
from .moment_bases import with_base
from .quant_moment import base_of, QuantMoment, StoredMoment
from .regroup import encode_nearest, Groups
from .relative_moment import over_root, times_root


def store(
    call: str,
    name: str,
    moment: Any,
    like: StoredMoment,
    base: StoredMoment | None = None,
) -> StoredMoment:
    """A moment stored like `like`: by its codec, in its groups, on its devices. Codes
    and scales are rounded to nearest. `base` is the stored moment that this one is
    relative to, if `like` is.

    **Raises:**

    `TypeError` or `ValueError` if `moment` is no floating-point array of the shape of
    `like`.
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
        cast = eager.elementwise(partial(_cast, dtype=like.dtype))
        moment = compute_like(call, name, cast, [moment], [like])
        return put_like(call, name, moment, like)
    _check_is_of_one_leaf(call, name, like)
    if like.relative_to is not None:
        base = base_of(call, name, like, base)
        root = load(call, name, base, _float32_like(like.codes))
        divide = eager.elementwise(_over_root)
        moment = compute_like(call, name, divide, [moment, root], [like.codes] * 2)
    encode = encoding(partial(_encode, codec=like.codec), like.layout)
    given = _with_parameter([moment], [like.codes], like)
    codes, scales = compute_like(call, name, encode, *given)
    new = with_bits(call, name, codes, scales, like)
    return new if base is None else with_base(new, base)


def is_of_one_leaf(like: QuantMoment) -> bool:
    """Whether a moment is that of one leaf, not of an ensemble made by `vmap`."""
    is_one = like.parameter is None or like.parameter.ndim == 0
    return is_one and like.scales.shape == like.layout.scale_shape


def _check_is_of_one_leaf(call: str, name: str, like: QuantMoment) -> None:
    if is_of_one_leaf(like):
        return
    what, found, needed = "scales", like.scales.shape, like.layout.scale_shape
    if found == needed:
        assert like.parameter is not None
        what, found, needed = "a parameter", like.parameter.shape, ()
    raise ValueError(
        f"`{call}`: {name} is stored with {what} of shape {found}, where one leaf of "
        f"its shape has {needed}. Call it under `jax.vmap` for an ensemble."
    )


def with_bits(
    call: str, name: str, codes: Any, scales: Any, like: QuantMoment
) -> QuantMoment:
    """A moment of these codes and scales, where `like` is."""
    parts = (
        put_like(call, name, codes, like.codes),
        put_like(call, name, scales, like.scales),
    )
    return eqx.tree_at(lambda x: (x.codes, x.scales), like, parts)


def _float32_like(codes: Any) -> Any:
    if isinstance(codes, jax.core.Tracer):
        return codes.astype(jnp.float32)
    there = codes.sharding if isinstance(codes, jax.Array) and codes.committed else None
    return jax.ShapeDtypeStruct(codes.shape, jnp.float32, sharding=there)


def load(
    call: str,
    name: str,
    stored: StoredMoment,
    like: Any,
    base: StoredMoment | None = None,
) -> Any:
    """A stored moment as numbers in the dtype of `like`, and where that is. `base` is
    the moment that it is relative to, if it is."""
    if isinstance(stored, QuantMoment) and stored.relative_to is not None:
        base = base_of(call, name, stored, base)
        both = [_load(call, name, stored, like), load(call, name, base, like)]
        multiply = eager.elementwise(_times_root)
        moment = compute_like(call, name, multiply, both, both)
        return put_like(call, name, moment, like)
    return _load(call, name, stored, like)


def _load(call: str, name: str, stored: StoredMoment, like: Any) -> Any:
    if isinstance(stored, QuantMoment):
        decode = partial(_decode, codec=stored.codec, dtype=like.dtype)
        arrays: list[Any] = [stored.codes, stored.scales]
        arrays, _ = _with_parameter(arrays, arrays, stored)
        if is_of_one_leaf(stored):
            function = decoding(decode, stored.layout)
        else:
            function = partial(decode, groups=(stored.axes, stored.group_size))
    else:
        function, arrays = eager.elementwise(partial(_cast, dtype=like.dtype)), [stored]
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
    groups: Groups,
) -> tuple[Shaped[Array, "*shape"], Shaped[Array, "..."]]:
    return encode_nearest(moment.astype(jnp.float32), codec, groups, parameter)


@partial(jax.jit, static_argnames=("codec", "groups", "dtype"))
def _decode(
    codes: Shaped[Array, "*shape"],
    scales: Shaped[Array, "..."],
    parameter: Float32[Array, ""] | None = None,
    *,
    codec: AbstractMomentCodec,
    groups: Groups,
    dtype: DTypeLike,
) -> Float[Array, "*shape"]:
    stored = QuantMoment(codes, scales, *groups, codec, parameter)
    return stored.decode_stored().astype(dtype)


@jax.jit
def _times_root(
    relative: Float[Array, "*shape"], base: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    wide = times_root(relative.astype(jnp.float32), base.astype(jnp.float32))
    return wide.astype(relative.dtype)


@jax.jit
def _over_root(
    moment: Float[Array, "*shape"], base: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    return over_root(moment.astype(jnp.float32), base.astype(jnp.float32))


@partial(jax.jit, static_argnames="dtype")
def _cast(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    return x.astype(dtype)


def encode(like: QuantMoment, values: Any, base: StoredMoment | None) -> QuantMoment:
    """What `QuantMoment.encode` says."""
    call, name = "QuantMoment.encode", "`values`"
    new = _stored(call, name, values, like, base)
    assert isinstance(new, QuantMoment)
    return new


def _stored(
    call: str,
    name: str,
    values: Any,
    like: StoredMoment,
    base: StoredMoment | None = None,
) -> StoredMoment:
    values = _storable(call, name, values, like)
    new = store(call, name, values, like, base)
    if not isinstance(new, QuantMoment):
        return new
    # Scales end before float32 does.
    given = eager.largest(values)
    found = eager.largest(_numbers(call, name, new))
    message = (
        f"`{call}`: {name} has numbers that are too large for the scales of "
        f"{type(new.codec).__name__}."
    )
    if new.relative_to is not None:
        message += (
            f" They are stored in units of the root of {new.relative_to!r}, which must "
            "not be zero where they are not."
        )
    traced = isinstance(given, jax.core.Tracer) or isinstance(found, jax.core.Tracer)
    if not traced:
        given, found = float(given), float(found)
    wrong = ~jnp.isfinite(found) | ((given > 1) & (found < given / 2))
    if traced:
        return eqx.tree_at(
            lambda x: x.codes, new, replace_fn=lambda x: eqx.error_if(x, wrong, message)
        )
    if wrong:
        raise ValueError(message)
    return new


def _numbers(
    call: str, name: str, stored: Any, base: StoredMoment | None = None
) -> Any:
    if not isinstance(stored, QuantMoment):
        return stored
    _check_is_of_one_leaf(call, name, stored)
    return load(call, name, stored, _float32_like(stored.codes), base)


def _storable(call: str, name: str, values: Any, like: StoredMoment) -> Any:
    """Numbers of the shape of the moment: finite, and not negative where that cannot be
    stored."""
    shape = like.codes.shape if isinstance(like, QuantMoment) else like.shape
    dtype = getattr(values, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{call}`: {name} must be a floating-point array of shape {shape}; got "
            f"{dtype or type(values).__name__}."
        )
    if values.shape != shape:
        raise ValueError(
            f"`{call}`: {name} must have the shape {shape} of the weight; got "
            f"{values.shape}."
        )
    signed = not isinstance(like, QuantMoment) or "signed" in like.codec.kinds
    wrong = _is_wrong(values, signed=signed)
    message = (
        f"`{call}`: {name} must be finite{'' if signed else ' and at least 0'}, and is "
        "not everywhere."
    )
    if isinstance(wrong, jax.core.Tracer):
        return eqx.error_if(values, wrong, message)
    if wrong:
        raise ValueError(message)
    return values


def _is_wrong(x: Any, signed: bool) -> Any:
    here = eager.on_host(x)
    if here is None:
        return _is_wrong_on_device(x, signed=signed)
    return not np.all(np.isfinite(here) & (signed | (here >= 0)))


@partial(jax.jit, static_argnames="signed")
def _is_wrong_on_device(x: Float[Array, "*shape"], signed: bool) -> Bool[Array, ""]:
    wrong = ~jnp.isfinite(x)
    return jnp.any(wrong if signed else wrong | (x < 0))
