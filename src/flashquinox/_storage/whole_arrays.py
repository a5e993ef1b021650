"""Arrays that are encoded and decoded whole, outside of steps.

On `Explicit` axes of a mesh, a group that lies in several parts of an array has no
type. Arrays with such groups are gathered on every device first.
"""

import jax
import jax.core
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from .._common import meshes
from .codec import AbstractMomentCodec, Dither
from .layout import Layout


def encode_array(
    codec: AbstractMomentCodec,
    layout: Layout,
    x: Float[Array, "*shape"],
    dither: Dither,
) -> tuple[Shaped[Array, "*shape"], Shaped[Array, "..."] | None]:
    """Codes, divided like the array, and scales."""
    x, there = _gathered(x, layout)
    codes, scales = codec.encode(layout.tile(x), layout.tile_axis, dither)
    return meshes.as_typed(layout.untile(codes), there), scales


def decode_array(
    codec: AbstractMomentCodec,
    layout: Layout,
    codes: Shaped[Array, "*shape"],
    scales: Shaped[Array, "..."],
    dtype: DTypeLike,
) -> Float[Array, "*shape"]:
    """What codes and scales stand for, divided like the codes."""
    codes, there = _gathered(codes, layout)
    tile = codec.decode(layout.tile(codes), scales, layout.tile_axis, dtype)
    return meshes.as_typed(layout.untile(tile), there)


def _gathered(
    x: Shaped[Array, "*shape"], layout: Layout
) -> tuple[Shaped[Array, "*shape"], NamedSharding | None]:
    """The array, whole on every device if it must be, and the sharding that it had
    then, or `None`."""
    is_traced = isinstance(x, jax.core.Tracer)
    there = jax.typeof(x).sharding if is_traced else getattr(x, "sharding", None)
    if not isinstance(there, NamedSharding) or there.mesh.empty:
        return x, None
    explicit = meshes.axes_of_type(there.mesh, AxisType.Explicit)
    there = NamedSharding(there.mesh, meshes.restrict(there.spec, explicit, x.ndim))
    if layout.divides(meshes.divisions(there)):
        return x, None
    return meshes.as_typed(x, NamedSharding(there.mesh, PartitionSpec())), there
