import dataclasses
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Shaped, UInt

from .._common import eager, memory
from .codec import AbstractMomentCodec
from .layout import Layout, layout_of
from .learned_codec import initial_parameter, with_parameter
from .relative_moment import times_root
from .whole_arrays import decode_array


# As Equinox marks fields that are no children in a pytree.
_STATIC = {"static": True}


class MomentForm(NamedTuple):
    """What a moment is beside its arrays. All moments that a program returns share the
    objects of its trace, so that comparing two ends at once."""

    axes: tuple[int, ...]
    group_size: int
    codec: AbstractMomentCodec
    relative_to: str | None


class _Stored:
    """What a moment holds, in the slots that JAX takes apart and puts together, and in
    `base`: of one that was taken from a state, what it is relative to there. That is no
    part of the tree, which would hold the other moment twice."""

    __slots__ = ("__weakref__", "_arrays", "_form", "base")

    base: Any
    _arrays: tuple[Any, Any, Any]
    _form: MomentForm

    codes = property(lambda self: self._arrays[0])
    scales = property(lambda self: self._arrays[1])
    parameter = property(lambda self: self._arrays[2])
    axes = property(attrgetter("_form.axes"))
    group_size = property(attrgetter("_form.group_size"))
    codec = property(attrgetter("_form.codec"))
    relative_to = property(attrgetter("_form.relative_to"))


