"""Taking a step of leaves, pass by pass."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TYPE_CHECKING

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Scalar

from .._backends.dispatch import LeafStep
from .._common import memory, meshes
from .._common.batches import batches_by_size
from .._common.dtypes import compute_dtype
from .._rules.checks import check_like, check_transformed
from .._rules.rule import rule_structure
from .._rules.whole_leaf import (
    AbstractMatrixRule,
    AbstractMeansRule,
    AbstractWholeLeafRule,
)
from .._sharding import state_specs
from .._sharding.learned import learn
from .._sharding.matrices import map_matrices
from .._storage.layout import flattened
from .._storage.split import decode_weight
from .._tile.clipping import Clipping, scaled
from .._tile.step import LeafScalars, StepScalars, StepStructure, TileState
from . import derivatives
from .passes import axes_of, parameters_of, Pass
from .slices import elements_on_device, slices_of
from .stored_leaf import Learned
from .streaming import Piece, PORTION, Portion, stream


if TYPE_CHECKING:
    from .step_in_progress import StepInProgress

# How many elements of matrices a device has in one stack, if that is more than one
# leaf: 12 of GPT-2's largest matrices are 28 million, for which products are as fast as
# they get, in 57 MB of bfloat16.
_STACK = 2**25


class Part(NamedTuple):
    """A leaf, or one layer of a stacked leaf, and its gradient. `number` is that of the
    leaf. `parameters` are those of codecs that learn. `layer` is the number of a layer
    whose state is in host memory, in arrays of all layers, if kernels take it there."""

    number: int
    old: TileState
    grad: Array
    sharding: NamedSharding | None
    parameters: Learned
    layer: Scalar | None = None


class Advanced(NamedTuple):
    new: TileState
    parameters: Learned


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
        """One step of these leaves. Those that are streamed through the device come
        last, as their copies can begin before."""
        away = [i for i, x in enumerate(of) if self._is_streamed(x)]
        if not away:
            return self._here(of)
        here = [i for i in range(len(of)) if i not in set(away)]
        done = dict(zip(here, self._here([of[i] for i in here]), strict=True))
        # Arrays that arrive need not be in the large memory of a device.
        advance = dataclasses.replace(self, in_loop=True)
        portions = self._portions(of, away)
        done |= stream(of, portions, advance._here, self.as_update)
        return [done[i] for i in range(len(of))]

    def _is_streamed(self, x: Part) -> bool:
        """Whether a leaf is in host memory, and kernels do not take it there."""
        if not memory.any_on_host(x.old):
            return False
        return not self.step.is_taken_there(x.number, x.grad.shape, x.sharding)

    def _here(self, of: Sequence[Part]) -> list[Advanced]:
        """One step of leaves whose state is on the device."""
        passes = self.step.passes
        one = [i for i, x in enumerate(of) if passes[x.number].between is None]
        done = dict(zip(one, self._last([of[i] for i in one]), strict=True))
        previous: list[int] = []
        for batch in self._batches(of, [i for i in range(len(of)) if i not in done]):
            here = [of[i] for i in batch]
            # One batch after the other, so that only one has directions in memory.
            grads, before = lax.optimization_barrier(
                ([x.grad for x in here], [done[i].new.weight for i in previous])
            )
            for i, weight in zip(previous, before, strict=True):
                new = dataclasses.replace(done[i].new, weight=weight)
                done[i] = done[i]._replace(new=new)
            here = [x._replace(grad=g) for x, g in zip(here, grads, strict=True)]
            done.update(zip(batch, self._twice(here), strict=True))
            previous = batch
        return [done[i] for i in range(len(of))]

    def learned(self, of: Sequence[Part]) -> list[Learned]:
        """What codecs that learn have learned of these leaves before a step. Gradients
        are not looked at."""
        found: list[Learned] = [{} for _ in of]
        for select in (lambda x: x.first, lambda x: x.last):
            at = [i for i, x in enumerate(of) if select(self.step.passes[x.number])]
            here = [of[i] for i in at]
            steps = [
                self._leaf_step(x, select(self.step.passes[x.number])) for x in here
            ]
            steps = learn(steps, [x.sharding for x in here])
            for i, leaf_step in zip(at, steps, strict=True):
                found[i] |= leaf_step.scalars.leaf.parameters
        return found

    def _batches(self, of: Sequence[Part], numbers: list[int]) -> list[list[int]]:
        """Which of these leaves take their two passes together: those of one stack of
        matrices, or as many as are not larger than the largest one."""
        stacks: dict[Any, list[int]] = {}
        others: dict[int, int] = {}
        for i in numbers:
            number, old, grad, sharding, *_ = of[i]
            rule = self.step.passes[number].between
            if not isinstance(rule, AbstractMatrixRule):
                others[i] = grad.size
                continue
            dtype = compute_dtype(old.weight.dtype)
            kind = rule_structure(rule), grad.shape, dtype, sharding  # pyright: ignore
            group = self.step.rules[number].group
            stacks.setdefault((group, *kind), []).append(i)
        found = batches_by_size(others)
        for stack in stacks.values():
            grad, sharding = of[stack[0]].grad, of[stack[0]].sharding
            devices = 1 if sharding is None else sharding.mesh.size
            most = max(1, _STACK // grad.size) * devices
            found += [stack[i : i + most] for i in range(0, len(stack), most)]
        return found

    def _portions(self, of: Sequence[Part], numbers: list[int]) -> list[Portion]:
        """Which of these leaves, or slices of them, are on the device together. Rules
        that need whole leaves get them, in the batches of leaves on the device, so that
        their products are the same; and so do codecs that learn."""
        found: list[Portion] = []
        room, whole = 0, []
        for i in numbers:
            number, old, grad, sharding, parameters, _ = of[i]
            if self.step.passes[number].between is not None:
                whole.append(i)
                continue
            shape, slices = grad.shape, None
            size = elements_on_device(shape, sharding)
            if not parameters:
                is_grouped = any([x is not None for x in old.scales.values()])
                layout = self.step.stored[number].layout(shape) if is_grouped else None
                slices = slices_of(shape, layout, sharding, PORTION)
            if slices is not None:
                found += [[Piece(i, x)] for x in slices]
                room = 0
                continue
            if size > room:
                found.append([])
                room = PORTION
            found[-1].append(Piece(i, None))
            room -= size
        batches = self._batches(of, whole)
        return found + [[Piece(i, None) for i in batch] for batch in batches]

    def _twice(self, of: Sequence[Part]) -> list[Advanced]:
        """Leaves whose rules need whole leaves."""
        passes = [self.step.passes[x.number] for x in of]
        between = [x.between for x in passes]
        dtypes = [
            _direction_dtype(rule, x.old.weight)
            for rule, x in zip(between, of, strict=True)
        ]
        # What gives the direction its shape and its dtype.
        stand_ins = [
            x._replace(old=_with_weight(x.old, x.grad.astype(dtype), None))
            for x, dtype in zip(of, dtypes, strict=True)
        ]
        with_first = [i for i, x in enumerate(passes) if x.first is not None]
        firsts = self._pass([stand_ins[i] for i in with_first], lambda x: x.first)
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
        new = self._between(of, directions, masters)
        second = [x._replace(grad=grad) for x, (grad, _) in zip(of, new, strict=True)]
        done = self._last(second, clip=False)
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

    def _between(
        self, of: Sequence[Part], directions: list[Array], masters: list[Array]
    ) -> list[tuple[Array, dict[str, Array]]]:
        """What the rules make of the directions of a batch, and the new means."""
        rule: Any = self.step.passes[of[0].number].between
        sharding = of[0].sharding
        if isinstance(rule, AbstractMatrixRule):
            axes = axes_of(self.step.call, rule, self.step.leaves[of[0].number])
            function = _Transform(rule_structure(rule))  # pyright: ignore
            return [(x, {}) for x in map_matrices(function, axes, sharding, directions)]
        return [
            self._transformed(*each)
            for each in zip(of, directions, masters, strict=True)
        ]

    def _transformed(
        self, x: Part, direction: Array, master: Array
    ) -> tuple[Array, dict[str, Array]]:
        """What a rule makes of the direction of a leaf, and the new means."""
        call, passes = self.step.call, self.step.passes[x.number]
        cast = lambda n: n.astype(master.dtype) if eqx.is_array(n) else n
        rule: Any = jtu.tree_map(cast, passes.between)
        if isinstance(rule, AbstractWholeLeafRule):
            transformed = rule.transform(direction, master)
            method = f"{type(rule).__name__}.transform"
            what = "the gradient of the second pass"
            check_like(call, method, what, transformed, direction)
            return meshes.as_typed(transformed, x.sharding), {}
        assert isinstance(rule, AbstractMeansRule)
        old = {name: x.old.codes[name] for name in passes.means}
        number = self.step.settings.number(self.step.count).astype(master.dtype)
        result = rule.transform(direction, master, old, number)
        check_transformed(call, rule, result, direction, old)
        transformed, new = result
        if self.all_finite is not None:
            new = {k: jnp.where(self.all_finite, v, old[k]) for k, v in new.items()}
        if x.sharding is not None:
            new = {
                k: meshes.constrain(v, state_specs.of_array(v.shape, x.sharding))
                for k, v in new.items()
            }
        return meshes.as_typed(transformed, x.sharding), new

    def _last(self, of: Sequence[Part], clip: bool = True) -> list[Advanced]:
        return self._pass(of, lambda x: x.last, clip)

    def _pass(
        self, of: Sequence[Part], select: Callable[[Any], Pass], clip: bool = True
    ) -> list[Advanced]:
        """One pass over these leaves."""
        if not of:
            return []
        step, shardings = self.step, [x.sharding for x in of]
        steps = [
            self._leaf_step(
                x, select(step.passes[x.number]), self.clip if clip else None
            )
            for x in of
        ]
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

    def _leaf_step(self, x: Part, one: Pass, clip: Clipping | None = None) -> LeafStep:
        step, old = self.step, x.old
        stored, names = step.stored[x.number], one.moments
        dtype, shape = compute_dtype(old.weight.dtype), old.weight.shape
        factors = None
        if clip is not None:
            factors = _factors(clip, dtype, x.grad)
        is_last = one is step.passes[x.number].last
        scales = {name: old.scales[name] for name in names}
        is_grouped = any(x is not None for x in scales.values())
        return LeafStep(
            StepStructure(
                one.rule,
                tuple([stored.codec(name) for name in names]),
                tuple([stored.base(name) for name in names]),
                one.is_decoupled,
                self.as_update and is_last,
                step.settings.storage.dither_weights and is_last,
                as_direction=one is step.passes[x.number].first,
                in_stack=is_last
                and isinstance(step.passes[x.number].between, AbstractMatrixRule),
                in_loop=self.in_loop,
            ),
            stored.layout(shape)
            if is_grouped
            else flattened(shape, max(1, x.grad.size)),
            StepScalars(
                rule=one.scalars,
                decay=one.decay,
                count=step.count,
                leaf=LeafScalars(
                    np.asarray(x.number, np.uint32),
                    parameters_of(one, x.parameters),
                    x.layer,
                ),
                take=self.all_finite,
                clip=factors,
            ),
            x.grad,
            TileState(
                old.weight,
                old.correction,
                {name: old.codes[name] for name in names},
                scales,
            ),
        )

    def _clipped(self, x: Part) -> Array:
        if self.clip is None:
            return x.grad
        dtype = compute_dtype(x.old.weight.dtype)
        return scaled(x.grad, _factors(self.clip, dtype, x.grad))


class _Transform(NamedTuple):
    """The function of a rule without its numbers, with a hash."""

    rule: AbstractMatrixRule

    def __call__(self, matrices: Float[Array, "stack rows columns"]) -> Array:
        return self.rule.transform(matrices)


def _factors(clip: Clipping, dtype: Any, grad: Array) -> Any:
    # A float64 gradient may only fit a float32 weight once it is scaled.
    dtypes = jnp.dtype(dtype), jnp.dtype(compute_dtype(grad.dtype))
    return clip.factors_for(max(dtypes, key=lambda x: x.itemsize))


def _direction_dtype(rule: Any, weight: Array) -> Any:
    dtype = compute_dtype(weight.dtype)
    is_matrix = isinstance(rule, AbstractMatrixRule)
    return jnp.bfloat16 if is_matrix and dtype == jnp.float32 else dtype


def _with_weight(old: TileState, weight: Array, correction: Any) -> TileState:
    return TileState(weight, correction, old.codes, old.scales)
