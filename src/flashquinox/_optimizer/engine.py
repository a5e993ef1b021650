"""The engine behind every optimizer: state, schedules, masks, and the two ways to
take a step."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, PyTree, Scalar, ScalarLike

from .._backends import dispatch
from .._backends.dispatch import Backend, LeafStep
from .._common import meshes
from .._common.dtypes import compute_dtype, NARROW_DTYPES
from .._model.trained import has_gradient, is_trainable, with_state
from .._model.trees import flatten, Leaf, match, Model, Rebuild
from .._rules.rule import AbstractRule, rule_scalars, rule_structure
from .._sharding import (
    parts as sharded,
    record,
    reductions,
    state_specs,
)
from .._sharding.resolve import resolve_all, Resolved
from .._storage.codec import AbstractMomentCodec
from .._storage.full_precision import FullPrecision
from .._storage.layout import Layout
from .._storage.quant_moment import QuantMoment, StoredMoment, zeros
from .._storage.split import Correction
from .._storage.storage import Storage
from .._tile.clipping import Clipping
from .._tile.tile import LeafScalars, StepScalars, StepStructure, TileState
from . import derivatives as differentiable
from .argument_checks import check_max_norm
from .call_checks import (
    check_grads,
    check_has_values,
    check_model,
    check_order,
    warn_of_nothing_to_train,
)
from .checksums import checksums, verified, Verify
from .device_checks import (
    check_state_is_with_weight,
    warn_of_divided_groups,
    warn_of_unknown_division,
)
from .leaf_checks import (
    check_correction_has_effect,
    check_grad,
)
from .mask import decayed
from .schedules import ScalarOrSchedule, scheduled
from .state import OptimizerState, StepCount
from .state_checks import (
    check_checksum,
    check_correction,
    check_moments,
    check_not_ensemble,
    check_state,
    check_width,
)
from .weight_decay import WeightDecay


class Transformation(eqx.Module):
    call: str = eqx.field(static=True)
    rule: AbstractRule
    learning_rate: ScalarOrSchedule
    decay: WeightDecay
    storage: Storage = eqx.field(static=True)
    skip_nonfinite: bool = eqx.field(static=True)
    verify_weights: Verify = eqx.field(static=True)
    backend: Backend = eqx.field(static=True)
    # As leaves and their structure, which have a hash.
    shardings: tuple[tuple[NamedSharding, ...], Any] = eqx.field(static=True)

    def init(self, params: PyTree) -> OptimizerState:
        call = f"{self.call}(...).init"
        check_model(call, params)
        leaves, rebuild = flatten(params)
        trained = {
            index: leaf for index, leaf in enumerate(leaves) if is_trainable(leaf.value)
        }
        warn_of_nothing_to_train(call, leaves, trained)
        if trained:
            # What a step would find wrong.
            decayed(call, self.decay.mask, params, leaves)
            self._rates(jnp.zeros((), jnp.int32))
        check_correction_has_effect(call, self.storage, list(trained.values()))
        are_trained = [index in trained for index in range(len(leaves))]
        shardings, _ = self._shardings(call, leaves, are_trained, recorded=())
        makers = [
            partial(self._zeros, leaf, shardings[index])
            for index, leaf in trained.items()
        ]
        *made, count = sharded.make(
            [*makers, lambda: jnp.zeros((), jnp.int32)],
            [*(shardings[index] for index in trained), meshes.everywhere(shardings)],
            is_traced=record.are_traced(leaves),
        )
        moments = {name: [None for _ in leaves] for name in self.rule.moments}
        corrections: list[Any] = [None for _ in leaves]
        for index, (stored, correction) in zip(trained, made, strict=True):
            warn_of_divided_groups(call, leaves[index], stored, shardings[index])
            corrections[index] = correction
            for name, moment in stored.items():
                moments[name][index] = moment
        return OptimizerState(
            steps=StepCount(count),
            moments={name: rebuild.state(x) for name, x in moments.items()},
            corrections=rebuild.state(corrections),
            shardings=record.record(leaves, shardings, ()),
            checksums=self._checksums(leaves, corrections, rebuild),
        )

    def _checksums(
        self,
        leaves: list[Leaf],
        corrections: list[Any],
        rebuild: Rebuild,
    ) -> PyTree:
        if self.verify_weights is None:
            return None
        new: list[Any] = [None for _ in leaves]
        kept = [i for i, correction in enumerate(corrections) if correction is not None]
        found = checksums([jnp.asarray(leaves[i].value) for i in kept])
        for index, x in zip(kept, found, strict=True):
            new[index] = x
        return rebuild.state(new)

    def _zeros(
        self, leaf: Leaf, sharding: NamedSharding | None
    ) -> tuple[dict[str, StoredMoment], Correction | None]:
        """The moments and the correction of a leaf that has not been trained yet."""
        shape, dtype = leaf.value.shape, jnp.dtype(leaf.value.dtype)
        layout, codecs = self._new_layout(shape, sharding), self.storage.codecs
        moments = {
            name: zeros(codecs.of(moment, shape), layout, compute_dtype(dtype))
            for name, moment in self.rule.moments.items()
        }
        if self.storage.correction_dtype is None or dtype not in NARROW_DTYPES:
            return moments, None
        return moments, jnp.zeros(shape, self.storage.correction_dtype)

    def step(
        self,
        model: Model,
        state: OptimizerState,
        grads: PyTree,
        max_norm: ScalarLike | None,
    ) -> tuple[Model, OptimizerState]:
        check_max_norm(f"{self.call}(...).step", max_norm)
        return self._advance("step", model, state, grads, max_norm, as_update=False)

    def update(
        self,
        updates: PyTree,
        state: OptimizerState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, OptimizerState]:
        if extra_args.get("max_norm") is not None:
            # Others are those of other transformations.
            raise TypeError(
                f"`{self.call}(...).update` does not clip: `max_norm` is an argument "
                "of `step`. Put `optax.clip_by_global_norm` before the optimizer, in "
                "`optax.chain`."
            )
        if params is None:
            raise ValueError(
                f"`{self.call}(...).update(grads, state, params)` got no `params`. The "
                "weights are part of the computation: pass them as third argument."
            )
        return self._advance("update", params, state, updates, None, as_update=True)

    def _advance(
        self,
        method: str,
        params: PyTree,
        state: OptimizerState,
        grads: PyTree,
        max_norm: ScalarLike | None,
        as_update: bool,
    ) -> tuple[PyTree, OptimizerState]:
        call = f"{self.call}(...).{method}"
        opened = self.open(call, params, state)
        check_grads(call, grads, params)
        check_has_values(call, grads=grads)
        grad_leaves = match(call, "grads", grads, opened.leaves)
        check_order(call, opened.leaves, grad_leaves)
        arrived = {}
        for index, leaf in enumerate(opened.leaves):
            grad, trained = grad_leaves[index], opened.trained[index]
            if has_gradient(call, leaf, grad, trained):
                check_grad(call, leaf, grad)
                opened.check(index)
                if leaf.value.size > 0:
                    arrived[index] = jnp.asarray(grad)
            elif as_update:
                # As of Optax: no update, and not one of zero.
                opened.values[index] = None
        opened = opened.verified()
        there = [opened.shardings[index] for index in arrived]
        clip = opened.clip([*arrived.values()], there, max_norm)
        take = opened.update(arrived, clip, as_update=as_update)
        return opened.close(take, as_update)

    def open(self, call: str, params: PyTree, state: OptimizerState) -> "OpenedStep":
        """Takes a model and its state apart, for one step."""
        check_model(call, params)
        leaves, rebuild = flatten(params)
        check_state(call, state, self.rule)
        check_not_ensemble(call, state)
        check_has_values(call, model=params, state=state)
        stored = {
            name: match(call, f"state.moments[{name!r}]", state.moments[name], leaves)
            for name in self.rule.moments
        }
        corrections = match(call, "state.corrections", state.corrections, leaves)
        trained = with_state(leaves, stored, corrections)
        shardings, unknown = self._shardings(call, leaves, trained, state.shardings)
        moments = {
            name: [
                state_specs.where_the_weight_is(moment, sharding)
                for sharding, moment in zip(shardings, stored[name], strict=True)
            ]
            for name in self.rule.moments
        }
        count = jnp.asarray(state.count)
        rates = self._rates(count)
        return OpenedStep(
            call=call,
            transformation=self,
            leaves=leaves,
            rebuild=rebuild,
            trained=trained,
            decayed=decayed(call, self.decay.mask, params, leaves),
            shardings=shardings,
            # XLA cannot divide a kernel.
            backend="xla" if unknown else self.backend,
            state=state,
            rates=rates,
            scalars={
                dtype: self._scalars(rates, count, dtype)
                for dtype in dict.fromkeys(
                    compute_dtype(leaf.value.dtype)
                    for leaf, is_trained in zip(leaves, trained, strict=True)
                    if is_trained
                )
            },
            values=[leaf.value for leaf in leaves],
            moments=moments,
            corrections=[
                state_specs.where_the_weight_is(correction, sharding)
                for correction, sharding in zip(corrections, shardings, strict=True)
            ],
            checksums=match(call, "state.checksums", state.checksums, leaves),
        )

    def _new_layout(
        self, shape: tuple[int, ...], sharding: NamedSharding | None
    ) -> Layout:
        parts = None if sharding is None else meshes.divisions(sharding)
        rows = dispatch.prefers_rows(self.backend)
        return self.storage.codecs.layout(
            shape, self.storage.group_size, prefer_rows=rows, parts=parts
        )

    def _shardings(
        self,
        call: str,
        leaves: list[Leaf],
        trained: list[bool],
        recorded: record.Shardings,
    ) -> Resolved:
        """For each leaf, how it is divided among devices; `None` for those that are not
        trained."""
        values, structure = self.shardings
        tree = jtu.tree_unflatten(structure, values)
        given = match(call, "shardings", tree, leaves, prefix=True)
        found = resolve_all(
            call,
            [
                leaf if is_trained else None
                for leaf, is_trained in zip(leaves, trained, strict=True)
            ],
            given,
            recorded,
        )
        warn_of_unknown_division(call, found.unknown)
        return found

    def _rates(self, count: Scalar) -> tuple[ScalarLike, ScalarLike]:
        """The learning rate and the weight decay after so many steps."""
        return (
            scheduled(self.call, "learning_rate", self.learning_rate, count),
            scheduled(self.call, "weight_decay", self.decay.rate, count),
        )

    def _scalars(
        self, rates: tuple[ScalarLike, ScalarLike], count: Scalar, dtype: DTypeLike
    ) -> tuple[dict[str, Scalar], Scalar | None]:
        """The rule's scalars and the scalar of weight decay, in the precision
        `dtype`."""
        learning_rate = jnp.asarray(rates[0], dtype)
        # The last count is taken again and again, as by Optax. It is computed apart
        # from the count of the next state. A GPU computes what both share in a kernel
        # of its own, after a copy: 3% of a step of 4096 x 4096 weights (H100).
        number = jnp.minimum(count, jnp.iinfo(count.dtype).max - 1) + 1
        rule = rule_scalars(self.rule, number, learning_rate, dtype)
        return rule, self.decay.scalar(rates[1], learning_rate, dtype)


# Of moments whose codecs learn, by their names: the parameter before a step and after.
Learned: TypeAlias = dict[str, tuple[Scalar, Scalar]]


class LeafState(NamedTuple):
    """A leaf that is trained, or a part of one that holds whole groups."""

    value: Array
    moments: dict[str, StoredMoment]
    correction: Correction | None


@dataclasses.dataclass(frozen=True)
class OpenedStep:
    """A step under way: the model and its state as lists, with an entry for each leaf
    of the model. `values`, `moments` and `corrections` are what will be returned."""

    call: str
    transformation: Transformation
    leaves: list[Leaf]
    rebuild: Rebuild
    # Whether there is a state for the leaf.
    trained: list[bool]
    decayed: list[bool]
    shardings: list[NamedSharding | None]
    backend: Backend
    state: OptimizerState
    # The learning rate and the weight decay of this step.
    rates: tuple[ScalarLike, ScalarLike]
    # For each dtype that computes.
    scalars: dict[Any, tuple[dict[str, Scalar], Scalar | None]]
    values: list[Any]
    moments: dict[str, list[Any]]
    corrections: list[Any]
    # Those of the weights that came.
    checksums: list[Any]
    # The numbers of the leaves that are updated.
    written: set[int] = dataclasses.field(default_factory=set)

    def check(self, index: int) -> None:
        """Whether a leaf that is trained and its state go together."""
        call, leaf, sharding = self.call, self.leaves[index], self.shardings[index]
        optim, (_, stored, correction) = self.transformation, self.read(index)
        check_moments(call, leaf, stored, optim.rule, optim.storage)
        check_correction(call, leaf, correction)
        check_width(call, leaf, correction, optim.storage)
        check_checksum(
            call, leaf, correction, self.checksums[index], optim.verify_weights
        )
        check_state_is_with_weight(call, leaf, stored, correction, sharding)
        warn_of_divided_groups(call, leaf, stored, sharding)

    def read(self, index: int) -> LeafState:
        moments: Any = {name: stored[index] for name, stored in self.moments.items()}
        return LeafState(self.values[index], moments, self.corrections[index])

    def verified(self) -> "OpenedStep":
        """The same step, which does not begin before its weights are verified: after
        `check` of all leaves that are trained."""
        verify = self.transformation.verify_weights
        kept = [i for i, x in enumerate(self.checksums) if x is not None]
        if verify is None or not kept:
            return self
        on = meshes.everywhere(self.shardings)
        count = verified(
            self.call,
            verify,
            self.state.count,
            [self.leaves[i].name for i in kept],
            [jnp.asarray(self.leaves[i].value) for i in kept],
            [self.checksums[i] for i in kept],
            None if on is None else on.mesh,
        )
        return dataclasses.replace(
            self,
            state=dataclasses.replace(self.state, steps=StepCount(count)),
            scalars={
                dtype: self.transformation._scalars(self.rates, count, dtype)
                for dtype in self.scalars
            },
        )

    def write(self, index: int, new: LeafState) -> None:
        self.written.add(index)
        self.values[index], self.corrections[index] = new.value, new.correction
        for name, moment in new.moments.items():
            self.moments[name][index] = moment

    def update(
        self,
        grads: dict[int, Array],
        clip: Clipping | None,
        as_update: bool = False,
    ) -> Bool[Array, ""] | None:
        """Updates the leaves of these numbers.

        **Returns:**

        Whether all gradients were finite, or else nothing has changed. `None` if that
        was not asked.
        """
        old = [self.read(index) for index in grads]
        divided = [self.shardings[index] for index in grads]
        arrived = _as_typed([*grads.values()], divided)
        take = self.take(arrived, divided, clip)
        steps = [
            self._leaf_step(index, leaf, grad, take, clip, as_update=as_update)
            for index, leaf, grad in zip(grads, old, arrived, strict=True)
        ]
        steps = sharded.learn(steps, divided)
        updated = self._updated([*grads], old, steps, divided)
        for index, leaf in zip(grads, updated, strict=True):
            self.write(index, leaf)
        return take

    def learn(self, numbers: list[int], take: Bool[Array, ""] | None) -> list[Learned]:
        """For each of these leaves, the parameters of its codecs that learn, before
        this step and after: what `update_parts` asks of parts of them."""
        divided = [self.shardings[number] for number in numbers]
        old = [self.read(number) for number in numbers]
        # No gradient is looked at; the weight stands for it.
        steps = [
            self._leaf_step(number, leaf, jnp.asarray(leaf.value), take, None)
            for number, leaf in zip(numbers, old, strict=True)
        ]
        steps = sharded.learn(steps, divided)
        return [step.scalars.leaf.parameters for step in steps]

    def update_parts(
        self,
        numbers: list[int],
        old: list[LeafState],
        shardings: list[NamedSharding | None],
        grads: list[Array],
        learned: list[Learned],
        take: Bool[Array, ""] | None,
        clip: Clipping | None,
    ) -> list[LeafState]:
        """One step of parts of leaves, that need not be those of this object: only what
        does not depend on their values is. `numbers` are those of their leaves."""
        arrived = _as_typed(grads, shardings)
        steps = [
            self._leaf_step(number, part, grad, take, clip, parameters)
            for number, part, grad, parameters in zip(
                numbers, old, arrived, learned, strict=True
            )
        ]
        return self._updated(numbers, old, steps, shardings)

    def clip(
        self,
        grads: list[Array],
        shardings: list[NamedSharding | None],
        max_norm: ScalarLike | None,
    ) -> Clipping | None:
        """What takes these gradients together to at most this norm."""
        if max_norm is None or not grads:
            return None
        return reductions.clip(_as_typed(grads, shardings), shardings, max_norm)

    def take(
        self,
        grads: list[Array],
        shardings: list[NamedSharding | None],
        clip: Clipping | None,
    ) -> Bool[Array, ""] | None:
        """Whether all of these gradients are finite, which their norm tells if it is
        known, and the learning rate and the weight decay. `None` if that was not
        asked."""
        if not self.transformation.skip_nonfinite:
            return None
        if clip is not None:
            finite = clip.is_finite
        else:
            finite = reductions.all_finite(_as_typed(grads, shardings), shardings)
        for rate in self.rates:
            if isinstance(rate, jax.Array):
                finite = finite & jnp.isfinite(rate)
        return finite

    def _leaf_step(
        self,
        number: int,
        old: LeafState,
        grad: Array,
        take: Bool[Array, ""] | None,
        clip: Clipping | None,
        parameters: Learned | None = None,
        as_update: bool = False,
    ) -> LeafStep:
        optim = self.transformation
        dtype = compute_dtype(old.value.dtype)
        rule_values, decay = self.scalars[dtype]
        factors = None
        if clip is not None:
            # A float64 gradient may only fit a float32 weight once it is scaled.
            dtypes = jnp.dtype(dtype), jnp.dtype(compute_dtype(grad.dtype))
            factors = clip.factors_for(max(dtypes, key=lambda x: x.itemsize))
        if parameters is None:
            # Nothing is learned in this step yet.
            parameters = {
                name: (moment.parameter, moment.parameter)
                for name, moment in old.moments.items()
                if isinstance(moment, QuantMoment) and moment.parameter is not None
            }
        return LeafStep(
            StepStructure(
                rule_structure(optim.rule),
                tuple(_codec(old.moments[name]) for name in optim.rule.moments),
                optim.decay.is_decoupled,
                as_update,
                optim.storage.dither_weights,
            ),
            _layout(old),
            StepScalars(
                rule=rule_values,
                decay=decay if self.decayed[number] else None,
                count=jnp.asarray(self.state.count),
                leaf=LeafScalars(jnp.asarray(number, jnp.uint32), parameters),
                take=take,
                clip=factors,
            ),
            grad,
            _tile_state(old),
        )

    def _updated(
        self,
        numbers: Sequence[int],
        old: list[LeafState],
        steps: list[LeafStep],
        shardings: list[NamedSharding | None],
    ) -> list[LeafState]:
        names = [self.leaves[number].name for number in numbers]
        updated = differentiable.update_leaves(
            self.call, self.backend, names, steps, shardings
        )
        return [
            LeafState(
                new.weight,
                {
                    name: _store(
                        like,
                        new.codes[name],
                        new.scales[name],
                        step.scalars.leaf.parameters.get(name, (None, None))[1],
                    )
                    for name, like in leaf.moments.items()
                },
                new.correction,
            )
            for leaf, step, new in zip(old, steps, updated, strict=True)
        ]

    def close(
        self, take: Bool[Array, ""] | None, as_update: bool = False
    ) -> tuple[PyTree, OptimizerState]:
        """The new model, or the updates, and the new state. A step that was not taken
        does not count."""
        old = self.state
        count = jnp.asarray(optax.safe_increment(old.count))
        if take is not None:
            count = jnp.where(take, count, old.count)
        return self.rebuild(self.values), OptimizerState(
            steps=StepCount(count),
            moments={name: self.rebuild.state(x) for name, x in self.moments.items()},
            corrections=self.rebuild.state(self.corrections),
            shardings=record.record(self.leaves, self.shardings, old.shardings),
            checksums=self._new_checksums(as_update),
        )

    def _new_checksums(self, as_update: bool) -> PyTree:
        if self.transformation.verify_weights is None:
            return None
        new = list(self.checksums)
        changed = [i for i in sorted(self.written) if new[i] is not None]
        held = [self.values[i] for i in changed]
        if as_update:
            # As the caller will round them.
            held = [
                jnp.asarray(self.leaves[i].value) + update
                for i, update in zip(changed, held, strict=True)
            ]
        for index, x in zip(changed, checksums(held), strict=True):
            new[index] = x
        return self.rebuild.state(new)


def _as_typed(grads: list[Array], shardings: list[NamedSharding | None]) -> list[Array]:
    return [
        meshes.as_typed(grad, sharding)
        for grad, sharding in zip(grads, shardings, strict=True)
    ]


def _layout(leaf: LeafState) -> Layout:
    """The groups of a leaf. The state decides, not the defaults of this optimizer."""
    for moment in leaf.moments.values():
        if isinstance(moment, QuantMoment):
            return moment.layout
    return Layout(leaf.value.shape, None, max(1, leaf.value.size))


def _codec(moment: StoredMoment) -> AbstractMomentCodec:
    return moment.codec if isinstance(moment, QuantMoment) else FullPrecision()


def _tile_state(leaf: LeafState) -> TileState:
    codes, scales = {}, {}
    for name, moment in leaf.moments.items():
        quantized = isinstance(moment, QuantMoment)
        codes[name] = moment.codes if quantized else moment
        scales[name] = moment.scales if quantized else None
    return TileState(jnp.asarray(leaf.value), leaf.correction, codes, scales)


def _store(
    like: StoredMoment, codes: Array, scales: Array | None, parameter: Scalar | None
) -> StoredMoment:
    if not isinstance(like, QuantMoment):
        return codes
    assert scales is not None
    if like.parameter is None:
        # Or it is that of a part, and kept elsewhere.
        parameter = None
    return QuantMoment(codes, scales, like.axis, like.group_size, like.codec, parameter)
