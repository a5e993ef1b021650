"""Taking a step of leaves, pass by pass."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TYPE_CHECKING

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._backends.dispatch import LeafStep
from .._common import memory
from .._common.dtypes import compute_dtype, numbers_of
from .._rules.whole_leaf import AbstractMatrixRule
from .._sharding.learned import learn
from .._storage.layout import flattened
from .._storage.split import decode_weight
from .._tile.clipping import Clipping, scaled
from .._tile.step import LeafScalars, StepScalars, StepStructure, TileState
from .._tile.stored_gradient import StoredGradient
from . import derivatives
from .directions import between, direction_dtype
from .part import Advanced, Part
from .passes import Pass
from .stored_leaf import Learned
from .streaming import Stream
from .together import batches, portions, room_for_directions


if TYPE_CHECKING:
    from .step_in_progress import StepInProgress


@dataclasses.dataclass(frozen=True)
class Advance:
    """What one step of some leaves has in common.

    - `learn`: whether codecs that learn do so now.
    - `as_update`, `in_loop`: as of [`flashquinox._tile.step.StepStructure`][].
    """

    step: "StepInProgress"
    all_finite: Bool[Array, ""] | None
    clip: Clipping | None
    learn: bool
    as_update: bool = False
    in_loop: bool = False

    def all(self, of: Sequence[Part]) -> list[Advanced]:
        """One step of these leaves."""
        if memory.any_on_host([(x.old, x.grad) for x in of]):
            return self._with_streamed(of)
        passes = [self.step.passes[x.number] for x in of]
        if all([x.between is None for x in passes]):
            return self._pass(of, [x.last for x in passes], self.clip)
        return self._here(of)

    def _with_streamed(self, of: Sequence[Part]) -> list[Advanced]:
        """One step of leaves, some of which may be in host memory. Those that are
        streamed through the device, and those whose gradients are, come last, as their
        copies can begin before."""
        away = [
            i
            for i, x in enumerate(of)
            if self.step.is_streamed(x) or isinstance(x.grad, StoredGradient)
        ]
        here = [i for i in range(len(of)) if i not in set(away)]
        done = dict(zip(here, self._here([of[i] for i in here]), strict=True))
        if away:
            # Arrays that arrive need not be in the large memory of a device.
            advance = dataclasses.replace(self, in_loop=True)
            portions_there = portions(self.step, of, away)
            streamed = [self.step.is_streamed(x) for x in of]
            stream = Stream(of, portions_there, streamed, self.as_update)
            done |= stream.update(advance._here)
        return [done[i] for i in range(len(of))]

    def _here(self, of: Sequence[Part]) -> list[Advanced]:
        """One step of leaves whose state need not be streamed."""
        passes = self.step.passes
        one = [i for i, x in enumerate(of) if passes[x.number].between is None]
        only = [passes[of[i].number].last for i in one]
        done = dict(
            zip(one, self._pass([of[i] for i in one], only, self.clip), strict=True)
        )
        previous: list[int] = []
        two = [i for i in range(len(of)) if i not in done]
        room = room_for_directions(self.step)
        for batch in batches(self.step, of, two, room):
            here = [of[i] for i in batch]
            # One batch after the other, so that only one has directions in memory.
            grads, before = lax.optimization_barrier(
                ([x.grad for x in here], [done[i].new.weight for i in previous])
            )
            for i, weight in zip(previous, before, strict=True):
                new = dataclasses.replace(done[i].new, weight=weight)
                done[i] = done[i]._replace(new=new)
            here = [
                x._replace(grad=numbers_of(g)) for x, g in zip(here, grads, strict=True)
            ]
            done.update(zip(batch, self._twice(here), strict=True))
            previous = batch
        return [done[i] for i in range(len(of))]

    def learned(self, of: Sequence[Part]) -> list[Learned]:
        """What codecs that learn have learned of these leaves before a step. Gradients
        are not looked at."""
        found: list[Learned] = [{} for _ in of]
        for select in (lambda x: x.first, lambda x: x.last):
            passes = [select(self.step.passes[x.number]) for x in of]
            at = [i for i, one in enumerate(passes) if one is not None]
            here = [of[i] for i in at]
            steps = self._leaf_steps(here, [passes[i] for i in at])
            steps = learn(steps, [x.sharding for x in here])
            for i, leaf_step in zip(at, steps, strict=True):
                found[i] |= leaf_step.scalars.leaf.parameters
        return found

    def _twice(self, of: Sequence[Part]) -> list[Advanced]:
        """Leaves whose rules need whole leaves."""
        passes = [self.step.passes[x.number] for x in of]
        dtypes = [
            direction_dtype(one.between, x.old.weight)
            for one, x in zip(passes, of, strict=True)
        ]
        # What gives the direction its shape and its dtype.
        stand_ins = [
            x._replace(
                old=TileState(x.grad.astype(dtype), None, x.old.codes, x.old.scales)
            )
            for x, dtype in zip(of, dtypes, strict=True)
        ]
        with_first = {i: x.first for i, x in enumerate(passes) if x.first is not None}
        firsts = self._pass(
            [stand_ins[i] for i in with_first], [*with_first.values()], self.clip
        )
        moved = dict(zip(with_first, firsts, strict=True))
        directions = [
            moved[i].new.weight if i in moved else self._clipped(x).astype(dtype)
            for i, (x, dtype) in enumerate(zip(of, dtypes, strict=True))
        ]
        masters = [decode_weight(x.old.weight, x.old.correction) for x in of]
        for i, (master, one) in enumerate(zip(masters, passes, strict=True)):
            if one.l2 is not None:
                wide = directions[i].astype(master.dtype) + one.l2 * master
                directions[i] = wide.astype(dtypes[i])
        new = between(self.step, of, directions, masters, self.all_finite)
        second = [x._replace(grad=grad) for x, (grad, _) in zip(of, new, strict=True)]
        done = self._pass(second, [x.last for x in passes], None)
        for i, (_, means) in enumerate(new):
            codes, scales = means, dict[str, Any].fromkeys(means)
            parameters = done[i].parameters
            if i in moved:
                codes, scales = codes | moved[i].new.codes, scales | moved[i].new.scales
                parameters = moved[i].parameters | parameters
            state = dataclasses.replace(
                done[i].new,
                codes=codes | done[i].new.codes,
                scales=scales | done[i].new.scales,
            )
            done[i] = Advanced(state, parameters)
        return done

    def _pass(
        self, of: Sequence[Part], passes: Sequence[Pass], clip: Clipping | None
    ) -> list[Advanced]:
        """One pass over these leaves."""
        if not of:
            return []
        step, shardings = self.step, [x.sharding for x in of]
        steps = self._leaf_steps(of, passes, clip)
        if self.learn:
            steps = learn(steps, shardings)
        leaves = [step.leaves[x.number] for x in of]
        update, arrays = derivatives.differentiable(
            step.call, step.way, leaves, steps, shardings
        )
        return [
            Advanced(new, leaf_step.scalars.leaf.parameters)
            for leaf_step, new in zip(steps, update(*arrays), strict=True)
        ]

    def _leaf_steps(
        self, of: Sequence[Part], passes: Sequence[Pass], clip: Clipping | None = None
    ) -> list[LeafStep]:
        """What a pass over these leaves takes. Leaves that are trained and stored alike
        share its structure."""
        storage, made, found = self.step.settings.storage, {}, []
        for x, one in zip(of, passes, strict=True):
            old, stored = x.old, self.step.stored[x.number]
            names, shape = [*one.moments], x.grad.shape
            of_leaf = self.step.passes[x.number]
            is_last = one is of_leaf.last
            codecs = tuple([stored.codecs[name] for name in names])
            bases = tuple([stored.bases[name] for name in names])
            # A kernel cannot have arrays of one device's part in common.
            is_packed = stored.is_packed and x.sharding is None
            key = id(one), is_packed, *map(id, codecs), *bases
            if key not in made:
                made[key] = StepStructure(
                    one.rule,
                    codecs,
                    bases,
                    one.is_decoupled,
                    self.as_update and is_last,
                    storage.dither_weights and is_last,
                    as_direction=one is of_leaf.first,
                    in_stack=isinstance(of_leaf.between, AbstractMatrixRule),
                    is_packed=is_packed,
                    in_loop=self.in_loop,
                )
            scales = {name: old.scales[name] for name in names}
            parameters = x.parameters
            number = np.asarray(x.number, np.uint32)
            scalars = StepScalars(
                rule=one.scalars,
                decay=one.decay,
                count=self.step.count,
                leaf=LeafScalars(
                    number,
                    {name: parameters[name] for name in names if name in parameters},
                ),
                take=self.all_finite,
                clip=None if clip is None else _factors(clip, old.weight, x.grad),
            )
            codes = {name: old.codes[name] for name in names}
            tile = TileState(old.weight, old.correction, codes, scales)
            groups = stored.groups if tile.is_grouped else None
            if groups is None:
                layout = flattened(shape, max(1, x.grad.size))
            else:
                layout = groups if groups.shape == shape else groups.of_shape(shape)
            found.append(LeafStep(made[key], layout, scalars, x.grad, tile))
        return found

    def _clipped(self, x: Part) -> Array:
        if self.clip is None:
            return x.grad
        return scaled(x.grad, _factors(self.clip, x.old.weight, x.grad))


def _factors(clip: Clipping, weight: Array, grad: Array) -> Any:
    # A float64 gradient may only fit a float32 weight once it is scaled.
    dtypes = [jnp.dtype(compute_dtype(x.dtype)) for x in (weight, grad)]
    return clip.factors_for(max(dtypes, key=lambda x: x.itemsize))
