"""Whether a codec of a user's is one: each of its steps elementwise, over a tile or
over groups, and of the shapes and dtypes that the next step takes."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._common.elementwise_checks import check_array, check_elementwise, told
from .._common.text import shown
from .codec import AbstractMomentCodec, Dither, QuantMoment
from .companded import CompandedCodec
from .curves import RationalCurve
from .layout import Layout


def check_codec(call: str, codec: AbstractMomentCodec) -> None:
    if codec in _checked:
        return
    call = f"{call}(moments=...)"
    _check_learns(call, codec)
    _Steps(call, codec).check()
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked.add(codec)


_checked: set[AbstractMomentCodec] = set()
_MOST_CHECKED = 1024


def _check_learns(call: str, codec: AbstractMomentCodec) -> None:
    rational = isinstance(codec, CompandedCodec) and isinstance(
        codec.curve, RationalCurve
    )
    if codec.initial is not None and not rational:
        raise ValueError(
            f"`{call}`: only a `flashquinox.RationalCurve` can be learned; `initial` "
            f"must be None for other curves. Got {shown(codec)}."
        )


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
        axis = None if self.codec.flattened else -1
        layout = Layout((8, 64), axis, 32)
        init = lambda: self.codec.init(layout, jnp.float32)
        stored = told(self.call, f"{self.name}.init", jax.eval_shape, init)
        is_quantized = isinstance(stored, QuantMoment)
        codes = stored.codes.dtype if is_quantized else stored.dtype
        scales = stored.scales.dtype if is_quantized else None
        self._check_encoding(codes, scales)
        self._check_decoding(codes, scales)

    def _check_encoding(self, codes: Any, scales: Any) -> None:
        prepared = self._step("prepare", [_tile], lambda _, codec, m: codec.prepare(m))
        statistics = self._step("statistics", [_like(prepared)], self._statistics)

        def fit(shape: Any, codec: Any, of_groups: Any, factor: Any, *dither: Any):
            found, quantizer = codec.fit(tuple(of_groups), factor, Dither(*dither))
            self._check("fit", "scales", found, shape, scales)
            return found, quantizer

        scalars = [lambda _, x=x: x for x in (_one, _one, _integer)]
        _, quantizer = self._step("fit", [_like(statistics), *scalars], fit)

        def quantize(shape: Any, codec: Any, prepared: Any, quantizer: Any):
            found = codec.quantize(prepared, quantizer)
            self._check("quantize", "codes", found, shape, codes)
            return found

        self._step("quantize", [_like(prepared), _like(quantizer)], quantize)

    def _check_decoding(self, codes: Any, scales: Any) -> None:
        of = lambda dtype: (
            lambda shape: None if dtype is None else jax.ShapeDtypeStruct(shape, dtype)
        )

        def dequantizer(_: Any, codec: Any, scales: Any, factor: Any):
            return codec.dequantizer(scales, factor, jnp.float32)

        constants = self._step("dequantizer", [of(scales), lambda _: _one], dequantizer)

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

        def with_parameter(shape: Any, parameter: Any, *args: Any) -> Any:
            return function(shape, codec.with_parameter(parameter), *args)

        def of_shape(shape: Any) -> Any:
            parameter = None if codec.initial is None else _one
            return parameter, *(argument(shape) for argument in arguments)

        method = f"{self.name}.{step}"
        return check_elementwise(self.call, method, with_parameter, of_shape, _REMEDY)


def _tile(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _like(tree: Any) -> Any:
    """What a step returned, for the next one. What belongs to groups comes back with a
    value for each element."""
    struct = lambda x, shape: jax.ShapeDtypeStruct(shape if x.shape else (), x.dtype)
    return lambda shape: jtu.tree_map(lambda x: struct(x, shape), tree)
