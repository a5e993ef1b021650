"""The rows of `benchmarks/horizon.py`: what each measures, and what is to be reached.

Each row is a function that yields figures. Rows that need no model share their runs:
the elements of all of them are in the arrays of one program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from _elements import (
    Contender,
    Elements,
    full_weights,
    momentum,
    Run,
    run,
    stack,
    take_step,
)
from jaxtyping import PyTree, Scalar

import flashquinox as fq


@dataclasses.dataclass
class Figure:
    """One line of the table: a number for each contender."""

    row: str
    case: str
    measure: str
    # The smallest and the largest number that are good enough, if any are named.
    reach: tuple[float, float] | None
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    # Of elements or seeds, where the value is a median or a mean.
    ranges: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def is_met(self, contender: str) -> bool | None:
        if self.reach is None or contender not in self.values:
            return None
        low, high = self.reach
        return low <= self.values[contender] <= high

    def add(self, contender: Contender, values: np.ndarray) -> "Figure":
        """The mean of these, and their range."""
        return self.put(contender, np.mean(values), values)

    def put(
        self, contender: Contender, value: Any, values: np.ndarray | None = None
    ) -> "Figure":
        self.values[contender.name] = float(value)
        if values is not None:
            self.ranges[contender.name] = (float(np.min(values)), float(np.max(values)))
        return self


def _at_most(most: float | None) -> tuple[float, float] | None:
    return None if most is None else (0.0, most)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Optax comes first among the contenders: the others are compared with it."""

    contenders: tuple[Contender, ...]
    seeds: int
    tiny: bool
    rows: frozenset[str]

    def steps(self, number: int) -> int:
        """So many steps, or a tenth of them."""
        return number // 10 if self.tiny else number

    @property
    def reference(self) -> Contender:
        return self.contenders[0]


#
# Elements of one matrix
#

# An element that stops does so after so many steps ...
_STOPS = 100
# ... and its drift is measured over so many.
_DRIFT = 5000
# Elements that return have no gradient for so many steps.
_ABSENT = 1000
_AFTER_RETURN = 100
# Of elements that are small, and of those that shrink to a thousandth.
_SMALL = 2000
_SHRINK = 1e-3
_RATIOS = (100, 300, 1000, 3000, 100_000)
_LOG_UNIFORM = "1 to 1e-5, log-uniform"
_NOISY = "1 to 1e-5, log-uniform, noisy"


def _stopping(setup: Setup, group_size: int) -> dict[str, Elements]:
    """The first element of each group gets no gradient after a while. Groups are along
    the axis that they divide."""
    groups = 8 if setup.tiny else 64 * setup.seeds
    along = np.where(np.arange(group_size) == 0, setup.steps(_STOPS), 2**30)
    across = np.broadcast_to(along[:, None], (group_size, groups + 2))
    return {
        "last": Elements.of((groups, group_size), noise=1.0, stops=along),
        "first": Elements.of(across.shape, noise=1.0, stops=across),
    }


def _small(setup: Setup) -> dict[str, Elements]:
    """Groups of one large element and 31 small ones, and of elements of all sizes."""
    rng = np.random.default_rng(0)
    groups = 2 * setup.seeds
    # Groups differ in size, which must not matter, and elements by up to a tenth.
    size = 2.0 ** rng.uniform(0, 8, (groups, 1))
    sections = {}
    for ratio in _RATIOS:
        mean = rng.uniform(0.9, 1.1, (groups, 32)) / ratio
        mean[:, 0] = 1.0
        sections[f"1/{ratio}"] = Elements.of(mean.shape, mean=size * mean)
    groups = 8 * setup.seeds
    mean = 10.0 ** rng.uniform(-5, 0, (groups, 32))
    mean[:, 0] = 1.0
    sections[_LOG_UNIFORM] = Elements.of(mean.shape, mean=mean)
    sections[_NOISY] = Elements.of(mean.shape, mean=mean, noise=mean)
    return sections


def _returning(setup: Setup) -> dict[str, Elements]:
    """The first element of each group stops and returns, or shrinks; its gradients have
    a mean, so that there is a way to cover. Others have noise."""
    shape = (16 * setup.seeds, 32)
    first = np.arange(32) == 0
    stops = setup.steps(_STOPS)
    returning = partial(Elements.of, shape, mean=1.0 * first, noise=1.0)
    return {
        "returns": returning(
            stops=np.where(first, stops, 2**30),
            returns=np.where(first, stops + setup.steps(_ABSENT), 2**30),
        ),
        "shrinks": returning(
            decay=np.where(first, _SHRINK ** (1 / setup.steps(_SMALL)), 1.0)
        ),
    }


