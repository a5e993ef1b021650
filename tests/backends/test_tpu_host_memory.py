"""Steps on TPUs with their state in host memory, by the real compiler."""

import re

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest
from jax.sharding import SingleDeviceSharding

import flashquinox as fq
from flashquinox._optimizer import together

from ..helpers import slow
from ..kernels import compiling_for, tpu_devices


pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="shapes have no memory space there"
)
_TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
_LEAVES = 8


def _compile(chip, optim, step, model, batch, *, are_whole_tiles=True):
    """A step of a model and its state, which is in host memory but for small arrays,
    all of it in place: its memory, its text, and the bytes of the state there."""
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

    state = jax.eval_shape(optim.init, model)
    away = [x for x in jtu.tree_leaves(state) if x.size > 2**14]
    state = jtu.tree_map(lambda x: placed(x, there if x.size > 2**14 else here), state)
    model, batch = jtu.tree_map(lambda x: placed(x, here), (model, batch))
    with compiling_for(device.device_kind, "tpu", device.num_cores):
        donating = jax.jit(step, donate_argnums=(0, 1))
        compiled = donating.lower(model, state, batch).compile()
    memory = compiled.memory_analysis()
    on_host = sum(x.size * x.dtype.itemsize for x in away)
    if are_whole_tiles:
        assert memory.host_argument_size_in_bytes == on_host
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    assert memory.host_temp_size_in_bytes == 0
    return memory, compiled.as_text() or "", on_host


@pytest.mark.once
@pytest.mark.parametrize("chip", [slow(x, unless=x == "v5e") for x in _TOPOLOGIES])
def test_a_step_streams_its_state(chip):
    """All of it is in host memory, in place. It comes and goes by asynchronous copies,
    of which some are under way while kernels run."""
    weight = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16)
    weights = [weight] * _LEAVES
    optim = fq.adamw(1e-3, weight_decay=0.01, backend="tpu")
    memory, text, on_host = _compile(chip, optim, optim.step, weights, weights)
    size = weight.size * _LEAVES
    assert on_host == size * 3.125
    # Weights and gradients; these leaves are one portion.
    assert memory.argument_size_in_bytes <= size * 4 + 2**20
    assert memory.temp_size_in_bytes <= on_host * 1.25
    # Each array (a correction, codes and scales of two moments) arrives and leaves by a
    # copy, and kernels run between its beginning and
    # its end: between two of them, XLA's schedule has a kernel.
    assert "tpu_custom_call" in text
    main = text[text.index("ENTRY") :]
    events = re.findall(r" (copy-start|copy-done|custom-call)\(", main)
    assert events.count("copy-start") >= 2 * 5 * _LEAVES
    under_way, beside = 0, 0
    for event in events:
        under_way += {"copy-start": 1, "copy-done": -1}.get(event, 0)
        beside += event == "custom-call" and under_way > 0
    assert beside >= _LEAVES - 1


@pytest.mark.once
@pytest.mark.parametrize("chip", [slow(x, unless=x == "v5e") for x in _TOPOLOGIES])
def test_layers_come_and_go_by_kernels(chip):
    """In gradient release, while others are computed. No stack is copied."""
    layers, width, hidden = 16, 512, 1024
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    # The second one lies transposed in memory.
    model = {"up": shape(layers, width, hidden), "down": shape(layers, 4096, 64)}

    def block(own, x, batch, key):
        y = jax.nn.relu(x @ own["up"]).reshape(-1, 4096)
        return x + (y @ own["down"]).reshape(x.shape[0], -1).mean() * x

    loss = fq.LayeredLoss(
        blocks=lambda model: model,
        prologue=lambda model, x, key: x,
        block=block,
        epilogue=lambda model, x, batch, key: jnp.mean(x.astype(jnp.float32) ** 2),
    )
    optim = fq.lion(1e-3, weight_decay=0.01, backend="tpu")
    step = lambda *args: fq.release_step(optim, loss, *args)[:2]
    memory, text, on_host = _compile(chip, optim, step, model, shape(64, width))
    # The layer that arrives, the one that leaves and the one that is updated; the
    # gradients of a layer, of twice its weights; and inputs of all layers.
    size = sum(x.size for x in jtu.tree_leaves(model))
    kept = layers * 64 * width * 2
    assert memory.temp_size_in_bytes <= (3 * on_host + 4 * size) / layers + kept + 2**20
    assert not re.search(rf"= \(?[su]8\[{layers},\S* (copy|copy-start)\(", text)
    # In the loop, copies begin, products follow, and then copies end.
    name = "%flashquinox_"
    loop = next(
        x
        for x in text.split("\n\n")
        if f"{name}start_writes" in x and not x.startswith("ENTRY")
    )
    same = dict(re.findall(r"(%[\w.-]+) = \S+ bitcast\((%[\w.-]+)\)", loop))
    events, parts = [], {}
    for line in loop.splitlines():
        call = re.match(
            rf"\s*{name}((?:start|finish)_\w+)\S* = .*custom-call\((.*?)\)", line
        )
        if call is not None:
            events.append(call[1])
            # Lion has two arrays of 8 bits of each leaf. Semaphores come last.
            operands = re.findall(r"%[\w.-]+", call[2])[-5:-1]
            while operands != (sources := [same.get(x, x) for x in operands]):
                operands = sources
            parts[call[1]] = operands
        elif "kind=kOutput" in line:
            events.append("product")
    begun, ended = events.index("start_writes"), events.index("finish_reads")
    assert events[:begun].count("product") == 0 and "start_reads" in events[:begun]
    assert events[begun:ended].count("product") >= 4
    assert events[ended:] == ["finish_reads", "finish_writes"]
    # Nothing moves what is being written, or is read to.
    assert parts["start_writes"] == parts["finish_writes"]
    results = re.findall(rf"{name}\w+_reads\S* = \((.*)\) custom-call", loop)
    assert len(results) == 2 and "S(1)" not in "".join(results)


