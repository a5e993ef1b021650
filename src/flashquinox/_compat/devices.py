"""The device that a program is traced for."""

from typing import Any

import jax


def traced_device() -> Any:
    """The device that a program is traced for: that of the abstract mesh that is set,
    or the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        return device
    device = getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0]
    if isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device
