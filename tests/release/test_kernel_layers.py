"""Gradient release with its state in host memory, as programs for TPUs have it: kernels
copy the layers of 8-bit stacks."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import flashquinox as fq
from flashquinox._optimizer import state_memory

from ..helpers import slow
from ..kernels import compiling_for


pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="kernels take no host memory there"
)
_AWAY = "pinned_host"


@pytest.mark.once
@pytest.mark.parametrize(
    "layers, max_norm, optimizer",
    [(2, None, fq.lion), slow(1, 0.1, fq.lion), slow(3, 0.1, fq.adamw)],
)
def test_same_bits(layers, max_norm, optimizer, monkeypatch):
    """In programs that are traced for a TPU, whatever they are compiled for. One stack
    lies transposed; and one has rows that are no multiple of 32, which XLA copies, as
    it does all scales."""
    monkeypatch.setattr(state_memory, "_SMALL", 2**5)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    blocks = {
        "up": normal(layers, 64, 128),
        "down": normal(layers, 128, 64),
        "odd": normal(layers, 64, 40),
    }

    def block(own, x, batch, key):
        y = jnp.tanh(x @ own["up"]) @ own["down"]
        return x + y @ own["odd"] @ own["odd"].T

    loss = fq.LayeredLoss(
        blocks=lambda model: model,
        prologue=lambda model, x, key: x,
        block=block,
        epilogue=lambda model, x, batch, key: jnp.mean(x.astype(jnp.float32) ** 2),
    )
    found, batch = [], normal(4, 64)
    for memory in ("device", _AWAY):
        # Groups as TPUs have them; the arithmetic of CPUs.
        rows = optimizer(1e-2, backend="tpu", state_memory=memory).init(blocks)
        optim = optimizer(1e-2, backend="xla")
        step = lambda *args, optim=optim: fq.release_step(
            optim, loss, *args, max_norm=max_norm
        )
        new = blocks, rows
        with compiling_for("TPU v5 lite", "tpu"):
            traced = jax.jit(step).trace(*new, batch)
        text, compiled = str(traced.jaxpr), traced.lower().compile()
        for _ in range(2):
            *new, _ = compiled(*new, batch)
        found.append(new)
        is_away = memory == _AWAY
        # In the first turn, before the loop, and in the loop.
        assert text.count("flashquinox_start_reads[") == 2 * is_away
        assert ("flashquinox_start_writes[" in text) == is_away
        kinds = {x.sharding.memory_kind for x in jtu.tree_leaves(new[1])}
        assert (_AWAY in kinds) == is_away
    for x, y in zip(*map(jtu.tree_leaves, found), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