@pytest.mark.parametrize("chip", [slow(x, unless=x == "v5e") for x in _TOPOLOGIES])
def test_slices_come_and_go_by_kernels(chip, monkeypatch):
    """Of a leaf of several portions, while others are updated."""
    monkeypatch.setattr(together, "PORTION", 2**18)
    weights = {"leaf": jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16)}
    optim = fq.lion(1e-3, weight_decay=0.01, backend="tpu")
    memory, text, on_host = _compile(chip, optim, optim.step, weights, weights)
    # Three of four portions, with their weights and gradients, each rounded up.
    size = weights["leaf"].size
    assert memory.temp_size_in_bytes <= on_host + 4 * size
    assert not re.search(r"= \(?[su]8\[2048,\S* (copy|copy-start)\(", text)
    main = text[text.index("ENTRY") :]
    calls = r"%flashquinox_((?:start|finish)_\w+|lion)\S* = .*custom-call\("
    events = re.findall(calls, main)
    assert [events.count(x) for x in ("start_reads", "finish_writes", "lion")] == [
        4
    ] * 3
    # While the second portion is updated, the third arrives and the first leaves.
    second = [i for i, x in enumerate(events) if x == "lion"][1]
    begun = [events[:second].count(f"start_{x}") for x in ("reads", "writes")]
    ended = [events[:second].count(f"finish_{x}") for x in ("reads", "writes")]
    assert (begun, ended) == ([3, 1], [2, 0])


@pytest.mark.once
@pytest.mark.parametrize("chip", [slow(x, unless=x == "v5e") for x in _TOPOLOGIES])
@pytest.mark.parametrize("bits", [None, slow(16), slow(24)])
def test_three_portions_are_on_the_device(chip, bits, monkeypatch):
    """However many there are, and with `accumulate` also in the call that takes the
    step: one arrives, one is updated and one leaves."""
    weight = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16)
    monkeypatch.setattr(together, "PORTION", weight.size)
    optim = fq.adamw(1e-3, backend="tpu")
    if bits is not None:
        optim = fq.accumulate(optim, 4, bits=bits)
    weights = [weight] * 8
    memory, _, on_host = _compile(chip, optim, optim.step, weights, weights)
    # What arrives is not in the place of what leaves; and gradients are made of sums.
    portion = on_host / 8
    assert memory.temp_size_in_bytes <= 4 * portion + 4 * weight.size


@pytest.mark.once
@pytest.mark.parametrize("chip", [slow(x, unless=x == "v5e") for x in _TOPOLOGIES])
@pytest.mark.parametrize("bits", [16, slow(24)])
def test_leaves_of_any_shape(chip, bits, monkeypatch):
    """The compiler refuses slices that cut words or rows of lanes, of a leaf as of its
    scales: of vectors, of few rows, and where the first axis is that of columns."""
    monkeypatch.setattr(together, "PORTION", 2**15)
    shapes = [
        *[(70001,), (70656,), (1023, 131), (1056, 128), (352, 300)],
        *[(12, 64, 33, 7), (3, 256, 256), (6, 20, 1023)],
    ]
    weights = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shapes]
    optim = fq.accumulate(fq.lion(1e-3, backend="tpu"), 4, bits=bits)
    _compile(chip, optim, optim.step, weights, weights, are_whole_tiles=False)
