"""Master weights as arrays of their own: out of weights and corrections, and into
them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._common.placement import compute_like, put_like
from .._model.trained import is_trainable
from .._model.trees import Leaf, match, Model, State
from .._storage.split import Correction, decode_weight, encode_weight
from .call_checks import check_not_state
from .checksums import checksums
from .leaf_checks import check_master_weight
from .states import open_states


def master_weights(model: Model, state: PyTree) -> Model:
    """The model with its weights in float32 (float64 where they are), corrections
    included: for evaluation, export, or a comparison.

    **Arguments:**

    - `model`: the model.
    - `state`: its optimizer state, which holds the corrections; or the state of a
        wrapper, such as `optax.chain`, `optax.MultiSteps` or `optax.partition`, with
        one or more inside. A weight that is in none of them has no correction.

    **Returns:**

    A pytree like `model`. Leaves that are not floating-point arrays are left alone, and
    so are those that cannot be trained: of 8 bits, and complex ones.

    **Raises:**

    `ValueError` if the state is not one of this model, or has two corrections for a
    weight; `TypeError` if there is no [`flashquinox.OptimizerState`][] in it.
    """
    opened = open_states("master_weights", model, state)
    return opened.rebuild(
        [
            _decoded(jnp.asarray(leaf.value), correction)
            if is_trainable(leaf.value)
            else leaf.value
            for leaf, correction in zip(opened.leaves, opened.corrections, strict=True)
        ]
    )


def from_master_weights(
    float32_model: PyTree, model: Model, state: State
) -> tuple[Model, State]:
    """The inverse of [`flashquinox.master_weights`][]: weights and corrections from a
    float32 model, to go on with it.

    With corrections of 32 bits and bfloat16 weights, `master_weights` of what this
    returns is `float32_model` again, bit for bit for every finite number. With others,
    it is rounded to nearest, as [`flashquinox.ECCWeight`][] says: to 16 significant
    bits for bfloat16 and 24.

    ??? Example

        ```python
        model = fq.cast(float32_model, jnp.bfloat16)
        state = optim.init(model)
        model, state = fq.from_master_weights(float32_model, model, state)
        ```

    **Arguments:**

    - `float32_model`: a pytree like `model`, with its weights in float32 (float64 where
        they are in `model`), divided among devices in any way, or in NumPy. `None` in
        place of a leaf, or of a whole subtree, leaves its weights and corrections as
        they are.
    - `model`: the model. It says in which dtypes weights are stored, and where; their
        values are not looked at.
    - `state`: its optimizer state, which says the same of corrections; or the state of
        a wrapper with one or more inside. All but corrections stays as it is.

    **Returns:**

    A 2-tuple of the new model and the new state. Leaves that are not floating-point
    arrays are those of `model`.

    **Raises:**

    `ValueError` or `TypeError` if the trees, shapes or dtypes do not fit together. The
    message names the leaf.
    """
    call = "from_master_weights"
    check_not_state(call, float32_model)
    opened = open_states(call, model, state)
    masters = match(call, "float32_model", float32_model, opened.leaves)
    for leaf, master in zip(opened.leaves, masters, strict=True):
        if is_trainable(leaf.value) and master is not None:
            check_master_weight(call, leaf, master)
    new = [
        _encode(call, leaf, correction, master)
        if is_trainable(leaf.value) and master is not None
        else (leaf.value, correction)
        for leaf, correction, master in zip(
            opened.leaves, opened.corrections, masters, strict=True
        )
    ]
    new_model = opened.rebuild([weight for weight, _ in new])
    sums = {
        index: _checksum(call, opened.leaves[index], new[index][0], old)
        for index, old in enumerate(opened.checksums)
        if old is not None and masters[index] is not None
    }
    corrections = [correction for _, correction in new]
    return new_model, opened.with_corrections(corrections, sums)


def _encode(
    call: str, leaf: Leaf, correction: Correction | None, master: Any
) -> tuple[Any, Any]:
    """The new weight and correction of a leaf, where the old ones are."""
    split = partial(
        _split,
        dtype=jnp.dtype(leaf.value.dtype),
        correction_dtype=None if correction is None else correction.dtype,
    )
    weight, new = compute_like(call, leaf.name, split, [master], [leaf.value])
    if new is not None:
        new = put_like(call, leaf.name, new, correction)
    return put_like(call, leaf.name, weight, leaf.value), new


def _checksum(call: str, leaf: Leaf, weight: Any, old: Any) -> Any:
    """The new checksum of a leaf, where the old one is."""
    (new,) = compute_like(call, leaf.name, lambda x: checksums([x]), [weight], [weight])
    return put_like(call, leaf.name, new, old)


_split = jax.jit(encode_weight, static_argnames=("dtype", "correction_dtype"))


@jax.custom_jvp
def _decoded(weight: Array, correction: Correction | None) -> Array:
    return decode_weight(weight, correction)


@_decoded.defjvp
def _decoded_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """A master weight moves as its weight does. Arithmetic on bits has no derivative:
    it would be 0, without a word."""
    master = _decoded(*primals)
    return master, tangents[0].astype(master.dtype)
