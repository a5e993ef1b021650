"""What types say of the axes over which a `shard_map` divides a program."""

from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of enclosing `shard_map`s along which an array differs between devices,
    as far as its type says: nothing with `check_vma=False`, nor under `pmap`."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset(getattr(kind, "varying", ()))
