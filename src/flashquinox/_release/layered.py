"""A loss in three parts, of a model whose middle is a stack of equal blocks: a prologue
before the blocks, a block, and an epilogue after them.

In a language model, the prologue is the embedding, a block is attention and MLP, and
the epilogue is the last norm, the head and the cross-entropy. With the parts apart, the
backward pass can go one block at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Key, PyTree

from .._common.number_checks import check_function
from .._model.blocks import count_layers, part_of
from .._model.trees import flatten, Leaf
from .checks import (
    check_block_keeps_shapes,
    check_layered_loss,
    check_loss,
    check_random_key,
)


class LayeredLoss(eqx.Module):
    r"""The loss of a model with stacked blocks,

    $$x_0 = \text{prologue}(\theta), \qquad
    x_l = \text{block}(\phi_l, x_{l-1}), \qquad
    \ell = \text{epilogue}(\theta, x_L),$$

    where $\phi$ are the blocks and $\theta$ is the rest of the model. Every array of
    the blocks has $L$ layers along its first axis. Both `prologue` and `epilogue` get
    all of $\theta$, so that both can use a tied embedding.

    It is a function of the model, the batch and a key, of which `eqx.filter_grad` takes
    the gradient: a `jax.lax.scan` over the blocks, each of which is computed again in
    the backward pass (`jax.checkpoint`). [`flashquinox.release_step`][] takes it too.

    ??? Example

        ```python
        class Model(eqx.Module):
            embedding: jax.Array
            blocks: Block  # made by eqx.filter_vmap(Block)(keys)
            norm: eqx.nn.RMSNorm

        def epilogue(model, x, tokens, key):
            logits = jax.vmap(jax.vmap(model.norm))(x) @ model.embedding.T
            return cross_entropy(logits, tokens[:, 1:])

        loss = fq.LayeredLoss(
            blocks=lambda model: model.blocks,
            prologue=lambda model, tokens, key: model.embedding[tokens[:, :-1]],
            block=lambda block, x, tokens, key: jax.vmap(block)(x),
            epilogue=epilogue,
        )
        grads = eqx.filter_grad(loss)(model, tokens)
        ```

    **Arguments:**

    - `blocks`: a function from the model to its blocks: to a subtree, or several.
    - `prologue`: a function `(model, batch, key) -> x`. Its `model` has `None` in place
        of the blocks.
    - `block`: a function `(block, x, batch, key) -> x` of a single layer. It returns
        the shapes and dtypes that it gets. `x` is any pytree of arrays, and is stored
        for every layer.
    - `epilogue`: a function `(model, x, batch, key) -> loss`, whose `model` is that of
        `prologue`. The loss is a floating-point scalar.
    """

    blocks: Callable[[PyTree], PyTree]
    prologue: Callable[..., PyTree[Array]]
    block: Callable[..., PyTree[Array]]
    epilogue: Callable[..., Float[Array, ""]]

    def __check_init__(self):
        for name in ("blocks", "prologue", "block", "epilogue"):
            check_function(type(self).__name__, name, getattr(self, name))

    def __call__(
        self, model: PyTree, batch: PyTree, key: Key[Array, ""] | None = None
    ) -> Float[Array, ""]:
        """The loss.

        **Arguments:**

        - `model`: any pytree that the functions take.
        - `batch`: any pytree, passed to each of the functions.
        - `key`: a random key, for dropout say, or `None`. Each function, and each
            layer, gets a key of its own.

        **Returns:**

        A floating-point scalar.

        **Raises:**

        `TypeError` or `ValueError` if the model has no such blocks, or a function does
        not return what is described above.
        """
        opened = open_layers("LayeredLoss(...)", self, model, batch, key)
        x = opened.prologue({})

        def body(x, inputs):
            values, key = inputs
            return opened.block(values, key, x), None

        x, _ = lax.scan(body, x, (opened.stacked, opened.keys.of_blocks))
        return opened.epilogue({}, x)


class _Keys(NamedTuple):
    of_prologue: Any
    of_blocks: Any
    of_epilogue: Any

    @staticmethod
    def split(call: str, key: Key[Array, ""] | None, layers: int) -> "_Keys":
        if key is None:
            return _Keys(None, None, None)
        check_random_key(call, key)
        keys = jax.random.split(key, layers + 2)
        return _Keys(keys[0], keys[1:-1], keys[-1])


class OpenedLayers(NamedTuple):
    """A loss and its model, taken apart.

    - `leaves`, `rebuild`: the model. Other fields have the numbers of leaves in it.
    - `inside`, `rebuild_blocks`: the leaves of the blocks, and a function from as many
        values to such blocks.
    - `stacked`: the arrays among them.
    """

    call: str
    loss: LayeredLoss
    leaves: list[Leaf]
    rebuild: Callable[[list[Any]], PyTree]
    inside: list[int]
    rebuild_blocks: Callable[[list[Any]], PyTree]
    stacked: dict[int, Array]
    layers: int
    batch: PyTree
    keys: _Keys

    def prologue(self, values: Mapping[int, Array]) -> PyTree[Array]:
        """The prologue, with these values in place of some leaves of the model."""
        return self.loss.prologue(
            self._outer(values), self.batch, self.keys.of_prologue
        )

    def block(
        self, values: Mapping[int, Array], key: Any, x: PyTree[Array]
    ) -> PyTree[Array]:
        """One layer. The backward pass computes it again from its inputs."""

        # A new function for each call, because `jax.checkpoint` caches by function, and
        # this one closes over different arrays each time.
        @jax.checkpoint
        def block(values, key, x):
            leaves = [values.get(i, self.leaves[i].value) for i in self.inside]
            return self.loss.block(self.rebuild_blocks(leaves), x, self.batch, key)

        new = block(dict(values), key, x)
        check_block_keeps_shapes(self.call, x, new)
        return new

    def epilogue(
        self, values: Mapping[int, Array], x: PyTree[Array]
    ) -> Float[Array, ""]:
        """The epilogue, with these values in place of some leaves of the model."""
        loss = self.loss.epilogue(
            self._outer(values), x, self.batch, self.keys.of_epilogue
        )
        check_loss(self.call, loss)
        return loss

    def _outer(self, values: Mapping[int, Array]) -> PyTree:
        inside = set(self.inside)
        return self.rebuild(
            [
                None if i in inside else values.get(i, leaf.value)
                for i, leaf in enumerate(self.leaves)
            ]
        )


def open_layers(
    call: str, loss: Any, model: PyTree, batch: PyTree, key: Any
) -> OpenedLayers:
    check_layered_loss(call, loss, LayeredLoss)
    leaves, rebuild = flatten(model)
    name = type(loss).__name__
    inside, rebuild_blocks = part_of(name, "blocks", loss.blocks, model)
    stacked = {i: leaves[i].value for i in inside if eqx.is_array(leaves[i].value)}
    layers = count_layers(name, [leaves[i] for i in stacked])
    return OpenedLayers(
        call=call,
        loss=loss,
        leaves=leaves,
        rebuild=rebuild,
        inside=inside,
        rebuild_blocks=rebuild_blocks,
        stacked=jtu.tree_map(jnp.asarray, stacked),
        layers=layers,
        batch=batch,
        keys=_Keys.split(call, key, layers),
    )
