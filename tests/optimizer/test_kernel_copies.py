"""Steps of states in host memory whose slices kernels copy, as in programs for TPUs."""

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

import flashquinox as fq
from flashquinox._optimizer import together

from ..helpers import slow, tree_identical
from ..kernels import compiling_for


pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="kernels take no host memory there"
)
# Leaves whose rows are a multiple of 32, in slices, one after the other; and others.
_SHAPES = {"matrix": (192, 128), "stack": (3, 64, 128), "odd": (250, 40)}


@pytest.mark.parametrize(
    "make, wrap, names",
    [
        (fq.lion, None, ("matrix",)),
        slow(fq.adamw, None, ("stack", "odd")),
        slow(fq.lion, "update", ("stack", "odd")),
        slow(fq.lion, "inside", ("matrix",)),
        slow(fq.lion, "outside", ("matrix",)),
    ],
)
def test_same_bits(make, wrap, names, monkeypatch):
    """In programs that are traced for a TPU, whatever they are compiled for; and under
    `vmap`, within `jit` and around it, where XLA copies."""
    monkeypatch.setattr(together, "PORTION", 2**12)
    vmap = jax.vmap if wrap in ("inside", "outside") else lambda function: function
    shapes = {name: _SHAPES[name] for name in names}
    if wrap in ("inside", "outside"):
        shapes = {name: (2, *shape) for name, shape in shapes.items()}
    normal = lambda seed: {
        name: jr.normal(jr.key(seed), shape, jnp.bfloat16)
        for name, shape in shapes.items()
    }
    weights = normal(0)
    # Groups as TPUs have them; the arithmetic of CPUs.
    state = vmap(make(1e-2, backend="tpu").init)(weights)
    away = jtu.tree_map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), state
    )
    optim = make(1e-2, backend="xla")
    step = optim.step
    if wrap == "update":
        step = lambda model, state, grads: optim.update(grads, state, model)
    step = jax.jit(vmap(step)) if wrap != "outside" else vmap(jax.jit(step))
    found = []
    for new in (state, away):
        model = weights
        with compiling_for("TPU v5 lite", "tpu"):
            traced = jax.jit(step).trace(model, new, weights)
            text, compiled = str(traced.jaxpr), traced.lower().compile()
        for seed in (1, 2):
            changed, new = compiled(model, new, normal(seed))
            model = model if wrap == "update" else changed
        is_away = new is not state and len(found) == 1
        called = "flashquinox_start_writes[" in text
        assert called == (is_away and wrap not in ("inside", "outside"))
        found.append((changed, new))
    assert tree_identical(*found)
    kinds = {x.sharding.memory_kind for x in jtu.tree_leaves(found[1][1])}
    assert "pinned_host" in kinds
