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
from .._common import memory
from .._model.trees import flatten, Leaf, Rebuild
from .._storage.quant_moment import StoredMoment
from .._storage.split import Correction
from .._tile.tile import no_update
from .engine import StepEngine
from .sums_as_gradients import Sum, SumReader


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
        sums = self._sums(old)
        values = _replaced([x.value for x in self.leaves], self.dtypes, old.weights)
        model = self.rebuild(values)
        # Those that kernels clear are left as they are.
        stored = self.reader.stored(sums, self._cleared_later(old))
        there, grads = self.reader.read(
            model, {i: x for i, x in sums.items() if i not in stored}
        )
        nothing = [None for _ in self.leaves]
        model, state, totals = self.engine.advance_by_sums(
            self.method,
            model,
            self.structure.unflatten(old.inner),
            self.rebuild.state(_replaced(nothing, grads, [*grads.values()])),
            self.max_norm,
            self.divisor,
            {self.leaves[i].unwrapped: x for i, x in stored.items()},
        )
        new, _ = flatten(model)
        weights = {i: new[i].value for i in self.dtypes}
        inner, structure = jtu.tree_flatten(state)
        for i, x in stored.items():
            arrays = totals.get(self.leaves[i].unwrapped)
            if arrays is not None and not x.is_kept:
                sums[i] = x.sum_of(sums[i][0], arrays)
        for i, x in there.items():
            # A sum is read by then, so that zeros can be in its place: each as soon as
            # its own weight is known.
            weights[i], x = lax.optimization_barrier((weights[i], x))
            sums[i] = jtu.tree_map(self._zeros, x)
        return self._with_sums(
            Arrays([*weights.values()], inner, [], []), sums
        ), structure

    def _zeros(self, x: Array) -> Array:
        """Zeros in the place of an array of a sum. XLA knows from the condition that it
        is read before it is written. Without it, it would keep a second one."""
        return jnp.where(self.is_last, jnp.zeros_like(x), x)

    def _sums(self, arrays: Arrays) -> dict[int, Sum]:
        pairs = zip(arrays.sums, arrays.corrections, strict=True)
        return dict(zip(self.dtypes, pairs, strict=True))

    def _with_sums(self, arrays: Arrays, sums: dict[int, Sum]) -> Arrays:
        pairs = [sums[i] for i in self.dtypes]
        return arrays._replace(
            sums=[x for x, _ in pairs], corrections=[x for _, x in pairs]
        )

    def _cleared_later(self, old: Arrays) -> list[int]:
        """The sums that are cleared after the branches."""
        if not isinstance(self.is_last, jax.core.Tracer):
            return []
        return self.reader.by_kernels(self._sums(old))

    def _cleared(self, new: Arrays, numbers: list[int]) -> Arrays:
        """The same with zeros in the place of these sums, if the step was taken."""
        if not numbers:
            return new
        sums = self._sums(new)
        arrays, structure = jtu.tree_flatten([sums[i] for i in numbers])
        cleared = structure.unflatten(clear_if(self.is_last, arrays, new.weights[0]))
        return self._with_sums(new, sums | dict(zip(numbers, cleared, strict=True)))

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


def _replaced(values: list[Any], numbers: Iterable[int], new: list[Any]) -> list[Any]:
    """A list with others at these numbers."""
    changed = list(values)
    for i, x in zip(numbers, new, strict=True):
        changed[i] = x
    return changed
