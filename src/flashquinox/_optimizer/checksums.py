"""Checksums, by which a step sees whether weights still belong to their corrections.

A wrapper may change the result of a step after it. The next step notices that, because
the state has a checksum of every weight.
"""

import warnings
from functools import partial
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, UInt16, UInt32

from .._common.digest import weighted_sum
from .._common.text import shown
from .._sharding.parts import on_parts


# What a step does if weights have changed. With `None`, there are no checksums.
Verify: TypeAlias = Literal["warn", "error"] | None


def check_verify_weights(call: str, value: Any) -> Verify:
    if value is None or (isinstance(value, str) and value in ("warn", "error")):
        return value  # pyright: ignore[reportReturnType]
    raise ValueError(
        f"`{call}(verify_weights=...)` must be 'warn', 'error' or None; got "
        f"{shown(value)}."
    )


@jax.jit
def checksums(weights: list[Float[Array, "..."]]) -> list[UInt32[Array, ""]]:
    """The checksum of each weight. It changes with any bit, and with the order of
    elements."""
    return [weighted_sum(_bits(weight), np.uint32(0)) for weight in weights]


@jax.jit
def _differ(
    weights: list[Float[Array, "..."]], expected: list[UInt32[Array, ""]]
) -> Bool[Array, " weights"]:
    found = checksums(weights)
    return jnp.stack([x != y for x, y in zip(found, expected, strict=True)])


def _bits(weight: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    """The bits of a weight, made the same where arithmetic such as `weight + 0` may
    change them: 0 for -0 and for the subnormal numbers of bfloat16, one pattern for
    NaN."""
    bits = lax.bitcast_convert_type(weight, jnp.uint16)
    magnitude = bits & np.uint16(0x7FFF)
    smallest = 1
    if weight.dtype == jnp.bfloat16:
        smallest = 0x0080
    bits = jnp.where(magnitude < smallest, np.uint16(0), bits)
    return jnp.where(jnp.isnan(weight), np.uint16(0xFFFF), bits)


def verified(
    call: str,
    verify: Verify,
    count: Int32[Array, ""],
    names: list[str],
    weights: list[Float[Array, "..."]],
    expected: list[UInt32[Array, ""]],
    mesh: Mesh | AbstractMesh | None,
) -> Int32[Array, ""]:
    """Checks weights against their checksums. Returns the count of the step, made to
    depend on the check, so that the compiler keeps it. `names` are those of the leaves,
    and `mesh` is the mesh that they are on."""
    differs = _differ(weights, expected)
    messages = [_message(call, name) for name in names]
    if verify == "error":
        if not isinstance(differs, jax.core.Tracer):
            if np.any(differs):
                raise RuntimeError(messages[int(np.argmax(differs))])
            return count
        raise_here = partial(_raise_if, messages)
        if mesh is not None:
            # All devices must raise: the others would wait for one that does alone.
            everywhere = PartitionSpec()
            raise_here = on_parts(raise_here, mesh, everywhere, everywhere)
        return raise_here(count, differs)
    lax.cond(
        jnp.any(differs),
        lambda: jax.debug.callback(partial(_warn, messages), differs),
        lambda: None,
    )
    return count


def _raise_if(
    messages: list[str], count: Int32[Array, ""], differs: Bool[Array, "..."]
) -> Int32[Array, ""]:
    first = jnp.argmax(differs)
    return eqx.branched_error_if(count, jnp.any(differs), first, messages)


def _warn(messages: list[str], differs: Bool[Array | np.ndarray, "..."]) -> None:
    # Under `vmap`, this is also called for ensemble members without a difference.
    if np.any(differs):
        warnings.warn(messages[int(np.argmax(differs))], stacklevel=2)


def _message(call: str, name: str) -> str:
    return (
        f"`{call}`: the weight at `{name}` is not the one that the last step of this "
        "optimizer gave, to which its correction belongs: what a step adds to it is "
        "partly lost. Put the optimizer last in `optax.chain`: nothing may scale or "
        "mask its updates. `optax.lookahead`, `optax.contrib.schedule_free` and others "
        "that move weights themselves do not go around it. To change weights by hand, "
        "change `flashquinox.master_weights`, and put them back with "
        "`flashquinox.from_master_weights`."
    )
