"""Two thousand steps: single elements go where they go in float32, whatever their
gradients do, wherever their groups lie, and however large those are."""

import functools
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq


_STEPS, _STOPS = 2000, 200
# What the elements of each group do, by their position in it; the others have noise.
_KINDS = ("stops", "decays", "constant", "alternates", "constant, 1/1000")
_RULES = {"adam": (0.95, 0.999), "sgd": (0.9,), "lion": (0.99,)}


def _leaves(group_size: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes, and along which axes groups lie there."""
    return {
        "last": ((32, group_size), (-1,)),
        "merged": ((6, group_size, 5), (-2, -1)),
        # The last group has 7 elements.
        "partial": ((7, group_size + 1), (-2, -1)),
    }


def _positions(shape: tuple[int, ...], group_size: int) -> np.ndarray:
    """Of elements in their groups, which are consecutive in memory."""
    return (np.arange(math.prod(shape)) % group_size).reshape(shape)


def _gradients(positions: dict[str, np.ndarray], t: jax.Array) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    time = t.astype(jnp.float32)
    # One call for all leaves, which costs more to compile than all else here.
    number = sum(x.size for x in positions.values())
    noises = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), number)
    grads = {}
    for name, position in positions.items():
        sign = rng.choice([-1, 1], position.shape)
        size = jnp.asarray(sign * rng.uniform(0.5, 1.5, position.shape), jnp.float32)
        noise = noises[: position.size].reshape(position.shape)
        noises = noises[position.size :]
        of_kind = {
            "stops": jnp.where(t < _STOPS, noise, 0.0),
            "decays": 0.995**time,
            "constant": 1.0,
            "alternates": jnp.where(t % 2 == 0, 1.0, -1.0),
            "constant, 1/1000": 1e-3,
        }
        scale = noise
        for i, kind in enumerate(_KINDS):
            scale = jnp.where(position == i, of_kind[kind], scale)
        grads[name] = size * scale
    return grads


def _optimizers(rule: str, decay: Any, storage: fq.Storage):
    """Ours and Optax's, with a learning rate of 1."""
    if rule == "sgd":
        return fq.sgd(1.0, decay, storage=storage), optax.sgd(1.0, decay)
    ours, theirs = getattr(fq, rule), getattr(optax, rule)
    options = {"weight_decay": 0.0} if rule == "lion" else {}
    return (
        ours(1.0, b2=decay, storage=storage, **options),
        theirs(1.0, b2=decay, **options),
    )


@partial(
    jax.jit,
    static_argnums=(0, 2),
    # Compiling takes most of the time; but with level 0, steps do.
    compiler_options={"xla_backend_optimization_level": 1},
)
def _scan(rule: str, decay: jax.Array, storage: fq.Storage) -> Any:
    """Weights after the last step, ours and Optax's, and our momenta."""
    ours, theirs = _optimizers(rule, decay, storage)
    positions = {
        name: _positions(shape, storage.group_size)
        for name, (shape, _) in _leaves(storage.group_size).items()
    }
    exact = {name: jnp.zeros(x.shape) for name, x in positions.items()}
    model = jtu.tree_map(lambda x: x.astype(jnp.bfloat16), exact)
    state = ours.init(model)
    is_moment = lambda x: isinstance(x, fq.QuantMoment)
    moments = jtu.tree_leaves(state, is_leaf=is_moment)
    axes = [x.axes for x in moments if is_moment(x)]
    leaves = _leaves(storage.group_size)
    assert axes == [leaves[k][1] for k in sorted(leaves)] * (len(axes) // len(leaves))

    def step(carry: Any, t: jax.Array) -> tuple[Any, None]:
        model, state, exact, exact_state = carry
        grads = _gradients(positions, t)
        model, state = ours.step(model, state, grads)
        with jax.numpy_dtype_promotion("standard"):
            updates, exact_state = theirs.update(grads, exact_state, exact)
        return (model, state, optax.apply_updates(exact, updates), exact_state), None

    carry = model, state, exact, theirs.init(exact)
    model, state, exact, _ = jax.lax.scan(step, carry, jnp.arange(_STEPS))[0]
    momenta = {}
    if rule == "lion":
        momenta = {k: x.decode() for k, x in state.moments["mu"].items()}
    return fq.master_weights(model, state), exact, momenta


@functools.cache
def _run(rule: str, decay: float, group_size: int, moments: Any = "flashquinox") -> Any:
    storage = fq.Storage(master_weight_bits=32, group_size=group_size, moments=moments)
    # The first optimizer imports the kernels, which add settings that programs are kept
    # by: built while `_scan` is traced, it would have that compiled again.
    _optimizers(rule, decay, storage)
    return jax.device_get(_scan(rule, jnp.float32(decay), storage))


# Bounds of the mean deviation from float32, in learning rates. A momentum of b1 = 0.9
# that was rounded with an error e moves the weight by e * (0.9 + 0.9^2 + ...) = 9 e
# more until that has decayed. Unbiased rounding to codes that are q apart has errors of
# a standard deviation of at most q / 2, so their sum over n steps of at most
# sqrt(n) q / 2, if thresholds are independent; rotating ones are better. A bound is
# three standard deviations.
def _bound(spacing: float) -> float:
    return 3 * 9 * spacing / 2 * _STEPS**0.5


_BOUNDS = {
    # 127 codes for a direction m / sqrt(v) of at most 1.5, that of an element with
    # noise; a constant gradient has 1.
    "adam": _bound(1.5 / 127),
    # The largest momentum is 10 gradients, of up to 1.5. Companded by softsign, codes
    # near zero are 1/256 of that apart; linear ones, 1/127.
    "sgd": _bound(15 / 127),
    # A sign follows the gradient, where this is not 0.
    "lion": 0.5,
}
# Second moments are rounded too: in a long way of one sign, by at most so much of it.
_SHARE = {"adam": 0.03, "sgd": 0.0, "lion": 0.0}


def _deviations(rule: str, group_size: int, moments: Any = "flashquinox") -> list[str]:
    """Those that are out of bounds."""
    found = []
    for decay, (name, (shape, axes)), (i, kind) in itertools.product(
        _RULES[rule], _leaves(group_size).items(), enumerate(_KINDS)
    ):
        weights, exact, momenta = _run(rule, decay, group_size, moments)
        here = _positions(shape, group_size) == i
        deviation = np.mean(np.abs(weights[name] - exact[name])[here])
        way = np.mean(np.abs(exact[name][here]))
        bound = _BOUNDS[rule] + _SHARE[rule] * way
        if rule == "lion" and kind == "stops":
            # In float32, the sign of a momentum that decays is never zero. Here it must
            # come to zero: after 1,800 steps, 1e-8 of it would be left. So the mean is
            # less than a tenth of the smallest code, 1/256 of the largest momentum.
            momentum = np.abs(momenta[name])
            deviation, bound = np.mean(momentum[here]), np.max(momentum) / 256 / 10
        if not deviation <= bound:
            where = f"{decay}, groups along {axes} of {name}, {kind}"
            found.append(f"{where}: {deviation:.3g} > {bound:.3g}")
    return found


@pytest.mark.once
@pytest.mark.parametrize("rule", list(_RULES))
def test_elements_train(rule):
    assert _deviations(rule, 32) == []


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [16, 128])
@pytest.mark.parametrize("rule", list(_RULES))
def test_elements_train_in_groups_of(group_size, rule):
    assert _deviations(rule, group_size) == []
