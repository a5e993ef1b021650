"""Master weights and moments from arrays of PyTorch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Shaped

from .._common.dtypes import NARROW_DTYPES
from .._model.trees import Leaf
from .._storage import moment_values
from .._storage.flashoptim import FlashOptimCodec
from .._storage.layout import flattened
from .._storage.quant_moment import QuantMoment, StoredMoment
from .torch_parameters import float_array, TORCH_MOMENTS, TorchParameter


Convert = Callable[[str, np.ndarray], np.ndarray]
# How many elements share a scale in FlashOptim.
_GROUP_SIZE = 32


def master_weight(call: str, parameter: TorchParameter) -> Float32[np.ndarray, "..."]:
    """The float32 master weight: the weight plus what its error bits stand for."""
    weight = parameter.weight
    errors = parameter.entries.get("error_bits")
    if errors is None:
        return weight.astype(np.float32)
    errors = _error_bits(call, parameter, np.asarray(errors))
    wide = weight.astype(np.float64)
    info = jnp.finfo(weight.dtype)
    _, exponent = np.frexp(wide)
    # Zero and subnormal numbers are spaced like the smallest normal ones.
    exponent = np.where(wide == 0, info.minexp, np.maximum(exponent - 1, info.minexp))
    half_unit = np.ldexp(1.0, exponent - info.nmant - 1)
    fraction = errors / float(np.iinfo(errors.dtype).max)
    return (wide + fraction * half_unit).astype(np.float32)


def _error_bits(
    call: str, parameter: TorchParameter, errors: Shaped[np.ndarray, "..."]
) -> Shaped[np.ndarray, "..."]:
    """Error bits as `int8` or `int16`. PyTorch casts the state of an optimizer to the
    dtype of the parameter. FlashOptim therefore saves `int8` as numbers of that dtype,
    and `int16` as the bits of such numbers."""
    weight = parameter.weight
    where = f"'error_bits' of {parameter.text}"
    if jnp.dtype(weight.dtype) not in NARROW_DTYPES or errors.shape != weight.shape:
        raise ValueError(
            f"`{call}`: {where}, {errors.dtype} of shape {errors.shape}, are not those "
            f"of a weight that is {weight.dtype} of shape {weight.shape}. Pass weights "
            "and state of one checkpoint, in the dtypes that they have there."
        )
    width = parameter.master_bytes
    if width is None and errors.dtype in (np.int8, np.int16):
        width = 2 + errors.dtype.itemsize
    if width == 3:
        if errors.dtype == np.uint16:
            errors = errors.view(jnp.bfloat16)
        return _exactly(call, where, errors, np.int8)
    if width == 4 and errors.dtype.itemsize == 2:
        return np.ascontiguousarray(errors).reshape(errors.shape).view(np.int16)
    raise ValueError(
        f"`{call}`: {where} are {errors.dtype}, and 'master_bytewidth' of their group "
        f"is {parameter.master_bytes}; it must be 3 or 4. Pass 'param_groups' as they "
        "were saved."
    )


def stored_moment(
    call: str,
    parameter: TorchParameter,
    key: str,
    leaf: Leaf,
    like: StoredMoment | None,
    base: StoredMoment | None,
    convert: Convert | None,
) -> StoredMoment:
    """A moment of a parameter, stored as `like` is, relative to `base` if that is: bit
    for bit where both are compressed alike, otherwise rounded to nearest."""
    name, kind = TORCH_MOMENTS[key]
    where = f"{name!r} of {parameter.text}"
    if like is None:
        raise ValueError(
            f"`{call}`: the state has no moment {key!r} at `{leaf.name}`. Make it with "
            "`init`, for this model."
        )
    entries, shape = parameter.entries, parameter.weight.shape
    if name in entries:
        moment = float_array(call, where, entries[name])
        _check_shape(call, where, moment, shape)
    else:
        codec = FlashOptimCodec(kind)
        codes, scales = (
            _part(call, where, entries, f"{name}::{part}", dtype)
            for part, dtype in (
                ("quantized", np.int8 if kind == "signed" else np.uint8),
                ("scales", np.float16),
            )
        )
        layout = flattened(shape, _GROUP_SIZE)
        _check_shape(call, where, codes, shape)
        _check_shape(call, f"the scales of {where}", scales, layout.scale_shape)
        if (
            convert is None
            and isinstance(like, QuantMoment)
            and like.codec == codec
            and like.relative_to is None
            and like.layout == layout
            and moment_values.is_of_one_leaf(like)
        ):
            return moment_values.with_bits(call, where, codes, scales, like)
        groups = layout.axes, layout.group_size
        quantized = QuantMoment(jnp.asarray(codes), jnp.asarray(scales), *groups, codec)
        moment = moment_values.to_numpy(call, where, quantized)
    if convert is not None:
        moment = np.asarray(convert(parameter.name, moment))
    return moment_values.store(call, where, moment, like, base)


def _exactly(
    call: str, where: str, x: Shaped[np.ndarray, "..."], dtype: Any
) -> Shaped[np.ndarray, "..."]:
    """An array cast to a dtype that must represent its numbers exactly."""
    if x.dtype == dtype:
        return x
    with np.errstate(all="ignore"):
        new = x.astype(dtype)
    if not np.array_equal(new.astype(np.float64), x.astype(np.float64), equal_nan=True):
        raise ValueError(
            f"`{call}`: {where}, which came as {x.dtype}, has numbers that are none of "
            f"{np.dtype(dtype)}. Pass the arrays of the checkpoint as they were saved."
        )
    return new


def _part(
    call: str, where: str, entries: Mapping[str, Any], key: str, dtype: Any
) -> Shaped[np.ndarray, "..."]:
    if key not in entries:
        raise ValueError(
            f"`{call}`: {where} has no {key!r}. Pass all that was saved of it."
        )
    return _exactly(call, f"{key!r} of {where}", np.asarray(entries[key]), dtype)


def _check_shape(
    call: str, where: str, x: Shaped[np.ndarray, "..."], shape: tuple[int, ...]
) -> None:
    if x.shape != shape:
        raise ValueError(
            f"`{call}`: {where} has shape {x.shape}, where its weight needs {shape}. "
            "Pass weights and state of one checkpoint."
        )
