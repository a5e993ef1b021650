"""Gradient release: each layer is updated as soon as its gradient is known, so that
gradients of only one layer exist at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Key, PyTree, ScalarLike

from .. import _compat
from .._common.batches import batches_by_size
from .._common.dtypes import compute_dtype
from .._model.trees import Model, State
from .._optimizer.argument_checks import check_max_norm
from .._optimizer.optimizer import Optimizer
from .._tile.clipping import Clipping, scaled
from .checks import check_layered_loss, check_layers_are_whole
from .groups import check_optimizers, open_groups
from .host_layers import first_gradient, HostLayers, Moving, refuse_vmap, Stacks
from .layered import LayeredLoss, open_layers
from .stacks import (
    by_layer,
    from_last_to_first,
    layer_sharding,
    layers_have_own_groups,
    materialized,
    place_stack,
    read_layer,
    whole_stack,
    write_layer,
)


def release_step(
    optim: Optimizer | Mapping[Any, Optimizer],
    loss: LayeredLoss,
    model: Model,
    state: State,
    batch: PyTree,
    key: Key[Array, ""] | None = None,
    *,
    max_norm: ScalarLike | None = None,
) -> tuple[Model, State, Float[Array, ""]]:
    r"""Takes one step in which gradients of only one layer exist at a time.

    The forward pass stores the input of each layer, $x_0, \dots, x_{L-1}$. The backward
    pass goes from the last layer to the first. It computes a layer again from its
    input, pulls the cotangent back,

    $$(g_l, \bar x_{l-1}) = \bar x_l \cdot
    \partial \, \text{block}(\phi_l, x_{l-1}),$$

    updates the weights $\phi_l$ and their state in place by $g_l$, and continues with
    $\bar x_{l-1}$. Weights that only the epilogue reads are updated before the blocks,
    and all others after them: a tied embedding by the sum of its gradients.

    The result is equal to that of

    ```python
    value, grads = eqx.filter_value_and_grad(loss)(model, batch, key)
    model, state = optim.step(model, state, grads)
    ```

    for every optimizer of this library. Call it inside `jit`, and donate the model and
    the state: otherwise memory holds two of each.

    ??? cite "Reference"

        Gonzalez Ortiz, Gupta, Rinard and Blalock, *FlashOptim: Optimizers for Memory
        Efficient Training*, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), which
        releases gradients by hooks of PyTorch. Earlier: Lv, Yang, Liu, Gao, Guo and
        Qiu, *Full Parameter Fine-tuning for Large Language Models with Limited
        Resources*, [arXiv:2306.09782](https://arxiv.org/abs/2306.09782).

    **Arguments:**

    - `optim`: a [`flashquinox.Optimizer`][], with its schedules and its mask; or the
        dictionary of optimizers that was passed to `optax.partition`, each of which
        trains a group of the weights, without those of `optax.set_to_zero`.
    - `loss`: a [`flashquinox.LayeredLoss`][].
    - `model`: any pytree. All floating-point arrays are trained, except those that were
        `None` in `init`, that have 8 bits, or that `optax.set_to_zero` freezes.
    - `state`: `optim.init(model)`, or from the previous step of either kind; for a
        dictionary, `optax.partition(optim, labels).init(model)`.
    - `batch`, `key`: passed to `loss`.
    - `max_norm`: the gradient of each part is scaled down to at most this Euclidean
        norm over all its leaves, in float32. `None` is no clipping. In `optim.step`,
        the norm is that of all gradients, so that weights whose gradients are a small
        share of it move less there: by the ratio of the two norms.

    The parts that `max_norm` and `skip_nonfinite` act on are the weights that only the
    epilogue reads, each layer, and all other weights. With `skip_nonfinite`, a part
    with a NaN or an infinity in its gradient is not updated, while other parts are. The
    step does not count if no part is updated; with several optimizers, each counts its
    own steps.

    **Returns:**

    A 3-tuple of the new model, the new state and the loss. Dtypes of model and state do
    not change.

    **Raises:**

    `TypeError` if an optimizer is in an Optax wrapper, because wrappers may need all
    gradients at once, as for clipping by the global norm. `TypeError` or `ValueError`
    if model, state and loss do not fit together, or the axis of layers is divided among
    devices.
    """
    call = "release_step"
    check_max_norm(call, max_norm)
    check_optimizers(call, optim)
    check_layered_loss(call, loss, LayeredLoss)
    step = open_groups(call, optim, model, state)
    layered = open_layers(call, loss, model, batch, key)
    trained = {}
    for index in step.owners:
        leaf = step.leaves[index]
        step.check(index)
        if index in layered.stacked:
            check_layers_are_whole(call, leaf, step.sharding(index))
        if leaf.value.size > 0:
            trained[index] = jnp.asarray(leaf.value)
    step = step.verified()
    outer = {i: x for i, x in trained.items() if i not in layered.stacked}
    blocks = {i: x for i, x in trained.items() if i in layered.stacked}

    # Forward pass. `fixed` are parts of `x` without gradients, such as integers.
    first = lambda values: _split(layered.prologue(values))
    read_first = _read(first, outer)
    x, pull_first, fixed = jax.vjp(first, read_first, has_aux=True)

    def forward(x, inputs):
        values, key = inputs
        return layered.block(values, key, x), x

    x, kept = lax.scan(
        forward, eqx.combine(x, fixed), (layered.stacked, layered.keys.of_blocks)
    )
    x, fixed = _split(x)
    last = lambda values, x: layered.epilogue(values, eqx.combine(x, fixed))
    read_last = _read(lambda values: last(values, x), outer)
    value, pull_last = jax.vjp(last, read_last, x)

    # Gradients of what only the epilogue reads are complete.
    grads_last, x_bar = pull_last(jnp.ones_like(value))
    done = {
        i: grads_last[i] if i in grads_last else jnp.zeros_like(x)
        for i, x in outer.items()
        if i not in read_first
    }
    step.update(done, max_norm)
    # A barrier makes XLA take these updates and compute the loss now, so that gradients
    # and logits are freed before the blocks begin.
    x_bar, value, new = lax.optimization_barrier(
        (x_bar, value, step.read_updated(done))
    )
    for index, of_leaf in new.items():
        step.write(index, *of_leaf)

    # The blocks, from the last to the first. Leaves whose groups span several layers,
    # or whose rules need all layers, cannot be updated layer by layer: they wait for
    # the gradients of all layers.
    layouts = {i: step.layout(i) for i in blocks}
    waiting = {
        i: x
        for i, x in blocks.items()
        if not (
            layers_have_own_groups(step.read(i), layouts[i])
            and step.layers_are_apart(i)
        )
    }
    stacks = {i: by_layer(step.read(i), layouts[i]) for i in blocks if i not in waiting}
    static = {i: x for i, x in layered.stacked.items() if i not in blocks}
    divided = {i: layer_sharding(step.sharding(i)) for i in blocks}
    groups = batches_by_size({i: stack.weight.size for i, stack in stacks.items()})

    # Codecs learn before the gradients of layers are known. A cotangent that is not
    # finite here makes those of all layers so, and then nothing is learned.
    def is_finite() -> Bool[Array, ""]:
        finite = [jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(x_bar)]
        return jnp.all(jnp.stack(finite))

    learned = step.learn(list(stacks), is_finite)

    def write(stacks: Stacks, parts: Stacks, layer: Any) -> Stacks:
        """Stacks in which these leaves have these parts as a layer."""
        new = {i: write_layer(stacks[i], part, layer) for i, part in parts.items()}
        placed = {
            i: place_stack(stack, layouts[i], step.sharding(i))
            for i, stack in new.items()
        }
        return stacks | placed

    inputs = waiting, static, layered.keys.of_blocks, kept

    def read(layer: ScalarLike, here: Stacks) -> PyTree:
        """What the backward pass takes of one layer, but for its state."""
        of_layer = jtu.tree_map(
            lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False), inputs
        )
        return read_layer({i: x.weight for i, x in here.items()}, layer), of_layer

    def open_layer(read: PyTree) -> tuple[Callable[..., PyTree], PyTree, PyTree]:
        """One layer as a function of its weights and its input, and these."""
        weights, (waiting, static, key, x) = read
        x, fixed = _split(x)

        def block(weights: dict[int, Array], x: PyTree) -> PyTree:
            return _split(layered.block(weights | static, key, eqx.combine(x, fixed)))

        return block, weights | waiting, x

    first = lambda here: first_gradient(*open_layer(read(0, here)))
    divided_stacks = [i for i in stacks if divided[i] is not None]
    away = HostLayers(stacks, write, divided_stacks, first)
    if not away.is_empty:
        value = refuse_vmap(value)

    def backward(layer: Array, here: Stacks, moving: Moving, x_bar: PyTree) -> Any:
        """One layer. `here` are stacks on the device."""
        departed, of_layer = away.depart(moving, layer, read(layer, here))
        block, weights, x = open_layer(of_layer)
        _, pull, _ = jax.vjp(block, weights, x, has_aux=True)
        grads, x_bar = pull(x_bar)
        grads = materialized(grads)
        moving, arrived, grads, counts = away.land(departed, layer, grads)
        counted = step.with_counts(counts)
        clip = step.clip(grads, divided, max_norm)
        finite = step.all_finite(grads, divided, clip)
        if clip is not None:
            # They are used after the loop, and each layer has its own factor of
            # clipping.
            grads |= {i: _scaled(grads[i], clip) for i in waiting}
        left: Stacks = {}
        for numbers in groups:
            # A barrier between batches: otherwise XLA may decode the whole layer at
            # once, and hold its state twice.
            some = {i: here[i] for i in numbers}
            here, some = lax.optimization_barrier((here, some))
            some = eqx.combine(
                read_layer(some, layer), {i: arrived[i] for i in numbers}
            )
            new = counted.update_parts(some, divided, grads, learned, finite, clip)
            stays, leaves = away.leave(new)
            here, left = write(here, stays, layer), left | leaves
        carry = here, moving._replace(leaving=left), x_bar
        return carry, ({i: grads[i] for i in waiting}, finite)

    counts = [] if away.is_empty else step.counts_for_copies()
    carry = away.here, away.before_all(counts), x_bar
    (here, moving, x_bar), (grads_waiting, finite) = from_last_to_first(
        lambda layer, carry: backward(layer, *carry),
        carry,
        layered.layers,
        not away.is_empty,
    )
    stacks = away.after_all(here, moving)
    for index, stack in stacks.items():
        stack = place_stack(stack, layouts[index], step.sharding(index))
        step.write(index, whole_stack(stack, layouts[index]), learned[index])
    for group in {step.owners[index][0] for index in stacks}:
        all_finite = finite[group]
        step.count(group, None if all_finite is None else jnp.any(all_finite))

    # Leaves that the prologue reads, and those that waited.
    (grads,) = pull_first(x_bar)
    grads = {i: grads_last[i] + g if i in grads_last else g for i, g in grads.items()}
    step.update(grads, max_norm)
    step.update(grads_waiting, None)
    return *step.close(), value


def _split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """A tree as two: the arrays that have gradients, and everything else."""
    return eqx.partition(tree, eqx.is_inexact_array)


def _read(function: Callable[[Any], Any], values: dict[int, Array]) -> dict[int, Array]:
    """The values that the result of a function depends on. Gradients of the others
    would be arrays of zeros."""
    read = _compat.inputs_read(function, values)
    return {
        i: x for (i, x), used in zip(sorted(values.items()), read, strict=True) if used
    }


def _scaled(grad: Array, clip: Clipping) -> Array:
    """A gradient clipped and rounded to its dtype."""
    factors = clip.factors_for(compute_dtype(grad.dtype))
    return scaled(grad, factors).astype(grad.dtype)
