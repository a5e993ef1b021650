"""Steps on TPUs with their state in host memory, by the real compiler."""

import re

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest
from jax.sharding import SingleDeviceSharding

import flashquinox as fq

from ..helpers import slow
from ..kernels import compiling_for, tpu_devices


_TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
_LEAVES = 8


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="shapes have no memory space there"
)
@pytest.mark.parametrize("chip", [slow(x, unless=x == "v5e") for x in _TOPOLOGIES])
def test_a_step_streams_its_state(chip):
    """All of it is in host memory, in place. It comes and goes by asynchronous copies,
    of which some are under way while kernels run."""
    device = tpu_devices(_TOPOLOGIES[chip])[0]
    space = jax.memory.Space
    here, there = (
        (SingleDeviceSharding(device, memory_kind=kind), of)
        for kind, of in (("device", space.Device), ("pinned_host", space.Host))
    )

    def placed(x, there):
        sharding, of = there
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding, _memory_space=of
        )

    weight = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16)
    weights = [weight] * _LEAVES
    optim = fq.adamw(1e-3, weight_decay=0.01, backend="tpu")
    state = jax.eval_shape(optim.init, weights)
    away = [x for x in jtu.tree_leaves(state) if x.size > 2**14]
    state = jtu.tree_map(lambda x: placed(x, there if x.size > 2**14 else here), state)
    weights = jtu.tree_map(lambda x: placed(x, here), weights)
    with compiling_for(device.device_kind, "tpu", device.num_cores):
        step = jax.jit(optim.step, donate_argnums=(0, 1))
        compiled = step.lower(weights, state, weights).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    on_host = sum(x.size * x.dtype.itemsize for x in away)
    assert memory.host_argument_size_in_bytes == on_host
    assert memory.host_alias_size_in_bytes == on_host
    assert memory.host_temp_size_in_bytes == 0
    size = weight.size * _LEAVES
    assert on_host == size * 3.125
    # Weights and gradients; these leaves are one portion.
    assert memory.argument_size_in_bytes <= size * 4 + 2**20
    assert memory.temp_size_in_bytes <= on_host * 1.25
    # Each array arrives and leaves by a copy, and kernels run between its beginning and
    # its end: between two of them, XLA's schedule has a kernel.
    assert "tpu_custom_call" in text
    main = text[text.index("ENTRY") :]
    events = re.findall(r" (copy-start|copy-done|custom-call)\(", main)
    assert events.count("copy-start") >= 2 * len(away)
    under_way, beside = 0, 0
    for event in events:
        under_way += {"copy-start": 1, "copy-done": -1}.get(event, 0)
        beside += event == "custom-call" and under_way > 0
    assert beside >= _LEAVES - 1
