import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Shaped, UInt

from .codec import AbstractMomentCodec
from .layout import Layout, layout_of
from .learned_codec import initial_parameter, with_parameter


class QuantMoment(eqx.Module):
    """A moment in codes, one for each element, and scales, one for each group.

    `codes` has the shape of the weight. `scales` has the same shape with `axis` divided
    by `group_size` (rounded up), so that a sharding of the weight is one of the state.
    `axis` counts from the end; if it is `None`, the leaf is flattened and `scales` has
    one axis. `parameter` is a scalar for a codec that learns (see
    [`flashquinox.RationalCurve`][]): the one that `codes` were made with. It is `None`
    for others.
    """

    codes: Int[Array, "*shape"] | UInt[Array, "*shape"]
    scales: Shaped[Array, "*groups"]
    axis: int | None = eqx.field(static=True)
    group_size: int = eqx.field(static=True)
    codec: AbstractMomentCodec = eqx.field(static=True)
    parameter: Float32[Array, "*ensemble"] | None = None

    @property
    def layout(self) -> Layout:
        return layout_of(self.codes.shape, self.axis, self.group_size)

    def decode(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
        """The moment as floating-point numbers of this dtype.

        Of an ensemble made by `vmap`, decode the members under `jax.vmap` as well.
        """
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
        codec = with_parameter(self.codec, self.parameter)
        tile = codec.decode(
            layout.tile(self.codes), self.scales, layout.tile_axis, dtype
        )
        return layout.untile(tile)

    def encode(self, values: Float[Array | np.ndarray, "*shape"]) -> "QuantMoment":
        """A moment of these numbers, stored as this one is: by the same codec, in the
        same groups, on the same devices. Codes and scales are rounded to nearest, so
        that equal numbers give equal bits. Of this moment, nothing but its form counts.

        A first moment of 0 is stored as 0. For a second moment, the codecs of this
        library have no code for 0 in a group with other numbers: 0 becomes the lowest
        code of the group, which is at least 15 powers of two below the largest with the
        default. See [`flashquinox.map_moments`][] for moments of a
        whole state.

        **Arguments:**

        - `values`: floating-point numbers of the shape of `codes`: finite, and at least
            0 for an average of squares, unless its codec can store signed numbers.

        **Returns:**

        The new moment.

        **Raises:**

        `TypeError` for other dtypes; `ValueError` for other shapes, and for numbers
        that cannot be stored (where values are traced, an error when they are
        computed). Of an ensemble made by `vmap`, encode the members under `jax.vmap`.
        """
        # That needs this class.
        from .moment_values import encode

        return encode(self, values)


StoredMoment = QuantMoment | Float[Array, "..."]


def zeros(codec: AbstractMomentCodec, layout: Layout, dtype: DTypeLike) -> StoredMoment:
    """A stored moment of zeros, for a leaf that computes in `dtype`."""
    if codec.dtypes is None:
        return jnp.zeros(layout.shape, dtype)
    code_dtype, scale_dtype = codec.dtypes
    initial = initial_parameter(codec)
    return QuantMoment(
        codes=jnp.zeros(layout.shape, code_dtype),
        scales=jnp.zeros(layout.scale_shape, scale_dtype),
        axis=layout.axis,
        group_size=layout.group_size,
        codec=codec,
        parameter=None if initial is None else jnp.float32(initial),
    )