@functools.cache
def _matrices(
    setup: Setup, rule: str, b2: float, group_size: int
) -> tuple[dict[str, slice], dict[Contender, Run]]:
    """The runs of all elements that the chosen rows ask for, by each contender; and the
    rows of the sections in the array "last"."""
    of_32 = group_size == 32
    sections, steps = {}, set()
    arrays = {}
    if "stops" in setup.rows:
        arrays = _stopping(setup, group_size)
        sections["stops"] = arrays["last"]
        steps |= {_STOPS, _STOPS + _DRIFT}
    if of_32 and rule != "lion" and "small" in setup.rows:
        sections |= _small(setup)
        steps |= {_SMALL}
    if of_32 and rule != "lion" and "returns" in setup.rows:
        sections |= _returning(setup)
        absent = _STOPS + _ABSENT
        steps |= {_STOPS, absent, absent + _AFTER_RETURN, _SMALL}
    arrays["last"], rows = stack(sections)
    runs = {}
    for contender in setup.contenders:
        if not of_32 and not contender.compresses_moments:
            continue
        runs[contender] = run(
            contender.with_groups_of(group_size),
            rule,
            arrays,
            [setup.steps(step) for step in steps],
            b2=b2,
            chunk=setup.steps(100),
        )
    return rows, runs


def stops(setup: Setup) -> Iterator[Figure]:
    """The stall: an element whose gradient becomes zero, beside 31 that go on."""
    cases: list[tuple[str, float, int, float | None]] = [
        ("adamw", 0.95, 32, 3.0),
        ("adamw", 0.999, 32, 2.5),
        ("sgd", 0.0, 32, 18.0),
        ("lion", 0.99, 32, None),
        ("adamw", 0.95, 16, 3.0),
        ("adamw", 0.999, 16, 2.5),
        ("adamw", 0.95, 128, 3.0),
        ("adamw", 0.999, 128, 2.5),
    ]
    start, end = setup.steps(_STOPS), setup.steps(_STOPS + _DRIFT)
    for rule, b2, group_size, most in cases:
        rows, runs = _matrices(setup, rule, b2, group_size)
        stopped = {"last": (rows["stops"], 0), "first": (0, slice(None))}
        for array, here in stopped.items():
            title = _title(rule, b2)
            case = f"{title}, groups of {group_size} along the {array} axis"
            if rule == "lion":
                # In float32, the sign of a momentum that decays is never zero.
                yield _momentum_left(case, array, here, runs)
                continue
            figure = Figure("stops", case, "drift, lr: mean", _at_most(most))
            for contender, found in runs.items():
                drift = found.weights[end][array] - found.weights[start][array]
                figure.add(contender, np.abs(drift[here]))
            yield figure


def _momentum_left(
    case: str, array: str, here: Any, runs: dict[Contender, Run]
) -> Figure:
    figure = Figure("stops", case, "momentum left, of the largest", None)
    for contender, found in runs.items():
        left = np.abs(np.asarray(momentum(contender, found.state)[array]))
        figure.put(contender, np.mean(left[here]) / np.max(left))
    return figure


def small(setup: Setup) -> Iterator[Figure]:
    """The cliff: elements far below the largest of their group, with gradients that are
    constant, but for the noisy ones."""
    names = [f"1/{ratio}" for ratio in _RATIOS] + [_LOG_UNIFORM, _NOISY]
    end = setup.steps(_SMALL)
    for b2 in (0.95, 0.999):
        rows, runs = _matrices(setup, "adamw", b2, 32)
        for name in names:
            here = rows[name], slice(1, None)
            case = f"{_title('adamw', b2)}, {name}"
            noisy = name == _NOISY
            share = Figure("small", case, "share of the way: median", (0.97, 1.03))
            # The exact one's is larger than 1 where there is noise.
            largest = Figure(
                "small", case, "largest |u|", None if noisy else (0.0, 1.2)
            )
            exact = runs[setup.reference].weights[end]["last"][here]
            for contender, found in runs.items():
                shares = found.weights[end]["last"][here] / exact
                share.put(contender, np.median(shares), shares)
                update = found.largest_until(end, "last")[here]
                largest.put(contender, np.max(update))
            yield from (share, largest)
    yield from _small_of_sgd(setup, names[:-1])


# An unbiased momentum m' = m + e decays by 0.9 in a step, so that an error e of one
# step moves the weight by 9 e lr in all. Errors of the steps cancel but for a few, of a
# 1/256 of the largest momentum each, which is 10 times the largest gradient: what is
# left of the way is 9 * 10 / 256 = 0.35 for each of them.
_SGD_BIAS = 2.0


