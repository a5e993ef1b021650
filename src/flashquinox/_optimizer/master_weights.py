"""Conversion between master weights and pairs of weights and corrections."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from .._common import eager, memory
from .._common.dtypes import compute_dtype
from .._common.placement import compute_like, put_like
from .._model.trained import is_trainable
from .._model.trees import flatten, Leaf, match, Model, State
from .._storage.split import Correction, decode_stored, encode_weight
from .call_checks import check_not_state
from .checksums import checksums
from .leaf_checks import check_master_weight
from .states import open_states, OpenedStates


def master_weights(model: Model, state: PyTree) -> Model:
    """The model with its master weights: in float32 (float64 where weights are), with
    corrections added. For evaluation, export or comparison.

    **Arguments:**

    - `model`: the model.
    - `state`: its optimizer state, which holds the corrections; or the state of a
        wrapper, such as `optax.chain`, `optax.MultiSteps` or `optax.partition`, with
        one or more inside. A weight that none of them trains has no correction.

    **Returns:**

    A pytree like `model`. Leaves that cannot be trained are left alone: all but
    floating-point arrays of 16 bits or more.

    **Raises:**

    `ValueError` if the state is not one of this model, or has two corrections for a
    weight; `TypeError` if there is no [`flashquinox.OptimizerState`][] in it.
    """
    opened = open_states("master_weights", model, state)
    return opened.rebuild(
        [
            _master_weight(leaf.value, correction)
            if is_trainable(leaf.value)
            else leaf.value
            for leaf, correction in zip(opened.leaves, opened.corrections, strict=True)
        ]
    )


def from_master_weights(
    float32_model: PyTree, model: Model, state: State
) -> tuple[Model, State]:
    """The inverse of [`flashquinox.master_weights`][]: splits the weights of a float32
    model into weights and corrections, to train it.

    For bfloat16 weights with `Storage(master_weight_bits=32)`, `master_weights` of the
    result is `float32_model` again, bit for bit for every finite number. Otherwise
    weights are rounded to nearest, as [`flashquinox.ECCWeight`][] describes: to 16
    significant bits for bfloat16 with 24 bits.

    To start training from a float32 model, use [`flashquinox.prepare`][], which makes
    the model and the state too.

    ??? Example

        Change master weights by hand:

        ```python
        masters = fq.master_weights(model, state)
        masters = eqx.tree_at(lambda m: m.head.bias, masters, replace_fn=jnp.zeros_like)
        model, state = fq.from_master_weights(masters, model, state)
        ```

    **Arguments:**

    - `float32_model`: a pytree like `model`, with its weights in float32 (float64 where
        they are in `model`), as JAX arrays in any sharding or NumPy arrays. `None` in
        place of a leaf, or of a whole subtree, leaves its weights and corrections as
        they are.
    - `model`: the model. Its leaves decide the dtypes and shardings of the new weights.
        Their values are not used.
    - `state`: its optimizer state, whose corrections decide the same for new ones; or
        the state of a wrapper with one or more inside. Only corrections change.

    **Returns:**

    A 2-tuple of the new model and the new state. Leaves that cannot be trained are
    those of `model`.

    **Raises:**

    `ValueError` or `TypeError` if the trees, shapes or dtypes do not fit together. The
    message names the leaf.
    """
    call = "from_master_weights"
    check_not_state(call, float32_model)
    leaves, _ = flatten(model)
    masters = match(call, "float32_model", float32_model, leaves)
    opened = open_states(call, model, state, replaced=masters)
    for leaf, master in zip(opened.leaves, masters, strict=True):
        if is_trainable(leaf.value) and master is not None:
            check_master_weight(call, leaf, master)
    encode = lambda i, leaf, correction: split_master_weight(
        call, leaf, masters[i], None if correction is None else correction.dtype
    )
    given = [i for i, master in enumerate(masters) if master is not None]
    return with_encoded(call, opened, given, encode)


def with_encoded(
    call: str,
    opened: OpenedStates,
    indices: Iterable[int],
    encode: Callable[[int, Leaf, Correction | None], tuple[Any, Any]],
) -> tuple[PyTree, PyTree]:
    """A model and the tree that holds its states, with new weights and corrections for
    the leaves of these numbers that can be trained. `encode` makes them from the number
    of a leaf, the leaf and its old correction. Corrections and checksums get the
    shardings of the old ones."""
    weights = [leaf.value for leaf in opened.leaves]
    corrections, sums = list(opened.corrections), {}
    for i in indices:
        leaf, old = opened.leaves[i], opened.corrections[i]
        if not is_trainable(leaf.value):
            continue
        weights[i], new = encode(i, leaf, old)
        corrections[i] = None if new is None else put_like(call, leaf.name, new, old)
        if (checksum := opened.checksums[i]) is not None:
            sums[i] = _checksum(call, leaf, weights[i], checksum)
    return opened.rebuild(weights), opened.with_corrections(corrections, sums)


def split_master_weight(
    call: str, leaf: Leaf, master: Any, correction_dtype: Any
) -> tuple[Any, Any]:
    """The new weight of a leaf, in the sharding of the old one, and its correction.
    Without a dtype for that, the weight is rounded."""
    dtype = jnp.dtype(leaf.value.dtype)
    split = partial(_split, dtype=dtype, correction_dtype=correction_dtype)
    weight, new = compute_like(
        call, leaf.name, eager.elementwise(split), [master], [leaf.value]
    )
    return put_like(call, leaf.name, weight, leaf.value), new


def _checksum(call: str, leaf: Leaf, weight: Any, old: Any) -> Any:
    """The new checksum of a leaf, in the sharding of the old one."""
    (new,) = compute_like(call, leaf.name, lambda x: checksums([x]), [weight], [weight])
    return put_like(call, leaf.name, new, old)


@partial(jax.jit, static_argnames=("dtype", "correction_dtype"))
def _split(
    master: Float[Array, "*shape"], dtype: DTypeLike, correction_dtype: DTypeLike | None
) -> tuple[Float[Array, "*shape"], Correction | None]:
    wide = master.astype(compute_dtype(dtype))
    return encode_weight(wide, dtype, correction_dtype)


def _master_weight(weight: Any, correction: Any) -> Any:
    correction = memory.to_device(correction)
    stored = [x for x in (weight, correction) if x is not None]
    decode = eager.elementwise(decode_stored)
    master = eager.computed(decode, stored, eager.place(*stored))
    return _decoded(jnp.asarray(weight), correction) if master is None else master


@jax.custom_jvp
def _decoded(weight: Array, correction: Correction | None) -> Array:
    return decode_stored(weight, correction)


@_decoded.defjvp
def _decoded_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The tangent of a master weight is that of its weight. Without this rule it would
    silently be 0, because the split is arithmetic on bits."""
    master = _decoded(*primals)
    return master, tangents[0].astype(master.dtype)
