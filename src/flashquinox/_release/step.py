"""Gradient release: every layer is updated as soon as its gradient is known, and the
gradient is gone before the next one is computed."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Key, PyTree, Scalar, ScalarLike

from .. import _compat as compat
from .._common import meshes
from .._common.dtypes import compute_dtype
from .._model.trees import Model, State
from .._optimizer.argument_checks import check_max_norm
from .._optimizer.engine import LeafState, Learned
from .._optimizer.optimizer import Optimizer
from .._sharding import state_specs
from .._storage.codec import QuantMoment, StoredMoment
from .._tile.clipping import Clipping, scaled
from .checks import check_layered_loss, check_layers_are_whole
from .groups import check_optimizers, open_groups
from .layered import LayeredLoss, open_layers


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
    r"""Takes one step, with the gradient of one layer at a time.

    The forward pass keeps what each layer gets, $x_0, \dots, x_{L-1}$. The backward
    pass then goes from the last layer to the first. It computes a layer again from what
    that got, pulls the cotangent back,

    $$(g_l, \bar x_{l-1}) = \bar x_l \cdot
    \partial \, \text{block}(\phi_l, x_{l-1}),$$

    updates the weights $\phi_l$ and their state in place by $g_l$, and goes on with
    $\bar x_{l-1}$. What only the epilogue reads is updated before the blocks; the rest
    after them, a tied embedding by the sum of its gradients.

    The numbers are those of

    ```python
    value, grads = eqx.filter_value_and_grad(loss)(model, batch, key)
    model, state = optim.step(model, state, grads)
    ```

    for every optimizer of this library. Call it in `jit`, and donate the model and the
    state; otherwise there are two of them.

    ??? cite "Reference"

        Gonzalez Ortiz, Gupta, Rinard and Blalock, *FlashOptim: Optimizers for Memory
        Efficient Training*, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), which
        releases gradients by hooks of PyTorch. Before it, Lv, Yang, Liu, Gao, Guo and
        Qiu, *Full Parameter Fine-tuning for Large Language Models with Limited
        Resources*, [arXiv:2306.09782](https://arxiv.org/abs/2306.09782).

    **Arguments:**

    - `optim`: a [`flashquinox.Optimizer`][], with its schedules and its mask; or a
        dictionary of several, each of which trains a group of the weights: the one that
        `optax.partition` got. What `optax.set_to_zero` freezes there is left out. With
        `skip_nonfinite`, a part with a NaN or an infinity in its gradient is left as it
        is, and all others are updated: what only the epilogue reads is such a part,
        and each layer, and all of the rest. If no part is updated, the step does not
        count, for a group of weights each.
    - `loss`: a [`flashquinox.LayeredLoss`][].
    - `model`: any pytree. Every floating-point array in it is trained, but those that
        `init` got `None` for, or of 8 bits, or that are frozen by `optax.set_to_zero`.
    - `state`: `optim.init(model)`, or from the previous step of either kind; for a
        dictionary, `optax.partition(optim, labels).init(model)`.
    - `batch`, `key`: passed on to `loss`.
    - `max_norm`: the gradient of each part is scaled down to at most this Euclidean
        norm over all its leaves, in float32. `None` is no clipping.

    **Returns:**

    A 3-tuple of the new model and the new state, in the dtypes of the old, and the
    loss.

    **Raises:**

    `TypeError` if an optimizer is wrapped by Optax: clipping by the global norm and the
    accumulation of gradients need all gradients at once. `TypeError` or `ValueError` if
    model, state and loss do not fit together, or the layers of a stack are divided
    among devices.
    """
    call = "release_step"
    check_max_norm(call, max_norm)
    check_optimizers(call, optim)
    check_layered_loss(call, loss, LayeredLoss)
    step = open_groups(call, optim, model, state)
    layered = open_layers(call, loss, model, batch, key)
    trained = {}
    for index in step.places:
        leaf = step.leaves[index]
        step.check(index)
        if index in layered.stacked:
            check_layers_are_whole(call, leaf, step.sharding(index))
        if leaf.value.size > 0:
            trained[index] = jnp.asarray(leaf.value)
    step = step.verified()
    outer = {i: x for i, x in trained.items() if i not in layered.stacked}
    blocks = {i: x for i, x in trained.items() if i in layered.stacked}

    # Forward.
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

    # What the prologue does not read is done with.
    grads_last, x_bar = pull_last(jnp.ones_like(value))
    done = {
        i: grads_last[i] if i in grads_last else jnp.zeros_like(x)
        for i, x in outer.items()
        if i not in read_first
    }
    step.update(done, max_norm)
    # To be done now, so that these gradients are gone when the blocks begin.
    x_bar, new = lax.optimization_barrier((x_bar, {i: step.read(i) for i in done}))
    for index, leaf in new.items():
        step.write(index, leaf)

    # The blocks, from the last to the first. If groups lie across layers, there is no
    # such thing as a layer's state: those few leaves wait for the gradients of all.
    layers = layered.layers
    waiting = {i: x for i, x in blocks.items() if not _layers_are_whole(step.read(i))}
    stacks = {i: _by_layer(step.read(i), layers) for i in blocks if i not in waiting}
    static = {i: x for i, x in layered.stacked.items() if i not in blocks}
    divided = {i: _of_layer(step.sharding(i)) for i in blocks}
    groups = _groups({i: stack.value.size for i, stack in stacks.items()})

    # A layer is left as it is by a gradient that is not finite. Codecs learn before
    # that is known; but not from a step of which no layer will have a finite one.
    def is_finite() -> Bool[Array, ""]:
        finite = [jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(x_bar)]
        return jnp.all(jnp.stack(finite))

    learned = step.learn(list(stacks), is_finite)

    def backward(carry, inputs):
        stacks, x_bar = carry
        layer, waiting, static, key, x = inputs
        x, fixed = _split(x)

        def block(weights, x):
            return _split(layered.block(weights | static, key, eqx.combine(x, fixed)))

        weights = _slice({i: stack.value for i, stack in stacks.items()}, layer)
        _, pull, _ = jax.vjp(block, weights | waiting, x, has_aux=True)
        grads, x_bar = pull(x_bar)
        grads = _apart(grads)
        clip = step.clip(grads, divided, max_norm)
        takes = step.takes(grads, divided, clip)
        if clip is not None:
            # These are read after all other layers, of which each has its own factors.
            grads |= {i: _scaled(grads[i], clip) for i in waiting}
        for numbers in groups:
            # Not before the last ones are done with, or all of the layer's state is
            # there twice.
            some = {i: stacks[i] for i in numbers}
            stacks, some = lax.optimization_barrier((stacks, some))
            new = step.update_parts(
                {i: _slice(some[i], layer) for i in numbers},
                divided,
                grads,
                learned,
                takes,
                clip,
            )
            stacks = stacks | {
                i: _place(_put(stacks[i], part, layer), step.sharding(i))
                for i, part in new.items()
            }
        return (stacks, x_bar), ({i: grads[i] for i in waiting}, takes)

    inputs = (jnp.arange(layers), waiting, static, layered.keys.of_blocks, kept)
    (stacks, x_bar), (grads_waiting, takes) = lax.scan(
        backward, (stacks, x_bar), inputs, reverse=True
    )
    for index, stack in stacks.items():
        whole = _whole(_place(stack, step.sharding(index)), learned[index])
        step.write(index, whole)
    for group in {step.places[index][0] for index in stacks}:
        take = takes[group]
        step.count(group, None if take is None else jnp.any(take))

    # The rest.
    (grads,) = pull_first(x_bar)
    grads = {i: grads_last[i] + g if i in grads_last else g for i, g in grads.items()}
    step.update(grads, max_norm)
    step.update(grads_waiting, None)
    return *step.close(), value


def _split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """What of a tree has gradients, and what has none."""
    return eqx.partition(tree, eqx.is_inexact_array)


def _read(function: Callable[[Any], Any], values: dict[int, Array]) -> dict[int, Array]:
    """Those of the values that the result of a function depends on. A gradient for the
    others would be zeros in memory."""
    read = compat.inputs_read(function, values)
    return {
        i: x for (i, x), used in zip(sorted(values.items()), read, strict=True) if used
    }


def _scaled(grad: Array, clip: Clipping) -> Array:
    """A gradient that is clipped before it is stored."""
    factors = clip.factors_for(compute_dtype(grad.dtype))
    return scaled(grad, factors).astype(grad.dtype)


#
# Layers of a stack
#


def _layers_are_whole(stack: LeafState) -> bool:
    """Whether every layer has its own groups."""
    shape = stack.value.shape[1:]
    for moment in stack.moments.values():
        if not isinstance(moment, QuantMoment):
            continue
        if moment.axis is None and math.prod(shape) % moment.group_size != 0:
            return False
        if moment.axis == -len(shape) - 1:
            return False
    return True


def _groups(sizes: dict[int, int]) -> list[list[int]]:
    """Leaves that are updated together, one after the other: as many as are no larger
    than the largest leaf."""
    groups: list[list[int]] = []
    left = 0
    for index, size in sizes.items():
        if size > left:
            groups.append([])
            left = max(sizes.values())
        groups[-1].append(index)
        left -= size
    return groups


def _by_layer(stack: LeafState, layers: int) -> LeafState:
    """With an axis of layers also where groups run through the flattened leaf; and
    without what is the same for all layers."""

    def one(moment: StoredMoment) -> StoredMoment:
        if not isinstance(moment, QuantMoment):
            return moment
        scales = moment.scales
        if moment.axis is None:
            scales = scales.reshape(layers, -1)
        return _with(moment, scales, None)

    return stack._replace(moments={k: one(x) for k, x in stack.moments.items()})


def _whole(stack: LeafState, learned: Learned) -> LeafState:
    """The inverse, with what was learned."""

    def one(name: str, moment: StoredMoment) -> StoredMoment:
        if not isinstance(moment, QuantMoment):
            return moment
        scales = moment.scales
        if moment.axis is None:
            scales = scales.reshape(-1)
        return _with(moment, scales, learned.get(name, (None, None))[1])

    return stack._replace(moments={k: one(k, x) for k, x in stack.moments.items()})


def _with(moment: QuantMoment, scales: Array, parameter: Scalar | None) -> QuantMoment:
    return QuantMoment(
        moment.codes,
        scales,
        moment.axis,
        moment.group_size,
        moment.codec,
        parameter,
    )


def _of_layer(sharding: NamedSharding | None) -> NamedSharding | None:
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _slice(stack: PyTree[Array], layer: Array) -> PyTree[Array]:
    """One layer."""
    part = jtu.tree_map(
        lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False), stack
    )
    # Or XLA reads the stack where it needs a number, also after it has written to it:
    # then it has two.
    return _apart(part)


def _put(stack: PyTree[Array], part: PyTree[Array], layer: Array) -> PyTree[Array]:
    return jtu.tree_map(
        lambda x, y: lax.dynamic_update_index_in_dim(x, y, layer, 0),
        stack,
        _apart(part),
    )


def _place(stack: LeafState, sharding: NamedSharding | None) -> LeafState:
    """Where it was. XLA may find another place that suits the gradients."""
    if sharding is None:
        return stack
    where = state_specs.of_arrays(stack, sharding)
    return jtu.tree_map(meshes.place, stack, where)


def _apart(tree: PyTree[Array]) -> PyTree[Array]:
    """Arrays that are computed before what uses them: in their dtypes, by programs that
    know nothing of it. So it is in an ordinary step. One by one, as they need not be
    there at the same time.
    """
    return jtu.tree_map(lax.optimization_barrier, tree)
