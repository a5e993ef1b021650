"""Plans of states in host memory."""

import json

import jax
import jax.numpy as jnp
import pytest

import flashquinox as fq
from flashquinox.__main__ import main


def _shapes():
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return {"large": struct(512, 512), "small": struct(64)}


@pytest.mark.parametrize("mesh", [None, 4])
def test_bytes(mesh):
    """What is in host memory is in no other figure, and all that there is without it;
    it is what `init` puts there."""
    optim = fq.adamw(1e-3, state_memory="pinned_host")
    here = fq.memory_plan(_shapes(), fq.adamw(1e-3), mesh).step
    plan = fq.memory_plan(_shapes(), optim, mesh)
    away = plan.step
    assert away.at_rest + away.host == here.at_rest
    assert here.host == plan.mixed_precision.host == 0
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _shapes())
    state = jax.tree.leaves(optim.init(zeros))
    made = sum(x.nbytes for x in state if x.sharding.memory_kind == "pinned_host")
    assert away.host == made // (mesh or 1)
    assert away.transfer_seconds(1e9) == away.host / 1e9
    assert "in host memory" in str(plan)


def test_averages_and_sums():
    """They are where the state is."""
    optim = fq.accumulate(fq.adamw(1e-3, state_memory="pinned_host"), every=2)
    plan = fq.memory_plan(_shapes(), optim, ema=fq.ema(0.99)).step
    # Three bytes each, and 3.125 of the state.
    assert plan.host == 512 * 512 * 9.125
    assert plan.accumulators == plan.averages == 64 * 3


def test_command(capsys):
    arguments = ["plan", "--params", "1e6", "--offload", "--host-bandwidth", "10GB"]
    assert not main(arguments)
    shown = " ".join(capsys.readouterr().out.split())
    assert "at 10 GB/s each way at once" in shown and "in host memory" in shown
    assert not main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    host = found["on_each_device"]["flashquinox"]["host"]
    assert host == pytest.approx(3.125e6, rel=1e-3)
    assert found["transfer_seconds"] == host / 1e10
