"""A tile by a trace that all shapes share is the tile by its own trace."""

import jax
import jax.lax as lax
import jax.numpy as jnp
import pytest

import flashquinox as fq
from flashquinox._backends import xla
from flashquinox._tile import shapes
from flashquinox._tile.tile import update_tile

from ..helpers import HeavyBall, tree_identical
from ..kernels import arrays


class _Branch(HeavyBall):
    def update(self, grad, weight, moments, scalars):
        step, moments = super().update(grad, weight, moments, scalars)
        return lax.cond(scalars["step"] < 0, lambda: step, lambda: -step), moments


class _Loop(HeavyBall):
    def update(self, grad, weight, moments, scalars):
        step, moments = super().update(grad, weight, moments, scalars)
        return lax.fori_loop(0, 2, lambda _, x: 0.5 * x + step, step), moments


class _CustomDerivative(HeavyBall):
    def update(self, grad, weight, moments, scalars):
        step, moments = super().update(jax.nn.relu(grad), weight, moments, scalars)
        return step, moments


# Axes of one element, partial groups, a scalar, and a length that stands for others.
_SHAPES = {
    "ones": (1, 64, 1),
    "partial": (3, 33),
    "scalar": (),
    "prime": (shapes._LENGTHS[1], 2),
    "rows": (64, 5),
}


@pytest.mark.once
@pytest.mark.product
@pytest.mark.parametrize(
    "rule, replayed",
    [
        (fq.Adam(), True),
        (_CustomDerivative(), True),
        (_Branch(), False),
        (_Loop(), False),
    ],
)
def test_any_shape(monkeypatch, rule, replayed):
    optim = fq.optimizer(rule, 1e-2, backend="xla")
    # Without a shared trace, shapes have nothing to do with each other.
    leaves = _SHAPES if replayed else {"partial": _SHAPES["partial"]}
    params = arrays(leaves, jnp.bfloat16, 0)
    grads, state = arrays(leaves, jnp.float32, 1), optim.init(params)
    replays = []
    replay = shapes._compat.Tape.replay
    # As on other platforms than CPUs.
    monkeypatch.setattr(xla, "takes", lambda leaf: False)
    monkeypatch.setattr(
        shapes._compat.Tape, "replay", lambda *x: replays.append(1) or replay(*x)
    )
    shapes._tape.cache_clear()
    jax.clear_caches()
    found = jax.jit(optim.step)(params, state, grads)
    assert bool(replays) == replayed
    monkeypatch.setattr(xla, "update_tile_of_any_shape", update_tile)
    jax.clear_caches()
    assert tree_identical(found, jax.jit(optim.step)(params, state, grads))
