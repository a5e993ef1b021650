"""The arguments of all optimizers that say how steps are executed."""

from typing import Any, get_args, Literal, TypeAlias, TypedDict

import jax.tree_util as jtu
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from .._backends import platforms
from .._backends.dispatch import Backend
from .._common.number_checks import check_flag
from .._common.text import shown
from .._model.trees import path_name
from .checksums import check_verify_weights, Verify


StateMemory: TypeAlias = Literal["device", "pinned_host"]


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes: how its steps are executed.

    A function of yours that makes an optimizer can pass them on:

    ```python
    def my_adamw(learning_rate: float, **options: Unpack[fq.Options]) -> fq.Optimizer:
        return fq.adamw(learning_rate, b2=0.95, **options)
    ```

    - `skip_nonfinite` (`False`): if `True`, a step with a NaN or an infinity in any
        gradient, or in what a schedule returns, changes neither weights nor state; and
        so does a gradient of more than 2^62 in magnitude (2^510 for float64 weights),
        after clipping, as its square may overflow. In other steps, a weight that would
        leave the range of its dtype stays where it is. If `False`, a step with a NaN or
        an infinity damages the leaves it came to, no others.
    - `verify_weights` (`None`): whether each step checks that the weights it gets are
        those that the last step returned. They are not if something scales the updates,
        or changes weights by hand, and then their corrections are wrong. `"error"`
        raises, `"warn"` warns from the host; both name the leaf. The state then has a
        checksum of each weight with a correction, and a step reads these weights twice
        more. `None` is no check.
    - `backend` (`"auto"`): what computes a step. `"auto"` is the kernels of the
        platform for which a program is compiled, and plain XLA on platforms without
        kernels; those for GPUs only if JAX's default device is one. `"xla"` is plain
        XLA everywhere. `"cpu"`, `"gpu"` and `"tpu"` are the kernels of that platform,
        with states laid out for it, on any machine. Other platforms take plain XLA in
        place of those for CPUs and GPUs, and interpret those for TPUs, slowly, for
        debugging.
    - `shardings` (`None`): how weights are divided among devices: a tree like the
        model, or a prefix of it, of `jax.sharding.NamedSharding`s, with `None` where
        JAX knows. Only needed where JAX does not tell and `init` has not seen the
        weights on their devices: see [Train on many devices](../sharding.md).
    - `state_memory` (`"device"`): where `init` puts the state. `"pinned_host"` is the
        memory of the host, from which steps take it and to which they return it, with
        the same results: see [Keep the state in host memory](../how-to/offload.md).
        Leaves of fewer than 16,384 elements stay on the device.
    """

    skip_nonfinite: bool
    verify_weights: Verify
    backend: Backend
    shardings: PyTree
    state_memory: StateMemory


DEFAULTS: dict[str, Any] = {
    "skip_nonfinite": False,
    "verify_weights": None,
    "backend": "auto",
    "shardings": None,
    "state_memory": "device",
}


def check_options(call: str, options: Options) -> dict[str, Any]:
    """All options, those that are left out at their defaults; shardings as their leaves
    and their structure, which have a hash."""
    given = DEFAULTS | dict(options)
    return {
        "skip_nonfinite": check_flag(call, "skip_nonfinite", given["skip_nonfinite"]),
        "verify_weights": check_verify_weights(call, given["verify_weights"]),
        "backend": _check_backend(call, given["backend"]),
        "shardings": _check_shardings(call, given["shardings"]),
        "state_memory": _check_state_memory(call, given["state_memory"]),
    }


def _check_backend(call: str, backend: Any) -> Backend:
    if isinstance(backend, str) and backend in platforms.names():
        if backend == "auto":
            platforms.load()
        else:
            platforms.check_loads(call, backend)
        return backend
    names = ", ".join(repr(name) for name in platforms.names())
    raise ValueError(
        f"`{call}(backend=...)` must be one of {names}; got {shown(backend)}."
    )


def _check_state_memory(call: str, value: Any) -> StateMemory:
    if isinstance(value, str) and value in get_args(StateMemory):
        return value  # pyright: ignore[reportReturnType]
    names = " or ".join(repr(name) for name in get_args(StateMemory))
    raise ValueError(f"`{call}(state_memory=...)` must be {names}; got {shown(value)}.")


def _check_shardings(call: str, value: Any) -> tuple[tuple[NamedSharding, ...], Any]:
    for path, x in jtu.tree_leaves_with_path(value):
        if not isinstance(x, NamedSharding):
            raise TypeError(
                f"`{call}(shardings=...)` takes a tree of `jax.sharding.NamedSharding`s"
                f"; got {shown(x)} at `{path_name(path)}`."
            )
    leaves, structure = jtu.tree_flatten(value)
    return tuple(leaves), structure