# No `eqx.Module`, and its own slots: JAX takes each moment apart and puts it together
# again in every call of a compiled step. Modules take four times as long.
@dataclasses.dataclass(init=False, eq=False, repr=False)
class QuantMoment(_Stored):
    """A moment in codes, one for each element, and scales, one for each group.

    `codes` has the shape of the weight. A group is `group_size` elements along `axes`:
    these are consecutive axes, which are read as one, and count from the end. The last
    group may have fewer elements. `scales` has the shape of the weight with the number
    of groups in place of `axes`, so that a sharding of the weight is one of the state:
    of several `axes`, the first may be divided, into parts of whole groups. A scalar
    has no axes, and its scale the shape `(1,)`.

    `parameter` is a scalar for a codec that learns (see
    [`flashquinox.RationalCurve`][]): the one that `codes` were made with. It is `None`
    for others. `relative_to` is the name of the moment in units of whose root this one
    is stored (see [`flashquinox.Moment`][]), or `None`.
    """

    __slots__ = ()

    # Fields without a default, whose properties are those of `_Stored`.
    codes: Int[Array, "*shape"] | UInt[Array, "*shape"] = dataclasses.field()
    scales: Shaped[Array, "*groups"] = dataclasses.field()
    axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    group_size: int = dataclasses.field(metadata=_STATIC)
    codec: AbstractMomentCodec = dataclasses.field(metadata=_STATIC)
    parameter: Float32[Array, "*ensemble"] | None = dataclasses.field()
    relative_to: str | None = dataclasses.field(metadata=_STATIC)

    def __init__(
        self,
        codes: Int[Array, "*shape"] | UInt[Array, "*shape"],
        scales: Shaped[Array, "*groups"],
        axes: tuple[int, ...],
        group_size: int,
        codec: AbstractMomentCodec,
        parameter: Float32[Array, "*ensemble"] | None = None,
        relative_to: str | None = None,
    ):
        self._arrays = codes, scales, parameter
        self._form = MomentForm(axes, group_size, codec, relative_to)

    def with_arrays(
        self,
        codes: Int[Array, "*shape"] | UInt[Array, "*shape"],
        scales: Shaped[Array, "*groups"],
        parameter: Float32[Array, "*ensemble"] | None,
    ) -> "QuantMoment":
        """A moment of this form."""
        return _unflatten(self._form, (codes, scales, parameter))

    @property
    def layout(self) -> Layout:
        return layout_of(self.codes.shape, self.axes, self.group_size)

    def decode(
        self,
        dtype: DTypeLike = jnp.float32,
        *,
        base: "QuantMoment | Float[Array, '*shape'] | None" = None,
    ) -> Float[Array, "*shape"]:
        """The moment as floating-point numbers.

        Of an ensemble made by `vmap`, decode the members under `jax.vmap` as well.

        ??? Example

            ```python
            mu, nu = (state.moments[name]["w"] for name in ("mu", "nu"))
            mu.decode()  # known from `state` to be relative to `nu`
            jax.vmap(lambda mu, nu: mu.decode(base=nu))(mu, nu)  # of an ensemble
            ```

        **Arguments:**

        - `dtype`: a floating-point dtype.
        - `base`: for a moment with `relative_to`, the moment of that name. One that is
            taken from `OptimizerState.moments` knows it, unless it went through a
            transformation of JAX since.

        **Raises:**

        `TypeError` if codes or scales were cast; `ValueError` if `base` is missing.
        """
        if self.relative_to is None:
            return self.decode_stored(dtype)
        base = base_of("QuantMoment.decode", "this moment", self, base)
        root = base.decode(dtype) if isinstance(base, QuantMoment) else base
        return times_root(self.decode_stored(dtype), jnp.asarray(root).astype(dtype))

    def decode_stored(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
        """What codes and scales stand for: the moment, or that in units of the root of
        another one."""
        assert self.codec.dtypes is not None
        for name, like in zip(("codes", "scales"), self.codec.dtypes, strict=True):
            found, like = getattr(self, name).dtype, jnp.dtype(like)
            if found != like:
                raise TypeError(
                    f"`QuantMoment.decode`: the {name} are {found}, and must be {like}."
                    " They were cast after they were stored: take them from the state "
                    "as `init` or the previous step returned it."
                )
        layout = self.layout
        codes, scales = memory.to_device((self.codes, self.scales))
        codec = with_parameter(self.codec, memory.to_device(self.parameter))
        return decode_array(codec, layout, codes, scales, dtype)

    def encode(
        self,
        values: Float[Array | np.ndarray, "*shape"],
        *,
        base: "QuantMoment | Float[Array, '*shape'] | None" = None,
    ) -> "QuantMoment":
        """A moment of these numbers, stored as this one is: by the same codec, in the
        same groups, on the same devices. Codes and scales are rounded to nearest, so
        that equal numbers give equal bits. Of this moment, nothing but its form counts.

        A first moment of 0 is stored as 0. For a second moment, the codecs of this
        library have no code for 0 in a group with other numbers: 0 becomes the lowest
        code of the group, which is at least 31 powers of two below the largest with the
        default. See [`flashquinox.map_moments`][] for moments of a
        whole state.

        **Arguments:**

        - `values`: floating-point numbers of the shape of `codes`: finite, and at least
            0 for an average of squares, unless its codec can store signed numbers.
        - `base`: as in `decode`. The new moment is relative to this one.

        **Returns:**

        The new moment.

        **Raises:**

        `TypeError` for other dtypes; `ValueError` for other shapes, and for numbers
        that cannot be stored (where values are traced, an error when they are
        computed). Of an ensemble made by `vmap`, encode the members under `jax.vmap`.
        """
        # That needs this class.
        from .moment_values import encode

        return encode(self, values, base)

    def __eq__(self, other: object) -> Any:
        return eqx.tree_equal(self, other)

    def __repr__(self) -> str:
        return eqx.tree_pformat(self)

    def __getstate__(self) -> dict[str, Any]:
        fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        return fields | ({"base": self.base} if hasattr(self, "base") else {})

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """Of a copy, or of a moment that was pickled."""
        self._arrays = fields["codes"], fields["scales"], fields["parameter"]
        self._form = MomentForm(*[fields[name] for name in MomentForm._fields])
        if "base" in fields:
            self.base = fields["base"]


_KEYS = tuple(map(jtu.GetAttrKey, ("codes", "scales", "parameter")))
# Takes a moment apart without a frame of Python.
_flatten = attrgetter("_arrays", "_form")


def _flatten_with_keys(moment: QuantMoment) -> tuple[tuple[Any, ...], MomentForm]:
    arrays, form = _flatten(moment)
    return tuple(zip(_KEYS, arrays, strict=True)), form


def _unflatten(form: MomentForm, arrays: Iterable[Any]) -> QuantMoment:
    moment = object.__new__(QuantMoment)
    moment._arrays = tuple(arrays)
    moment._form = form
    return moment


jtu.register_pytree_with_keys(QuantMoment, _flatten_with_keys, _unflatten, _flatten)


def base_of(
    call: str, name: str, moment: QuantMoment, base: "StoredMoment | None"
) -> "StoredMoment":
    """What a moment is relative to: as given, or as it was in the state."""
    base = getattr(moment, "base", None) if base is None else base
    if base is None:
        raise ValueError(
            f"`{call}`: {name} is stored relative to the root of "
            f"{moment.relative_to!r}, which is not known here. Take it from "
            f"`state.moments`, or pass the other one: `base={moment.relative_to}`."
        )
    shape = base.codes.shape if isinstance(base, QuantMoment) else jnp.shape(base)
    if shape != moment.codes.shape:
        raise ValueError(
            f"`{call}`: {name} has the shape {moment.codes.shape}, and "
            f"{moment.relative_to!r}, to whose root it is relative, {shape}. Pass both "
            "moments of one leaf."
        )
    return base


StoredMoment = QuantMoment | Float[Array, "..."]


def zeros(
    codec: AbstractMomentCodec,
    layout: Layout,
    dtype: DTypeLike,
    relative_to: str | None = None,
) -> StoredMoment:
    """A stored moment of zeros, for a leaf that computes in `dtype`."""
    if codec.dtypes is None:
        return eager.zeros(layout.shape, dtype)
    code_dtype, scale_dtype = codec.dtypes
    initial = initial_parameter(codec)
    return QuantMoment(
        codes=eager.zeros(layout.shape, code_dtype),
        scales=eager.zeros(layout.scale_shape, scale_dtype),
        axes=layout.axes,
        group_size=layout.group_size,
        codec=codec,
        parameter=None if initial is None else jnp.float32(initial),
        relative_to=relative_to,
    )
