"""Plans of states in host memory."""

import json
import pathlib

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


def test_a_plan_is_what_a_gpu_had(capsys):
    """Llama 3.1 8B with gradient release on an H100 (`benchmarks/offload.py`): at rest,
    to the byte but for the state of the norms, and the peak is above the plan by no
    more than the inputs of layers and what the loss needs."""
    results = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
    measured = json.loads((results / "offload-h100-8b.json").read_text())
    measured = measured["parts"]["8B"]
    arguments = ["plan", "--model", "llama-3.1-8b", "--offload", "--json"]
    assert not main(arguments)
    plan = json.loads(capsys.readouterr().out)["on_each_device"]["gradient_release"]
    assert plan["parameters"] == measured["parameters"]
    assert plan["host"] == measured["host bytes"]
    at_rest = plan["total"] - plan["gradients"]
    assert at_rest == measured["device bytes at rest"]
    # The inputs of 32 layers, and logits of 2048 tokens in float32, twice.
    inputs, logits = 32 * 2048 * 4096 * 2, 2048 * 128256 * 4
    above = measured["peak device bytes"] - plan["total"]
    assert 0 <= above <= inputs + 2 * logits
    assert measured["peak device bytes"] <= 22e9