def _small_of_sgd(setup: Setup, names: list[str]) -> Iterator[Figure]:
    """The way of SGD is as long as gradients are large. So deviations, and updates, are
    in those of a gradient as large as the largest of the group."""
    rows, runs = _matrices(setup, "sgd", 0.0, 32)
    end = setup.steps(_SMALL)
    for name in names:
        case = f"{_title('sgd', 0.0)}, {name}"
        share = Figure("small", case, "share of the way: median", None)
        bias = Figure(
            "small", case, "|deviation|, lr x largest g: mean", (0.0, _SGD_BIAS)
        )
        # The momentum is 10 times the gradient: spikes would be above.
        largest = Figure("small", case, "largest |u|, of largest g", (0.0, 12.0))
        exact = runs[setup.reference].weights[end]["last"][rows[name]]
        # The way of the largest is 10 times its gradient in each step, at the end.
        unit = runs[setup.reference].largest_until(end, "last")[rows[name]] / 10
        unit = np.max(unit, axis=1, keepdims=True)
        for contender, found in runs.items():
            way = found.weights[end]["last"][rows[name]]
            shares = (way / exact)[:, 1:]
            share.put(contender, np.median(shares), shares)
            deviation = np.abs((way - exact) / unit)[:, 1:]
            bias.add(contender, deviation)
            update = found.largest_until(end, "last")[rows[name]] / unit
            largest.put(contender, np.max(update))
        yield from (share, bias, largest)


def returns(setup: Setup) -> Iterator[Figure]:
    """Elements that get gradients again after 1,000 steps without, and elements whose
    gradients shrink to a thousandth in 2,000 steps."""
    stopped = setup.steps(_STOPS)
    start = stopped + setup.steps(_ABSENT)
    end = start + setup.steps(_AFTER_RETURN)
    last = setup.steps(_SMALL)
    for rule, b2 in (("adamw", 0.95), ("adamw", 0.999), ("sgd", 0.0)):
        rows, runs = _matrices(setup, rule, b2, 32)
        title = _title(rule, b2)
        back = Figure(
            "returns", f"{title}, returns", "way of 100 steps, lr: mean", None
        )
        peak = Figure("returns", f"{title}, returns", "largest |u| in these", None)
        shrunk = Figure("returns", f"{title}, shrinks", "way, lr: mean", None)
        shrunk_peak = Figure("returns", f"{title}, shrinks", "largest |u|", None)
        for contender, found in runs.items():
            here = rows["returns"], 0
            weights = {k: w["last"] for k, w in found.weights.items()}
            back.add(contender, np.abs((weights[end] - weights[start])[here]))
            peak.put(contender, np.max(found.largest[end]["last"][here]))
            here = rows["shrinks"], 0
            shrunk.add(contender, np.abs(weights[last][here]))
            update = found.largest_until(last, "last")[here]
            shrunk_peak.put(contender, np.max(update))
        yield from (back, peak, shrunk, shrunk_peak)


def _title(rule: str, b2: float) -> str:
    return {
        "adamw": f"AdamW, b2 {b2}",
        "sgd": "SGD, momentum 0.9",
        "lion": f"Lion, b2 {b2}",
    }[rule]


#
# A long run
#


_LONG = 100_000


