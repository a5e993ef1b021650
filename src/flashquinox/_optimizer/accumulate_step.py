"""The step of an optimizer by the gradients in sums."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, ScalarLike

from .._backends.clear import clear_if
from .._common import memory, meshes
from .._model.trees import flatten, Leaf, Rebuild
from .._storage.quant_moment import StoredMoment
from .._storage.split import Correction
from .._tile.tile import no_update
from .engine import StepEngine
from .sums_as_gradients import SumReader


class Arrays(NamedTuple):
    """What a step changes: arrays of the leaves that have gradients, and the leaves of
    the state of the optimizer. With `update`, updates in place of weights."""

    weights: list[Array]
    inner: list[Array]
    sums: list[StoredMoment]
    corrections: list[Correction | None]


@dataclasses.dataclass(frozen=True)
class AccumulatedStep:
    """The step of an optimizer by the gradients in sums.

    - `reader`: what makes gradients of sums.
    - `leaves`, `rebuild`: the model.
    - `dtypes`: of leaves that have gradients, the dtypes of these.
    - `structure`: that of the state of the optimizer.
    - `divisor`: what sums are divided by.
    - `is_last`: whether to take it.
    """

    engine: StepEngine
    reader: SumReader
    method: str
    leaves: list[Leaf]
    rebuild: Rebuild
    dtypes: dict[int, Any]
    structure: Any
    max_norm: ScalarLike | None
    divisor: ScalarLike
    is_last: Array

    def take_if_last(self, old: Arrays) -> tuple[Arrays, Any]:
        """The arrays after this step, if it is to be taken, and the structure of the
        state of the optimizer."""
        if not isinstance(self.is_last, jax.core.Tracer):
            not_taken = self._not_taken(old), self.structure
            return self._taken(old) if self.is_last else not_taken
        structure = []

        def taken(old: Arrays) -> Arrays:
            new, found = self._taken(old)
            structure.append(found)
            return new

        is_last = self.is_last
        if memory.any_on_host(old):
            is_last = _refuse_vmap(is_last)
        new = lax.cond(is_last, taken, self._not_taken, old)
        return self._cleared(new, self._cleared_later(old)), structure[0]

    def model(self, weights: list[Array]) -> PyTree:
        """The model with these weights. Of an update, `None` for all others."""
        as_update = self.method == "update"
        values = [None if as_update else leaf.value for leaf in self.leaves]
        return self.rebuild(_replaced(values, self.dtypes, weights))

    def _taken(self, old: Arrays) -> tuple[Arrays, Any]:
        sums = list(zip(old.sums, old.corrections, strict=True))
        values = _replaced([x.value for x in self.leaves], self.dtypes, old.weights)
        model = self.rebuild(values)
        there, grads = self.reader.read(
            model, dict(zip(self.dtypes, sums, strict=True))
        )
        nothing = [None for _ in self.leaves]
        model, state = self.engine.advance(
            self.method,
            model,
            self.structure.unflatten(old.inner),
            self.rebuild.state(_replaced(nothing, self.dtypes, grads)),
            self.max_norm,
            self.divisor,
            may_be_bits=True,
        )
        new, _ = flatten(model)
        weights = [new[i].value for i in self.dtypes]
        inner, structure = jtu.tree_flatten(state)
        # A sum is read by then, so that zeros can be in its place: each as soon as its
        # own weight is known.
        pairs = [
            lax.optimization_barrier(pair) for pair in zip(weights, there, strict=True)
        ]
        weights, there = [x for x, _ in pairs], [x for _, x in pairs]
        # Those that kernels clear are left as they are.
        kept = {i: sums[i] for i in self._cleared_later(old)}
        others = [i for i in range(len(sums)) if i not in kept]
        pick = lambda found: [found[i] for i in others]
        arrays, olds = (jtu.tree_leaves(pick(x)) for x in (there, sums))
        zeros = _zeros(arrays, olds, self.is_last)
        zeros = jtu.tree_structure(pick(sums)).unflatten(zeros)
        there = dict(zip(others, zeros, strict=True)) | kept
        there = [there[i] for i in range(len(sums))]
        return Arrays(
            weights, inner, [x for x, _ in there], [x for _, x in there]
        ), structure

    def _cleared_later(self, old: Arrays) -> list[int]:
        """The sums that are cleared after the branches."""
        if not isinstance(self.is_last, jax.core.Tracer):
            return []
        sums = list(zip(old.sums, old.corrections, strict=True))
        return self.reader.by_kernels(sums)

    def _cleared(self, new: Arrays, numbers: list[int]) -> Arrays:
        """The same with zeros in the place of these sums, if the step was taken."""
        if not numbers:
            return new
        sums, corrections = list(new.sums), list(new.corrections)
        arrays, of_sums = jtu.tree_flatten([(sums[i], corrections[i]) for i in numbers])
        cleared = of_sums.unflatten(clear_if(self.is_last, arrays, new.weights[0]))
        for i, (total, correction) in zip(numbers, cleared, strict=True):
            sums[i], corrections[i] = total, correction
        return new._replace(sums=sums, corrections=corrections)

    def _not_taken(self, old: Arrays) -> Arrays:
        if self.method == "step":
            return old
        return old._replace(weights=[*map(no_update, old.weights)])


@jax.custom_batching.custom_vmap
def _refuse_vmap(is_last: Array) -> Array:
    """The same. Under `vmap`, an error: JAX would choose between arrays in host memory
    on the device, which it cannot."""
    return is_last


@_refuse_vmap.def_vmap
def _(*_: Any) -> Any:
    raise NotImplementedError(
        "`accumulate(...).step`, or `update`, under `vmap` takes no state in host "
        "memory. Put the state on the device with `jax.device_put`, or leave out "
        f'`state_memory="{memory.HOST_KIND}"`.'
    )


def _zeros(there: list[Array], old: list[Array], is_last: Array) -> list[Array]:
    """Zeros in the place of the arrays of sums. `there` is what has been read of them,
    and is in their place if that is on the device."""
    found: list[Array] = []
    previous: list[Array] = []
    for x, y in zip(there, old, strict=True):
        if not memory.is_on_host(x):
            # XLA knows from this that the array is read before it is written. Without
            # it, it would keep a second one.
            found.append(memory.where(jnp.where(is_last, jnp.zeros_like(x), x), y))
            continue
        # What was not read, one array after the other, so that zeros of only one are on
        # the device.
        zero, previous = lax.optimization_barrier((jnp.zeros((), y.dtype), previous))
        zeros = jnp.broadcast_to(zero, y.shape)
        if isinstance(y, jax.core.Tracer):
            zeros = meshes.as_typed(zeros, jax.typeof(y).sharding)
        previous = [memory.where(zeros, y)]
        found += previous
    return found


def _replaced(values: list[Any], numbers: Iterable[int], new: list[Any]) -> list[Any]:
    """A list with others at these numbers."""
    changed = list(values)
    for i, x in zip(numbers, new, strict=True):
        changed[i] = x
    return changed
