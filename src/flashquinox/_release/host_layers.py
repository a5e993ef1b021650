"""Layers of a state in host memory, on their way while others are computed.

The backward pass takes one layer after the other, from the last to the first. The
arrays of a state are two halves, as equal in bytes as may be:

- while this layer is computed again, the first half of what the one before it has
  become is written to host memory, and the second half of this layer's state is read;
- from its first gradient on, while the others are computed, the second half of that is
  written, and the first half of this is read;
- it is updated on the device, and waits there to be written beside the next layer.

So both directions of the bus are in use at the same time, but no array is read and
written at once: both are slices of it, and XLA would otherwise copy all of it, as it
cannot tell that they are apart.

On GPUs, XLA leaves slices to the engines that copy, on streams of their own, where it
knows their offsets in advance: these are affine in the counter of the loop that is a
part of each turn. Where it does not, kernels copy them, which take turns with products.
So the first turn, before which there is nothing to write, is not one of the loop.

XLA also records what it can into CUDA graphs, which take one thing after the other, and
copies by engines are no exception. No graph has a copy that XLA knows to be one between
memories, and none has the beginning of a copy without its end. So beside each batch of
copies, a few bytes go from one memory to the other: the counts of steps, which updates
need, arrive when the first gradient is computed, and have gone back before the update.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .. import _compat
from .._backends.host_copies import needs_kernels
from .._common import memory
from .._tile.step import TileState
from . import kernel_layers
from .stacks import read_layer


T = TypeVar("T")
U = TypeVar("U")
C = TypeVar("C")
# The states of stacks, or of layers of them, with `None` in place of arrays in another
# memory.
Stacks: TypeAlias = dict[int, TileState]
# The gradient of an addend is there before the forward part is computed.
_SUMS = ("add", "add_any", "sub")


class Moving(NamedTuple):
    """What a turn of the backward pass has of the state in host memory.

    - `stacks`: those that XLA copies.
    - `flown`: those that kernels copy.
    - `leaving`: what is still to be written of the layer after this one.
    - `counts`: those of steps, in host memory.
    """

    stacks: Stacks
    flown: Stacks
    leaving: Stacks
    counts: list[Array]


class Departed(NamedTuple):
    """Copies of one turn that have begun. `parts` is what is still to be written of the
    second half."""

    stacks: tuple[Stacks, Stacks]
    parts: Stacks
    arrived: Stacks
    crossing: kernel_layers.Crossing
    moving: Moving


class HostLayers:
    """The copies of the backward pass.

    - `stacks`: the states of all stacks.
    - `write`: a function of stacks, layers of some of them, and a number: the stacks in
        which these are the layers of that number.
    - `divided`: the numbers of the stacks that are divided among devices.
    - `first`: gives the number of the weight whose gradient is computed first.
    """

    def __init__(
        self,
        stacks: Stacks,
        write: Callable[[Stacks, Stacks, Any], Stacks],
        divided: Collection[int],
        first: Callable[[Stacks], int],
    ):
        self._all, self._write = stacks, write
        self.here, away = _split(stacks)
        self.is_empty = not jtu.tree_leaves(away)
        self._first = None if self.is_empty else first(self.here)
        # Kernels copy no parts of arrays that are divided.
        self._by_kernels = {
            i: jtu.tree_map(lambda x, i=i: i not in divided and needs_kernels(x, 1), x)
            for i, x in stacks.items()
        }
        self._flown, self._away = kernel_layers.split(away, self._by_kernels)
        self._are_second = second_half(self._away)

    def before_all(self, counts: list[Array]) -> Moving:
        """Before the last layer, with which the backward pass begins."""
        nothing: Stacks = self._away if self.is_empty else {}
        return Moving(self._away, self._flown, nothing, counts)

    def depart(self, moving: Moving, layer: Array, read: T) -> tuple[Departed, T]:
        """Begins the copies of a turn. `read` is what it takes of its layer from the
        device."""
        read, leaving = _before(read, moving.leaving)
        flying, leaving = kernel_layers.split(leaving, self._by_kernels)
        crossing, read = kernel_layers.depart(moving.flown, flying, layer, read)
        one, two = halves(moving.stacks, self._are_second)
        leaving_1, leaving_2 = halves(leaving, self._are_second)
        one = self._write(one, leaving_1, layer + 1)
        arrived = read_layer(two, layer)
        return Departed((one, two), leaving_2, arrived, crossing, moving), read

    def land(
        self, departed: Departed, layer: Array, grads: dict[int, Array]
    ) -> tuple[Moving, Stacks, dict[int, Array], list[Array]]:
        """Ends the copies of a turn: what is moving after it, the state of this layer,
        its gradients, and the counts of steps on the device."""
        (one, two), leaving_2, arrived_2, crossing, moving = departed
        counts = arrived_counts = moving.counts
        if self._first is not None:
            moved = one, two, leaving_2, arrived_2
            grads[self._first], moved, arrived_counts = _after(
                grads[self._first], moved, counts
            )
            one, two, leaving_2, arrived_2 = moved
            counts = memory.to_host(arrived_counts)
        two = self._write(two, leaving_2, layer + 1)
        moved = read_layer(one, layer), two, counts
        arrived_1, two, counts = lax.optimization_barrier(moved)
        stacks = eqx.combine(one, two)
        flown, landed, grads = kernel_layers.land(crossing, moving.flown, grads)
        arrived = eqx.combine(arrived_1, arrived_2, landed)
        return Moving(stacks, flown, {}, counts), arrived, grads, arrived_counts

    def leave(self, new: Stacks) -> tuple[Stacks, Stacks]:
        """What of the new state of a layer stays on the device, and what leaves."""
        old = {i: self._all[i] for i in new}
        leaves, stays = eqx.partition(new, jtu.tree_map(memory.is_on_host, old))
        return stays, leaves

    def after_all(self, here: Stacks, moving: Moving) -> Stacks:
        """All stacks, once the first layer is written too."""
        flying, leaving = kernel_layers.split(moving.leaving, self._by_kernels)
        flown = kernel_layers.write_last(moving.flown, flying)
        return eqx.combine(here, self._write(moving.stacks, leaving, 0), flown)


@jax.custom_batching.custom_vmap
def refuse_vmap(loss: Array) -> Array:
    """The same loss. Under `vmap`, an error: JAX would gather layers of arrays in host
    memory by numbers on the device, which it cannot."""
    return loss


@refuse_vmap.def_vmap
def _(*_: Any) -> Any:
    raise NotImplementedError(
        "`release_step` under `vmap` takes no state in host memory. Take an ordinary "
        "step, or put the state on the device with `jax.device_put`."
    )


def _split(tree: T) -> tuple[T, T]:
    """A tree as two, with `None` in place of the others: the arrays on the device, and
    those in host memory."""
    away, here = eqx.partition(tree, memory.is_on_host)
    return here, away


def second_half(stacks: dict[int, T]) -> dict[int, T]:
    """Which of these arrays are the second half of them, in bytes: a tree of booleans.
    The largest come first, each to the half that has less."""
    arrays, structure = jtu.tree_flatten(stacks)
    held, found = [0, 0], [False] * len(arrays)
    for i in sorted(range(len(arrays)), key=lambda i: -arrays[i].nbytes):
        found[i] = held[1] < held[0]
        held[found[i]] += arrays[i].nbytes
    return structure.unflatten(found)


def halves(
    tree: dict[int, T], are_second: dict[int, Any]
) -> tuple[dict[int, T], dict[int, T]]:
    """Stacks, or a layer of them, as two trees, with `None` in place of the arrays of
    the other half."""
    second, one = eqx.partition(tree, {i: are_second[i] for i in tree})
    return one, second


def _before(read: T, leaving: U) -> tuple[T, U]:
    """What is read on the device, and what is written to host memory after that. XLA
    may put both copies on one stream, where a short one would wait for long ones."""
    if not jtu.tree_leaves(leaving):
        return read, leaving
    return lax.optimization_barrier((read, leaving))


def _after(grad: Array, moved: T, counts: C) -> tuple[Array, T, C]:
    """The first gradient of a layer, what has been moved when it is computed, and
    counts that have arrived from host memory by then."""
    grad, counts = lax.optimization_barrier((grad, counts))
    return lax.optimization_barrier((grad, moved, memory.to_device(counts)))


def first_gradient(
    block: Callable[..., PyTree], weights: dict[int, Array], x: PyTree
) -> int:
    """The number of the weight whose gradient the backward part computes first: the one
    that is last to be multiplied by anything, if any is."""
    traced = jax.make_jaxpr(block)(weights, x)
    order: dict[int, int] = {}
    times = iter(range(2**62))

    def apply(operation: Any, operands: list[Any]) -> Sequence[Any]:
        """Values are the weights that they are made of alone."""
        function = _compat.called(operation)
        if function is not None:
            return _compat.evaluate(function, operands, alone, alone, apply)
        time = next(times)
        arrays = [
            own
            for own, x in zip(operands, operation.invars, strict=True)
            if own or x.aval.ndim > 0
        ]
        own = frozenset[int]().union(*arrays)
        is_alone = all(arrays)
        if not is_alone:
            if operation.primitive.name not in _SUMS:
                for number in own:
                    order.setdefault(number, time)
            own = frozenset[int]()
        return [own for _ in operation.outvars]

    alone = lambda _: frozenset[int]()
    numbers = [frozenset([i]) for i in sorted(weights)]
    args = [*numbers, *[frozenset[int]() for _ in jtu.tree_leaves(x)]]
    _compat.evaluate(_compat.Function.of(traced), args, alone, alone, apply)
    return max(weights, key=lambda number: order.get(number, -1))