def long(setup: Setup) -> Iterator[Figure]:
    """100,000 steps of AdamW, with gradients over three decades in each group."""
    shape = (2 * setup.seeds, 32)
    normal = np.random.default_rng(0).standard_normal(shape)
    of = partial(Elements.of, shape, mean=normal * np.logspace(-3, 0, 32))
    # In a tiny run, a hundredth of the steps.
    total = _LONG // 100 if setup.tiny else _LONG
    absent = partial(of, stops=total // 100)
    elements, rows = stack(
        {
            "constant": of(),
            "stops at 1,000": absent(),
            "stops at 1,000, returns at 90,000": absent(returns=total // 10 * 9 + 1),
            "shrinks by 0.999": of(decay=0.999),
            "alternates": of(alternates=True),
            "spike at 50,000": of(spike=total // 2),
        }
    )
    runs = {
        contender: run(
            contender,
            "adamw",
            {"w": elements},
            [total],
            learning_rate=1e-4,
            chunk=total // 100,
        )
        for contender in setup.contenders
    }
    for name, here in rows.items():
        reach = (9.5, 10.5) if name == "constant" else None
        figure = Figure("long", f"AdamW, b2 0.999, {name}", "mean |w|", reach)
        peak = Figure("long", f"AdamW, b2 0.999, {name}", "largest |u|", None)
        for contender, found in runs.items():
            figure.add(contender, np.abs(found.weights[total]["w"][here]) * 1e-4)
            peak.put(contender, np.max(found.largest[total]["w"][here]))
        yield from (figure, peak)


#
# A pruned network
#


_PRUNED_AT = 500
_PRUNED_FOR = 4000
_LEARNING_RATE = 1e-3


def pruned(setup: Setup) -> Iterator[Figure]:
    """A network of one hidden layer whose smaller half of weights is set to zero, and
    gets no gradient from then on."""
    for b2, most_loss, most_drift in ((0.95, 0.040, 3.0), (0.999, None, None)):
        case = f"Adam, b2 {b2}"
        loss = Figure("pruned", case, "loss: mean of seeds", _at_most(most_loss))
        drift = Figure("pruned", case, "drift, lr: mean", _at_most(most_drift))
        for contender in setup.contenders:
            losses, drifts, largest = _prune(setup, contender, b2)
            loss.add(contender, losses)
            drift.put(contender, np.mean(drifts), np.append(largest, 0.0))
        yield from (loss, drift)


class _Task(eqx.Module):
    """A student of a network of one layer."""

    teacher: jax.Array
    key: jax.Array

    def loss(self, model: PyTree, t: Any) -> Scalar:
        inputs, noise = jax.random.split(jax.random.fold_in(self.key, t))
        x = jax.random.normal(inputs, (64, 64))
        y = jnp.tanh(x @ self.teacher.T) + 0.1 * jax.random.normal(noise, (64, 64))
        x = x.astype(model.layers[0].weight.dtype)
        return jnp.mean((jax.vmap(model)(x).astype(jnp.float32) - y) ** 2)


def _student(key: jax.Array) -> eqx.nn.MLP:
    return fq.cast(eqx.nn.MLP(64, 64, 256, 1, key=key), jnp.bfloat16)


def _prune(
    setup: Setup, contender: Contender, b2: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each seed: the loss at the end, and the mean and the largest drift of weights
    that were set to zero."""
    keys = jax.vmap(jax.random.key)(jnp.arange(setup.seeds))
    number = jnp.float32(b2)
    carry = jax.vmap(partial(_start_pruning, contender, number))(keys)
    ones = jtu.tree_map(lambda x: jnp.ones(x.shape, bool), carry[0])
    chunk = setup.steps(100)
    train = partial(_train_pruned, contender, chunk, number, keys)
    before, after = setup.steps(_PRUNED_AT), setup.steps(_PRUNED_FOR)
    for first in range(0, before, chunk):
        carry = train(ones, carry, first)
    params, state = carry
    mask = jax.vmap(_largest_half)(params)
    carry = jtu.tree_map(lambda x, m: jnp.where(m, x, 0), params, mask), state
    for first in range(before, before + after, chunk):
        carry = train(mask, carry, first)
    return jax.device_get(_judge(contender, keys, mask, carry))


def _task(key: jax.Array) -> tuple[_Task, eqx.nn.MLP]:
    teacher, student, batches = jax.random.split(key, 3)
    task = _Task(jax.random.normal(teacher, (64, 64)) / 8, batches)
    return task, _student(student)


def _start_pruning(contender: Contender, b2: Scalar, key: jax.Array) -> Any:
    _, model = _task(key)
    params = eqx.filter(fq.cast(model, contender.dtype), eqx.is_inexact_array)
    return params, contender.optimizer("adamw", _LEARNING_RATE, b2).init(params)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _train_pruned(
    contender: Contender,
    chunk: int,
    b2: Scalar,
    keys: jax.Array,
    masks: PyTree,
    carries: Any,
    first: Any,
) -> Any:
    optim = contender.optimizer("adamw", _LEARNING_RATE, b2)

    def one_seed(key: jax.Array, mask: PyTree, carry: Any) -> Any:
        task, model = _task(key)
        static = eqx.filter(model, eqx.is_inexact_array, inverse=True)

        def step(carry: Any, t: Scalar) -> tuple[Any, None]:
            params, state = carry
            loss = lambda params: task.loss(eqx.combine(params, static), t)
            grads = jax.grad(loss)(params)
            grads = jtu.tree_map(lambda g, m: jnp.where(m, g, 0), grads, mask)
            return take_step(optim, params, state, grads), None

        return jax.lax.scan(step, carry, first + jnp.arange(chunk))[0]

    return jax.vmap(one_seed)(keys, masks, carries)


def _largest_half(params: PyTree) -> PyTree:
    def half(x: jax.Array) -> jax.Array:
        size = jnp.abs(x.astype(jnp.float32))
        is_matrix = x.ndim == 2
        return size > jnp.median(size) if is_matrix else jnp.ones(x.shape, bool)

    return jtu.tree_map(half, params)


@partial(jax.jit, static_argnums=0)
def _judge(contender: Contender, keys: jax.Array, masks: PyTree, carries: Any) -> Any:
    def one_seed(key: jax.Array, mask: PyTree, carry: Any) -> Any:
        params, state = carry
        task, model = _task(key)
        static = eqx.filter(model, eqx.is_inexact_array, inverse=True)
        # Of batches that were not trained on.
        later = 10**6 + jnp.arange(16)
        losses = jax.vmap(lambda t: task.loss(eqx.combine(params, static), t))(later)
        weights = full_weights(contender, params, state)
        drifts = [
            jnp.where(m, 0, jnp.abs(w)) / _LEARNING_RATE
            for w, m in zip(
                jtu.tree_leaves(weights), jtu.tree_leaves(mask), strict=True
            )
        ]
        number = sum(jnp.sum(~m) for m in jtu.tree_leaves(mask))
        mean = sum(jnp.sum(x) for x in drifts) / number
        return jnp.mean(losses), mean, jnp.max(jnp.stack([jnp.max(x) for x in drifts]))

    return jax.vmap(one_seed)(keys, masks, carries)


#
# An embedding
#


_BOTH = 300
_WITHOUT = 3000


def vanished(setup: Setup) -> Iterator[Figure]:
    """Rows of an embedding whose tokens do not occur any more; with groups along the
    vocabulary, as on a TPU."""
    for b2, most in ((0.95, 3.0), (0.999, None)):
        case = f"Adam, b2 {b2}, groups along the vocabulary"
        figure = Figure("vanished", case, "drift, lr: mean", _at_most(most))
        for contender in setup.contenders:
            figure.add(contender, _vanish(setup, contender, b2))
        yield figure


_VOCABULARY, _WIDTH = 512, 128


def _vanish(setup: Setup, contender: Contender, b2: float) -> np.ndarray:
    """How far the elements of rows moved, in learning rates."""
    ranks = 1 + np.random.default_rng(1).permutation(_VOCABULARY)
    before = 1 / ranks**0.7
    gone = np.random.default_rng(2).random(_VOCABULARY) < 0.3
    after = np.where(gone, 0, before)
    before, after = (np.asarray(p / p.sum(), np.float32) for p in (before, after))
    shape = (_VOCABULARY, _WIDTH)
    params = {"e": (0.02 * jax.random.normal(jax.random.key(0), shape))}
    params = fq.cast(fq.cast(params, jnp.bfloat16), contender.dtype)
    # A state that is made for a TPU has its groups along rows.
    options = {} if contender.storage is None else {"backend": "tpu"}
    init = contender.optimizer("adamw", _LEARNING_RATE, b2, **options).init
    carry = params, init(params)
    chunk = setup.steps(100)
    batch = 128 if setup.tiny else 1024
    train = partial(_train_embedding, contender, chunk, batch, jnp.float32(b2))
    weights = []
    start = 0
    for steps, odds in ((_BOTH, before), (_WITHOUT, after)):
        for first in range(start, start + setup.steps(steps), chunk):
            carry = train(odds, carry, first)
        start += setup.steps(steps)
        weights.append(np.asarray(full_weights(contender, *carry)["e"]))
    return np.abs(weights[1] - weights[0])[gone] / _LEARNING_RATE


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _train_embedding(
    contender: Contender,
    chunk: int,
    batch: int,
    b2: Scalar,
    odds: jax.Array,
    carry: Any,
    first: Any,
) -> Any:
    optim = contender.optimizer("adamw", _LEARNING_RATE, b2)

    def step(carry: Any, t: Scalar) -> tuple[Any, None]:
        params, state = carry
        for_tokens, for_noise = jax.random.split(
            jax.random.fold_in(jax.random.key(3), t)
        )
        tokens = jax.random.choice(for_tokens, _VOCABULARY, (batch,), p=odds)
        noise = 0.1 * jax.random.normal(for_noise, (batch, _WIDTH)) / batch
        grads = {"e": jnp.zeros((_VOCABULARY, _WIDTH)).at[tokens].add(noise)}
        return take_step(optim, params, state, grads), None

    return jax.lax.scan(step, carry, first + jnp.arange(chunk))[0]


ROWS: dict[str, Callable[[Setup], Iterator[Figure]]] = {
    row.__name__: row for row in (stops, pruned, vanished, small, long, returns)
}
