"""Checks of codecs when an optimizer is built: each step must be elementwise, over a
tile or over groups, and return the shapes and dtypes that the next step takes."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._common.elementwise_checks import check_array, check_elementwise
from .._common.text import shown
from .codec import AbstractMomentCodec, Dither
from .companded import CompandedCodec
from .full_precision import FullPrecision
from .learned_codec import initial_parameter, with_parameter


def check_codec(call: str, codec: AbstractMomentCodec) -> None:
    """Raises if the steps of a codec are not elementwise, or do not fit together."""
    if codec in _checked:
        return
    call = f"{call}(moments=...)"
    _Steps(call, codec).check()
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked.add(codec)


# Codecs that passed, so that each is traced once in a process.
_checked: set[AbstractMomentCodec] = set()
_MOST_CHECKED = 1024


_one = jax.ShapeDtypeStruct((), jnp.float32)
_integer = jax.ShapeDtypeStruct((), jnp.uint32)


_REMEDY = (
    "Compute each element from the same element of the arguments alone; what belongs "
    "to a whole group is for `statistics` and `fit`."
)


class _Steps:
    def __init__(self, call: str, codec: AbstractMomentCodec):
        self.call, self.codec = call, codec
        # Of a curve, that is what a user wrote.
        self.name = type(codec).__name__
        if isinstance(codec, CompandedCodec):
            self.name = f"CompandedCodec({type(codec.curve).__name__})"

    def check(self) -> None:
        codes, scales = self._dtypes()
        self._check_encoding(codes, scales)
        self._check_decoding(codes, scales)

    def _dtypes(self) -> tuple[Any, Any]:
        """Those of codes and scales."""
        if isinstance(self.codec, FullPrecision):
            return jnp.float32, None
        dtypes = self.codec.dtypes
        try:
            codes, scales = map(jnp.dtype, dtypes)  # pyright: ignore
        except (TypeError, ValueError):
            codes = scales = jnp.dtype(jnp.bool_)
        if not jnp.issubdtype(codes, jnp.integer):
            raise TypeError(
                f"`{self.call}`: `{self.name}.dtypes` must be an integer dtype for "
                "codes and a dtype for scales, such as `(jnp.int8, jnp.bfloat16)`; got "
                f"{shown(dtypes)}."
            )
        return codes, scales

    def _check_encoding(self, codes: Any, scales: Any) -> None:
        prepared = self._step("prepare", [_tile], lambda _, codec, m: codec.prepare(m))
        statistics = self._step("statistics", [_like(prepared)], self._statistics)

        def fit(shape: Any, codec: Any, of_groups: Any, factor: Any, *dither: Any):
            found, constants = codec.fit(tuple(of_groups), factor, Dither(*dither))
            self._check("fit", "scales", found, shape, scales)
            return found, constants

        scalars = [lambda _, x=x: x for x in (_one, _one, _integer)]
        _, constants = self._step("fit", [_like(statistics), *scalars], fit)

        def quantize(shape: Any, codec: Any, prepared: Any, constants: Any):
            found = codec.quantize(prepared, constants)
            self._check("quantize", "codes", found, shape, codes)
            return found

        self._step("quantize", [_like(prepared), _like(constants)], quantize)

    def _check_decoding(self, codes: Any, scales: Any) -> None:
        of = lambda dtype: (
            lambda shape: None if dtype is None else jax.ShapeDtypeStruct(shape, dtype)
        )

        def decode_constants(_: Any, codec: Any, scales: Any, factor: Any):
            return codec.decode_constants(scales, factor, jnp.float32)

        arguments = [of(scales), lambda _: _one]
        constants = self._step("decode_constants", arguments, decode_constants)

        def dequantize(shape: Any, codec: Any, codes: Any, constants: Any):
            found = codec.dequantize(codes, constants, jnp.float32)
            self._check("dequantize", "the moment", found, shape, jnp.float32)
            return found

        self._step("dequantize", [of(codes), _like(constants)], dequantize)

    def _statistics(self, _: Any, codec: Any, prepared: Any) -> list[Any]:
        found = []
        for reduction, x in codec.statistics(prepared):
            if reduction not in (jnp.max, jnp.min):
                raise ValueError(
                    f"`{self.call}`: `{self.name}.statistics` reduces by "
                    f"{shown(reduction)}. Groups may be filled up with copies of an "
                    "element: take `jnp.max` or `jnp.min`."
                )
            found.append(x)
        return found

    def _check(self, step: str, name: str, x: Any, shape: Any, dtype: Any) -> None:
        if dtype is None and x is None:
            return
        method = f"{self.name}.{step}"
        check_array(self.call, method, name, x, shape, dtype)

    def _step(self, step: str, arguments: Any, function: Any) -> Any:
        """The shapes of what a step returns. Arguments are given for a shape, which is
        that of a tile or of the groups of one."""
        codec = self.codec

        def learned(shape: Any, parameter: Any, *args: Any) -> Any:
            return function(shape, with_parameter(codec, parameter), *args)

        def of_shape(shape: Any) -> Any:
            parameter = None if initial_parameter(codec) is None else _one
            return parameter, *(argument(shape) for argument in arguments)

        method = f"{self.name}.{step}"
        return check_elementwise(self.call, method, learned, of_shape, _REMEDY)


def _tile(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _like(tree: Any) -> Any:
    """What a step returned, for the next one. What belongs to groups comes back with a
    value for each element."""
    struct = lambda x, shape: jax.ShapeDtypeStruct(shape if x.shape else (), x.dtype)
    return lambda shape: jtu.tree_map(lambda x: struct(x, shape), tree)
