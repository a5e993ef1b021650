"""What is said of memory beforehand, against what is compiled."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

import flashquinox as fq
from flashquinox.__main__ import main
from flashquinox._memory import architectures, command
from flashquinox._memory.adapters import with_adapters

from ..helpers import slow
from ..kernels import compiling_for, tpu_devices


def _count(shapes) -> int:
    leaves = jtu.tree_leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return sum(map(math.prod, leaves))


#
# Architectures
#


# As their authors, or the checkpoints, say.
_PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}


def test_published_numbers_of_parameters():
    found = {name: _count(shapes) for name, shapes in architectures.PRESETS.items()}
    assert found == _PARAMETERS


def _config(kind, vocabulary, width, hidden, layers, heads, keys, **rest):
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    } | rest


_GPT2 = {
    "model_type": "gpt2",
    "n_layer": 12,
    "n_embd": 768,
    "n_head": 12,
    "n_ctx": 1024,
    "n_positions": 1024,
    "vocab_size": 50257,
}
_TIED = {"tie_word_embeddings": True}
_CONFIGS = {
    "gpt2": (_GPT2, 124_439_808),
    "Llama-3.1-8B": (
        _config("llama", 128256, 4096, 14336, 32, 32, 8),
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        _config("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, **_TIED),
        1_235_814_400,
    ),
    "Mistral-7B": (_config("mistral", 32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "Qwen2-0.5B": (
        _config("qwen2", 151936, 896, 4864, 24, 14, 2, **_TIED),
        494_032_768,
    ),
    "Qwen2-7B": (_config("qwen2", 152064, 3584, 18944, 28, 28, 4), 7_615_616_512),
    "Qwen3-0.6B": (
        _config("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128, **_TIED),
        596_049_920,
    ),
    "Phi-3-mini": (_config("phi3", 32064, 3072, 8192, 32, 32, 32), 3_821_079_552),
    "gemma-2b": (
        _config("gemma", 256000, 2048, 16384, 18, 8, 1, head_dim=256),
        2_506_172_416,
    ),
}


@pytest.mark.parametrize("name", _CONFIGS)
def test_configs_of_hugging_face(name):
    config, parameters = _CONFIGS[name]
    assert _count(architectures.from_config(config)) == parameters


def test_biases_of_a_config():
    config = _config("llama", 32, 8, 16, 3, 2, 1, attention_bias=True, mlp_bias=True)
    without = _config("llama", 32, 8, 16, 3, 2, 1)
    biases = 3 * ((8 + 4 + 4 + 8) + (16 + 16 + 8))
    found = _count(architectures.from_config(config))
    assert found == _count(architectures.from_config(without)) + biases


#
# Against the compiler
#


def _unrolled():
    """As GPT-2, with a head that has partial groups and, on 8 devices, no equal
    parts."""
    shapes: Any = architectures.gpt2(2, 256, vocabulary=512, positions=64)
    stacked = shapes.pop("blocks")
    # To have less to compile.
    for name in ("position", "norm.bias"):
        del shapes[name]
    names = ("query_key_value", "query_key_value.bias")
    take = lambda i: {name: stacked[name][1:] for name in names}
    return shapes | {"layers": [take(i) for i in range(2)], "head": (9, 17)}


def _stacked():
    shapes = architectures.llama(
        4, 256, hidden=512, heads=4, key_heads=2, vocabulary=1024
    )
    for name in ("key", "value", "out", "gate", "up", "down", "mlp_norm"):
        del shapes["blocks"][name]
    del shapes["head"], shapes["norm"]
    return shapes


_MODELS = {"unrolled": _unrolled, "stacked": _stacked}


def _model(name: str, dtype=jnp.bfloat16):
    return architectures.structs(_MODELS[name](), dtype)


def _cpu_mesh():
    return jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))


def _made(optim, model, devices: int, group_size: int = 32):
    """Arrays, where they would be in training."""
    # Not compiled.
    arrays = jtu.tree_map(lambda x: np.zeros(x.shape, x.dtype), model)
    if devices > 1:
        shardings = fq.fsdp_shardings(
            model, _cpu_mesh(), storage=fq.Storage(group_size=group_size)
        )
        arrays = jax.device_put(arrays, shardings)
    else:
        arrays = jtu.tree_map(jnp.asarray, arrays)
    return arrays, optim.init(arrays)


def _bytes_on_a_device(tree) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jtu.tree_leaves(tree))


# Where the program is not run, and takes what it takes.
_QUICKLY = {"xla_backend_optimization_level": 0}


def _argument_bytes(optim, model, state) -> int:
    """Of a compiled step."""
    step = jax.jit(optim.step, donate_argnums=(0, 1))
    compiled = step.lower(model, state, model).compile(_QUICKLY)
    return compiled.memory_analysis().argument_size_in_bytes


_OPTIMIZERS = {
    "adamw": lambda: fq.adamw(1e-3),
    "adamw, 32 bits, groups of 64": lambda: fq.adamw(
        1e-3, storage=fq.Storage(master_weight_bits=32, group_size=64)
    ),
    "lion, no correction": lambda: fq.lion(
        1e-3, storage=fq.Storage(master_weight_bits=None)
    ),
    "sgd": lambda: fq.sgd(1e-3),
    "sgdw, learned": lambda: fq.sgdw(
        1e-3, momentum=0.9, storage=fq.Storage(moments="learned")
    ),
}


@pytest.mark.product
@pytest.mark.parametrize(
    "optimizer, name, devices",
    [
        ("adamw", "unrolled", 1),
        ("adamw, 32 bits, groups of 64", "stacked", 8),
        ("lion, no correction", "stacked", 1),
        ("sgd", "unrolled", 8),
        ("sgdw, learned", "stacked", 8),
        slow("adamw", "stacked", 8),
        slow("lion, no correction", "unrolled", 8),
    ],
)
def test_is_what_a_compiled_step_takes(optimizer, name, devices):
    optim, model = _OPTIMIZERS[optimizer](), _model(name)
    plan = fq.memory_plan(model, optim, devices)
    group_size = 64 if "64" in optimizer else 32
    arrays, state = _made(optim, model, devices, group_size)
    assert plan.step.total == _bytes_on_a_device((arrays, state, arrays))
    found = _argument_bytes(optim, arrays, state)
    assert plan.step.total == pytest.approx(found, rel=0.01)
    assert plan.devices == devices
    assert plan.parameters == sum(x.size for x in jtu.tree_leaves(arrays))


_OTHERS = {
    "flashoptim": lambda: fq.adamw(1e-3, storage=fq.Storage(moments="flashoptim")),
    "log and flashquinox": lambda: fq.lion(
        1e-3, storage=fq.Storage(moments=("log", "flashquinox")), backend="tpu"
    ),
    "float32": lambda: fq.adam(1e-3, storage=fq.Storage(moments="float32")),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), fq.adamw(1e-3)),
    "MultiSteps": lambda: optax.MultiSteps(fq.adamw(1e-3), 2),
    "accumulate": lambda: fq.accumulate(fq.adamw(1e-3), 2),
    "accumulate, 16 bits": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), fq.accumulate(fq.lion(1e-3), 2, bits=16)
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        fq.adamw, hyperparam_dtype=jnp.float32
    )(learning_rate=1e-3),
}


@pytest.mark.product
@pytest.mark.filterwarnings("ignore:.*hold no whole groups")
@pytest.mark.parametrize(
    "name, devices",
    [
        slow(name, devices, unless=devices == quick)
        for name, quick in {
            "flashoptim": 8,
            "log and flashquinox": 8,
            "float32": 1,
            "chain": 1,
            "MultiSteps": 8,
            "accumulate": 8,
            "accumulate, 16 bits": 1,
            "inject_hyperparams": 1,
        }.items()
        for devices in (1, 8)
    ],
)
def test_is_what_init_makes(name, devices):
    """Of what is not compiled here, the bytes of the arrays."""
    optim = _OTHERS[name]()
    for name, dtype in (("unrolled", jnp.float16), ("stacked", jnp.bfloat16)):
        model = _model(name, dtype)
        plan = fq.memory_plan(model, optim, devices)
        found = _bytes_on_a_device(_made(optim, model, devices))
        assert plan.step.at_rest == pytest.approx(found, rel=1e-4)


@pytest.mark.once
def test_is_what_a_step_on_tpus_takes():
    chips = tpu_devices("v5e:2x2")
    mesh = Mesh(np.asarray(chips), ("fsdp",))
    shapes = architectures.llama(
        8, 512, hidden=2048, heads=4, key_heads=2, vocabulary=8192, tied_head=True
    )
    # To have less to compile; vectors are less than what the sum is known to.
    del shapes["norm"]
    shapes["blocks"] = {"down": shapes["blocks"]["down"]}
    model = architectures.structs(shapes, jnp.bfloat16)
    shardings = fq.fsdp_shardings(model, mesh, blocks=architectures.blocks)
    optim = fq.lion(1e-3, backend="tpu", shardings=shardings)
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    params = jtu.tree_map(put, model, shardings)
    initial = jax.jit(optim.init).lower(params).compile()
    state = jax.eval_shape(optim.init, params)
    state = jtu.tree_map(put, state, initial.output_shardings)
    with compiling_for(chips[0].device_kind, "tpu", chips[0].num_cores):
        found = _argument_bytes(optim, params, state)
    plan = fq.memory_plan(model, optim, blocks=architectures.blocks)
    assert plan.devices == 4
    assert plan.step.total == pytest.approx(found, rel=0.01)


def _released(layers, width):
    """A model of layers with its loss, and the memory of a step with gradient release
    and of an ordinary one."""
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    model = {"token": shape(64, width), "head": shape(64, width)}
    model["blocks"] = shape(layers, width, width)
    loss = fq.LayeredLoss(
        blocks=lambda model: model["blocks"],
        prologue=lambda model, batch, key: model["token"][batch],
        block=lambda block, x, batch, key: jnp.tanh(x @ block),
        epilogue=lambda model, x, batch, key: jnp.mean(
            (x @ model["head"].T).astype(jnp.float32)
        ),
    )
    optim = fq.lion(1e-3)

    def release(model, state, batch):
        return fq.release_step(optim, loss, model, state, batch)

    def ordinary(model, state, batch):
        grads = jax.grad(loss)(model, batch)
        return optim.step(model, state, grads)

    batch = jax.ShapeDtypeStruct((4,), jnp.int32)
    state = eqx.filter_eval_shape(optim.init, model)
    steps = [
        jax.jit(step, donate_argnums=(0, 1))
        .lower(model, state, batch)
        .compile(_QUICKLY)
        .memory_analysis()
        for step in (release, ordinary)
    ]
    return model, loss, steps


@pytest.mark.once
def test_is_what_a_step_with_gradient_release_takes():
    """To 1% of what there is at rest; the gradients are what is needed at least, beside
    temporaries of plain XLA."""
    layers, width = 8, 256
    model, loss, (found, otherwise) = _released(layers, width)
    plan = fq.memory_plan(
        model,
        fq.lion(1e-3),
        blocks=loss.blocks,
        prologue=lambda model: model["token"],
        epilogue=lambda model: model["head"],
    )
    planned, layer = plan.gradient_release, 2 * width**2
    assert planned.gradients == layer
    assert planned.at_rest == pytest.approx(found.argument_size_in_bytes, rel=0.01)
    both = found.argument_size_in_bytes + found.temp_size_in_bytes
    assert planned.total is not None and planned.total <= both
    # For each layer more, an ordinary step has a gradient that this one has not.
    _, _, deeper = _released(2 * layers, width)
    of_release, of_ordinary = (
        more.temp_size_in_bytes - less.temp_size_in_bytes
        for more, less in zip(deeper, (found, otherwise), strict=True)
    )
    assert of_ordinary - of_release >= layers * layer


def test_mixed_precision_is_that_of_optax():
    model = _model("stacked")
    optim = optax.adamw(1e-3)
    masters = jtu.tree_map(lambda x: jnp.zeros(x.shape, jnp.float32), model)
    narrow = jtu.tree_map(lambda x: x.astype(jnp.bfloat16), masters)

    def step(weights, masters, state, grads):
        del weights
        wide = jtu.tree_map(lambda x: x.astype(jnp.float32), grads)
        updates, state = optim.update(wide, state, masters)
        masters = optax.apply_updates(masters, updates)
        return jtu.tree_map(lambda x: x.astype(jnp.bfloat16), masters), masters, state

    # The old weights are where the new ones will be.
    jitted = jax.jit(step, donate_argnums=(0, 1, 2), keep_unused=True)
    # Optax promotes.
    with jax.numpy_dtype_promotion("standard"):
        lowered = jitted.lower(narrow, masters, optim.init(masters), narrow)
    compiled = lowered.compile(_QUICKLY)
    found = compiled.memory_analysis().argument_size_in_bytes
    mixed = fq.memory_plan(model, fq.adamw(1e-3)).mixed_precision
    assert mixed.total == pytest.approx(found, rel=0.01)
    assert mixed.bytes_per_parameter == pytest.approx(16, rel=1e-4)
    assert mixed.at_rest / mixed.parameters == pytest.approx(14, rel=1e-4)


#
# Details
#


def test_categories():
    model = {
        "matrix": jax.ShapeDtypeStruct((64, 40), jnp.bfloat16),
        "bias": jax.ShapeDtypeStruct((10,), jnp.bfloat16),
        "wide": jax.ShapeDtypeStruct((5,), jnp.float32),
        "table": np.zeros(7, np.int32),
        "function": jax.nn.gelu,
    }
    step = fq.memory_plan(model, fq.adamw(1e-3)).step
    assert step.parameters == 2575
    assert step.weights == step.gradients == 2 * 2570 + 4 * 5
    assert step.corrections == 2570
    assert step.moments == 2 * (2560 + 4 * 10 + 4 * 5)
    # Groups along both axes.
    assert step.scales == 2 * 2 * 80
    assert step.frozen == 4 * 7 and step.other == 4
    mixed = fq.memory_plan(model, fq.adamw(1e-3)).mixed_precision
    assert mixed.master_weights == 4 * 2570 and mixed.moments == 8 * 2575
    assert mixed.corrections == mixed.scales == 0


def test_trainable_parts():
    struct = jax.ShapeDtypeStruct
    model = {
        "codes": struct((64, 128), jnp.uint4),
        "scale": struct((64, 2), jnp.bfloat16),
        "down": struct((8, 128), jnp.bfloat16),
        "norm": [struct((3,), jnp.float32)],
    }
    spec = {"codes": False, "scale": False, "down": True, "norm": False}
    step = fq.memory_plan(model, fq.adamw(1e-3), trainable=spec).step
    assert step.parameters == 8 * 128
    assert step.weights == step.gradients == 2 * 8 * 128
    assert step.corrections == 8 * 128
    # Two codes share a byte, as in the arguments of a compiled program.
    assert step.frozen == 64 * 128 // 2 + 2 * 64 * 2 + 4 * 3
    compiled = jax.jit(lambda x: x).lower(model["codes"]).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 64 * 128 // 2
    # The same as of the part alone, and what is frozen.
    part = fq.memory_plan({"down": model["down"]}, fq.adamw(1e-3)).step
    assert dataclasses.replace(step, frozen=0) == part
    text = str(fq.memory_plan(model, fq.adamw(1e-3), trainable=spec))
    assert "frozen" in text and "bytes per trained parameter" in text
    with pytest.raises(ValueError, match="looks like a scale"):
        fq.memory_plan(model, fq.adamw(1e-3))
    with pytest.raises(TypeError, match=r"True and False .* got 'yes' for `.*codes"):
        fq.memory_plan(model, fq.adamw(1e-3), trainable=spec | {"codes": "yes"})
    with pytest.raises(ValueError, match="`trainable` has nothing at"):
        fq.memory_plan(model, fq.adamw(1e-3), trainable={"down": True})


@pytest.mark.parametrize("devices", [1, 8])
def test_sums_and_averages(devices):
    """3 bytes each, beside 4 in float32; divided like the weights."""
    shape = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    model, elements = {"w": shape, "v": shape}, 2 * 512 * 512 // devices
    plain = fq.memory_plan(model, fq.adamw(1e-3), devices)
    for optim, size in (
        (fq.accumulate(fq.adamw(1e-3), 2), 3),
        (fq.accumulate(fq.adamw(1e-3), 2, bits=16), 2.0625),
        (optax.MultiSteps(fq.adamw(1e-3), 2), 4),
    ):
        plan = fq.memory_plan(model, optim, devices)
        assert plan.step.accumulators == size * elements
        assert plan.mixed_precision.accumulators == 4 * elements
        # Counts.
        rest = plan.step.at_rest - size * elements
        assert plain.step.at_rest <= rest <= plain.step.at_rest + 16
        assert plan.gradient_release.gradients is None
        assert "not with sums of gradients" in str(plan)
    plan = fq.memory_plan(model, fq.adamw(1e-3), devices, ema=fq.ema(0.999))
    assert plan.step.averages == 3 * elements
    assert plan.mixed_precision.averages == 4 * elements
    assert plan.step.at_rest == plain.step.at_rest + 3 * elements + 8


def test_wrappers_of_a_whole_model():
    """Its functions and numbers are nothing for Optax."""
    model = eqx.nn.MLP(64, 8, 64, 1, key=jax.random.key(0))
    for optim in (
        optax.MultiSteps(fq.adamw(1e-3), 2),
        optax.chain(optax.trace(0.9), fq.adamw(1e-3)),
    ):
        arrays = eqx.filter(model, eqx.is_array)
        assert fq.memory_plan(model, optim) == fq.memory_plan(arrays, optim)


def test_adapters_of_a_preset():
    """What `--lora` and `--base` add, counted by hand: Llama's layers have 7 matrices,
    (out, in)."""
    shapes = architectures.PRESETS["llama-3.2-1b"]
    matrices = [x[1:] for x in shapes["blocks"].values() if len(x) == 3]
    assert len(matrices) == 7
    model = architectures.structs(shapes, jnp.bfloat16)
    before = fq.memory_plan(model, fq.adamw(1e-3))
    elements = 16 * sum(out * into for out, into in matrices)
    for base, expected in {
        None: 2 * elements,
        "int8": elements + 2 * 16 * sum(out for out, _ in matrices),
        "fp8": elements + 2 * 16 * sum(out for out, _ in matrices),
        "int4": elements // 2 + 2 * elements // 128,
        "nf4": elements // 2 + 2 * elements // 64,
    }.items():
        adapted, trainable = with_adapters(model, 4, base)
        plan = fq.memory_plan(adapted, fq.adamw(1e-3), trainable=trainable)
        assert plan.parameters == 16 * 4 * sum(out + into for out, into in matrices)
        others = before.step.weights - 2 * elements
        assert plan.step.frozen == expected + others


def test_where_weights_are():
    """What arrays and the optimizer say goes before the default."""
    mesh = _cpu_mesh()
    struct = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    optim = fq.adamw(1e-3)
    whole = NamedSharding(mesh, P())
    for placed in (
        jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=whole),
        jax.device_put(jnp.zeros(struct.shape, struct.dtype), whole),
    ):
        for where in (None, 8, mesh):
            plan = fq.memory_plan({"x": placed, "y": struct}, optim, where)
            parts = 1 if where is None else 8
            assert plan.step.weights == struct.size * 2 + struct.size * 2 // parts
            assert plan.devices == 8 and plan.whole >= struct.size * 2
    given = fq.adamw(1e-3, shardings=NamedSharding(mesh, P("fsdp")))
    plan = fq.memory_plan({"x": struct}, given)
    assert plan.step.weights == struct.size * 2 // 8
    assert plan.step.moments == struct.size * 2 // 8
    assert fq.memory_plan({"x": struct}, optim).devices == 1


def test_fsdp_shardings():
    mesh = AbstractMesh((4, 2), ("a", "b"))
    shapes = {
        "longest": (512, 1024),
        "whole groups": (512, 1032),
        "no whole groups": (9, 40),
        "odd": (9, 17),
        "vector": (256,),
        "short vector": (40,),
        "scalar": (),
        "empty": (0, 256),
    }
    model = {k: jax.ShapeDtypeStruct(s, jnp.bfloat16) for k, s in shapes.items()}
    model["stack"] = {"norm": jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)}
    model["function"] = jax.nn.gelu
    find = lambda **kwargs: fq.fsdp_shardings(model, mesh, **kwargs)
    shardings = find(blocks=lambda model: model["stack"])
    assert shardings["function"] is None
    both = ("a", "b")
    specs = {k: x.spec for k, x in shardings.items() if k in shapes}
    assert specs == {
        "longest": P(None, both),
        "whole groups": P(both, None),
        "no whole groups": P(None, both),
        "odd": P(None, None),
        "vector": P(both),
        "short vector": P(None),
        "scalar": P(),
        "empty": P(None, None),
    }
    assert shardings["stack"]["norm"].spec == P(None, both)
    assert find()["stack"]["norm"].spec == P(both, None)
    assert find(storage=fq.Storage(group_size=128))["longest"].spec == P(None, both)
    assert find(storage=fq.Storage(group_size=128))["whole groups"].spec == P(
        None, both
    )


@pytest.mark.parametrize("make", [fq.lamb, fq.adafactor])
def test_leaves_of_whole_leaf_rules_wait_for_all_layers(make):
    model = {"blocks": jnp.zeros((4, 64, 64), jnp.bfloat16), "head": jnp.zeros((64, 8))}
    plan = lambda optim: fq.memory_plan(model, optim, blocks=lambda m: m["blocks"])
    held = plan(make(1e-3)).gradient_release.gradients
    # All of the blocks, and what the prologue may read.
    assert held == 4 * 64 * 64 * 2 + 4 * 64 * 8
    # Not those whose layers are apart, as matrices of Muon are.
    axes = optax.contrib.MuonDimensionNumbers(1, 2)
    numbers = {"blocks": axes, "head": None}
    for other in (fq.muon(1e-3, weight_dimension_numbers=numbers), fq.lion(1e-3)):
        assert plan(other).gradient_release.gradients == 64 * 64 * 2 + 4 * 64 * 8


def test_gradient_release():
    sizes = {"token": 100, "position": 20, "norm": 3, "head": 70}
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    model: Any = {name: struct(n) for name, n in sizes.items()}
    model["blocks"] = {"a": struct(4, 30), "b": struct(4, 5)}
    optim = fq.adamw(1e-3)
    blocks = lambda model: model["blocks"]
    before = lambda model: (model["token"], model["position"])
    after = lambda model: (model["norm"], model["head"])
    tied = lambda model: (model["norm"], model["token"])

    def found(**parts):
        return fq.memory_plan(model, optim, **parts).gradient_release.gradients

    assert found() is None
    assert found(blocks=blocks, prologue=before, epilogue=after) == 2 * (100 + 20)
    # The head is read by neither, and updated before the blocks.
    assert found(blocks=blocks, prologue=before, epilogue=tied) == 2 * (100 + 3 + 70)
    assert found(blocks=blocks) == 2 * (193 + 35)
    model["blocks"] = {"a": struct(4, 300), "b": struct(4, 5)}
    assert found(blocks=blocks, prologue=before, epilogue=after) == 2 * 305
    assert found(blocks=blocks, prologue=before, epilogue=tied) == 2 * (305 + 100)
    plan = fq.memory_plan(model, optim, blocks=blocks)
    assert plan.gradient_release.at_rest == plan.step.at_rest


def test_table():
    preset = architectures.structs(architectures.PRESETS["gpt2-124m"], jnp.bfloat16)
    text = str(fq.memory_plan(preset, fq.adamw(1e-3), 7))
    assert "no blocks" in text and "Gradient release: not known" in text
    assert "are whole on every device" in text and "98.000 bytes" in text
    plan = fq.memory_plan(preset, fq.adamw(1e-3))
    table = plan.table(int(1.5e9)).partition("\n\n")[0]
    last = table.splitlines()[-1].split("  ")
    assert last[0] == "of 1.500 GB" and last[-1] == "0.491 GB too much"
    assert "0.613 GB left" in table


def test_nothing_is_allocated():
    before = len(jax.live_arrays())
    preset = architectures.structs(
        architectures.PRESETS["llama-3.1-405b"], jnp.bfloat16
    )
    plan = fq.memory_plan(preset, fq.adamw(1e-3), 512)
    assert plan.step.bytes_per_parameter == pytest.approx(7.125, rel=1e-3)
    assert len(jax.live_arrays()) <= before


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_that_is_set(kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    model, optim = _model("stacked"), fq.adamw(1e-3)
    for where in (None, 8, mesh):
        expected = fq.memory_plan(model, optim, where)
        with jax.set_mesh(mesh):
            assert fq.memory_plan(model, optim, where) == expected


def test_modules():
    make = lambda key: fq.cast(eqx.nn.MLP(64, 10, 256, 1, key=key), jnp.bfloat16)
    key = jax.random.key(0)
    optim = fq.adamw(1e-3)
    plan = fq.memory_plan(eqx.filter_eval_shape(make, key), optim)
    assert plan == fq.memory_plan(make(key), optim)


_STRUCT = jax.ShapeDtypeStruct((4, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (({"x": _STRUCT}, optax.adam(1e-3)), TypeError, "no `flashquinox.Opt"),
        (({"x": _STRUCT}, fq.adamw(1e-3), 0), TypeError, "a number of devices from 1"),
        (({"x": _STRUCT}, fq.adamw(1e-3), True), TypeError, "got True"),
        (({"x": _STRUCT}, fq.adamw(1e-3), 2**31), TypeError, "to 2147483647; got 2147"),
        (
            (
                {
                    "x": jax.ShapeDtypeStruct(
                        (64,),
                        jnp.bfloat16,
                        sharding=NamedSharding(AbstractMesh((4,), ("a",)), P("a")),
                    )
                },
                fq.adamw(1e-3),
                8,
            ),
            ValueError,
            r"at `\['x'\]` is on the mesh \(a=4\), not on \(fsdp=8\)",
        ),
        (
            (
                {"x": jax.ShapeDtypeStruct((6, 64), jnp.bfloat16)},
                fq.adamw(
                    1e-3, shardings=NamedSharding(AbstractMesh((4,), ("a",)), P("a"))
                ),
            ),
            ValueError,
            r"at `\['x'\]`, of shape \(6, 64\), cannot be sharded",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fq.memory_plan(*arguments)


@pytest.mark.usefixtures("without_typechecker")
def test_no_optimizer():
    model: Any = {"x": _STRUCT}
    for optim in (None, model, fq.adamw):
        with pytest.raises(TypeError, match="`memory_plan`: `optim` is no optimizer"):
            fq.memory_plan(model, optim)


@pytest.mark.parametrize(
    "blocks, message",
    [
        (lambda model: [], "has no leaves"),
        (lambda model: 3, "has 3 at .*, which is no part of it"),
        (lambda model: model, r"`\['scalar'\]` has shape \(\)"),
        (lambda model: (model["x"], model["y"]), r"`\['y'\]` has shape \(5, 64\)"),
    ],
)
def test_wrong_blocks(blocks, message):
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    model = {"scalar": struct(), "x": struct(4, 64), "y": struct(5, 64)}
    with pytest.raises(ValueError, match=message):
        fq.memory_plan(model, fq.adamw(1e-3), blocks=blocks)


#
# On the command line
#


_DOCS = Path(__file__).parents[2] / "docs" / "memory.md"


def test_plan(capsys, tmp_path, monkeypatch):
    """As the documentation has it."""
    monkeypatch.chdir(tmp_path)
    picture = Path("memory-plan.png")
    command = "plan --model llama-3.1-8b --devices 8 --optimizer adamw".split()
    main([*command, "--device-memory=16GB", f"--plot={picture}"])
    output, errors = capsys.readouterr()
    assert errors == ""
    for figure in ("8,030,261,248 parameters", "7.152 GB", "5.276 GB", "16.061 GB"):
        assert figure in output
    # The sources of a release have none.
    if _DOCS.exists():
        assert f'```text title="Output"\n{output}```\n' in _DOCS.read_text(
            encoding="utf-8"
        )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_as_json(capsys):
    main(["plan", "--params=7e9", "--optimizer=sgd", "--momentum=0.9", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 7_000_000_000 and found["devices"] == 1
    step = found["on_each_device"]["flashquinox"]
    assert step["bytes_per_parameter"] == pytest.approx(6.0625, rel=1e-6)
    assert found["on_each_device"]["gradient_release"]["total"] is None
    assert found["on_each_device"]["mixed_precision"]["moments"] == 28_000_000_000


def test_plan_of_a_checkpoint(capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(_GPT2))
    main(["plan", f"--config={file}", "--moments=flashoptim", "--devices=8"])
    output, errors = capsys.readouterr()
    assert "124,439,808 parameters" in output and errors == ""
    assert "every step gathers them" in output
    main(["plan", f"--config={file}", "--dtype=float32", "--optimizer=lion"])
    assert "8.000 bytes per parameter" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["--help", "plan --help"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main(command.split())
    assert exit.value.code == 0
    assert "--model llama-3.1-8b --devices 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ("", "arguments are required: command"),
        ("draw", "invalid choice: 'draw'"),
        ("plan", "one of the arguments --model --params --config is required"),
        ("plan --model=gpt-5", "takes one of gpt2-124m, "),
        ("plan --model=gpt2-124m --params=1", "not allowed with"),
        ("plan --params=many", "takes 7e9 or 7B, say; got 'many'"),
        ("plan --params=0.5", "takes 7e9 or 7B, say; got '0.5'"),
        ("plan --params=1e400", "takes 7e9 or 7B, say; got '1e400'"),
        (
            "plan --params=7B --devices=0",
            "takes a whole number from 1 to 2147483647; got '0'",
        ),
        (
            "plan --params=7B --devices=two",
            "takes a whole number from 1 to 2147483647; got 'two'",
        ),
        ("plan --params=7B --optimizer=adagrad", "invalid choice: 'adagrad'"),
        ("plan --params=7B --accumulate=8", "invalid choice: 8"),
        ("plan --model=gpt2-124m --lora=0", "--lora: takes a whole number from 1"),
        ("plan --model=gpt2-124m --lora=8 --base=int2", "invalid choice: 'int2'"),
        ("plan --model=gpt2-124m --base=int8", "--base: only with --lora"),
        ("plan --params=7B --lora=8", "--lora: needs a model with layers"),
        ("plan --params=7B --momentum=0.9", "--momentum: only of sgd and sgdw"),
        (
            "plan --params=7B --optimizer=sgd --momentum=2",
            "`sgd(momentum=...)` must be at least 0 and less than 1",
        ),
        ("plan --params=7B --dtype=int8", "invalid choice: 'int8'"),
        ("plan --params=7B --master-weight-bits=16", "takes 24, 32 or none; got '16'"),
        (
            "plan --params=7B --dtype=float32 --master-weight-bits=24",
            "`Storage(master_weight_bits=24)` has no effect",
        ),
        ("plan --params=7B --moments=int4", "takes one of flashquinox, flashoptim"),
        ("plan --params=7B --moments=log,log,log", "or two with a comma"),
        ("plan --params=7B --group-size=7", "must be a multiple of 16 from 16 to 128"),
        ("plan --params=7B --device-memory=80GX", "takes 80GB or 16GiB, say"),
        ("plan --params=7B --plot=plan.txt", "a file that ends in .png, .pdf or .svg"),
        ("plan --params=7B --plot=nowhere/plan.png", "there is no directory nowhere"),
        ("plan --params=7B --plot=folder.png", "--plot: folder.png: Is a directory"),
        ("plan --params=7B --colour", "unrecognized arguments: --colour"),
        ("plan --params=7B --devices=3000000000", "--devices: takes a whole number"),
        (f"plan --params=7B --devices={'9' * 5000}", "--devices: takes a whole number"),
        ("plan --params=7B --device-memory=80", "takes 80GB or 16GiB, say; got '80'"),
        ("plan --config=", "--config: takes a file or a directory; got ''"),
        (
            "plan --config=deep.json",
            "--config: deep.json: its lists are nested",
        ),
        (
            "plan --config=names.json",
            "--config: names.json: 'model_type' must be a name; got ['llama']",
        ),
        ("plan --config=nothing.json", "nothing.json: No such file"),
        ("plan --config=folder", "--config: folder: there is no config.json in this"),
        ("plan --config=broken.json", "broken.json: Expecting value"),
        ("plan --config=list.json", "there is no 'model_type'"),
        ("plan --config=other.json", "the shapes of a 'mixtral' are not known"),
        ("plan --config=short.json", "there is no 'hidden_size', which a 'llama'"),
        ("plan --config=large.json", "'n_embd' must be a whole number from 1 to"),
        ("plan --config=odd.json", "'n_layer' must be a whole number from 1"),
        ("plan --config=flag.json", "'tie_word_embeddings' must be true or false"),
    ],
)
def test_wrong_command(capsys, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder").mkdir()
    for name, text in {
        "broken": "model",
        "list": "[]",
        "deep": "[" * 100_000,
        "names": json.dumps({"model_type": ["llama"]}),
        "other": json.dumps({"model_type": "mixtral"}),
        "short": json.dumps({"model_type": "llama"}),
        "large": json.dumps(_GPT2 | {"n_embd": 10**400}),
        "odd": json.dumps(_GPT2 | {"n_layer": "12"}),
        "flag": json.dumps(_GPT2 | {"tie_word_embeddings": "no"}),
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(arguments.split())
    output, errors = capsys.readouterr()
    assert exit.value.code == 2
    assert complaint in errors
    assert errors.count("\n") == 1 and errors.startswith("python -m flashquinox")
    assert output == ""


def test_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        main(["plan", "--params=7B", "--plot=plan.png"])
    assert exit.value.code == 2
    assert 'pip install "flashquinox[plot]"' in capsys.readouterr().err


def _fails(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_interrupted(capsys, monkeypatch):

    monkeypatch.setattr(command, "memory_plan", _fails(KeyboardInterrupt))
    with pytest.raises(SystemExit) as exit:
        main(["plan", "--params=7B"])
    assert exit.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.once
def test_as_a_command():
    """Takes no accelerator; and ends in silence when nobody reads on."""
    environment = {k: x for k, x in os.environ.items() if k != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "flashquinox", "plan", "--params=7B"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()
    script = """
import sys, jax
from flashquinox.__main__ import main
try:
    main(["plan", "--params=7B"])
finally:
    print(jax.config.jax_platforms, file=sys.stderr)
"""
    shell = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-c", script]
    done = subprocess.run(
        shell, env=environment, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert done.returncode == 1
    closed = "python -m flashquinox: error: the output is closed"
    assert done.stderr.splitlines() == [closed, "cpu"]
