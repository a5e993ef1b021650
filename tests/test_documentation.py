"""What the documentation shows is executed: the programs of a page one after the other,
as a reader would. What they print is compared with what the page shows."""

import importlib.util
import inspect
import json
import re
import typing
from pathlib import Path

import jax
import pytest

import flashquinox as fq
from flashquinox._optimizer.catalog import OPTIMIZERS

from .helpers import have_what_haliax_needs, slow


_ROOT = Path(__file__).parents[1]
_COMMAND = re.compile(r"python ((?:benchmarks|examples)/[\w/]+\.py)([^`\n#]*)")


def _script(name: str):
    path = _ROOT / "docs" / "_scripts" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


_pages = _script("pages")


def _programs(page: str):
    return _pages.programs((_ROOT / page).read_text())


_PAGES = list(_pages.pages())
# What is counted is the same everywhere.
_EXACT = ("docs/memory.md", "docs/tutorials/will-it-fit.md")

# What a page takes for granted, before the program of this number.
_BEFORE = {
    ("docs/api/codecs.md", 0): "import flashquinox as fq",
    (
        "docs/checkpoints.md",
        2,
    ): "train_step = lambda model, state: (model, advance(state))",
    ("docs/equinox.md", 0): """
import equinox as eqx
import flashquinox as fq
import jax
import jax.numpy as jnp

model = fq.cast(eqx.nn.MLP(64, 10, 64, 1, key=jax.random.key(0)), jnp.bfloat16)


def loss_fn(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


batch = jnp.ones((4, 64), jnp.bfloat16), jnp.ones((4, 10), jnp.bfloat16)
""",
    (
        "docs/equinox.md",
        1,
    ): "model, opt_state, _ = train_step(model, opt_state, *batch)",
    ("docs/equinox.md", 2): """
model, opt_state, _ = train_step(batch, model, opt_state)

import haliax as hax

Position, Embed, Mlp = hax.make_axes(position=4, embed=32, mlp=64)
keys = jax.random.split(jax.random.key(0))
model = {
    "norm": hax.nn.LayerNorm.init(Embed),
    "block": {"up": hax.nn.Linear.init(Embed, Mlp, key=keys[0])},
    "head": hax.nn.Linear.init(Mlp, Embed.alias("out"), key=keys[1]),
}


def loss_fn(model, batch, key):
    del key
    x = model["block"]["up"](model["norm"](batch))
    return hax.mean(model["head"](x).astype(jnp.float32)).array


batch = hax.ones((Position, Embed))
""",
    ("docs/sharding.md", 0): """
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

model = eqx.nn.MLP(64, 64, 64, 1, key=jr.key(0))


def loss_fn(model, batch):
    return jnp.mean(jax.vmap(model)(batch) ** 2)
""",
    ("docs/sharding.md", 1): """
model, state, _ = train_step(jnp.ones((8, 64)), model, state)
replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
""",
    ("docs/sharding.md", 3): """
state = optim.init(eqx.nn.MLP(64, 64, 64, 1, key=jr.key(0)))
model = eqx.nn.MLP(64, 64, 64, 1, key=jr.key(0))
other = optim.init(eqx.filter_shard(model, replicated))
""",
}
# What a page leaves to its readers, after its last program.
_AFTER = {
    "docs/equinox.md": "train_step(model, state, batch, jax.random.key(0))",
    "docs/sharding.md": "assert jax.tree.structure(moved) == jax.tree.structure(other)",
}
# For a machine with PyTorch and a checkpoint of FlashOptim; and with Haliax, which does
# not import beside every version of JAX.
_ONLY_COMPILED = {("docs/exchange.md", number) for number in (6, 7)}
_WITH_HALIAX = ("docs/equinox.md", 2)
# Nothing that other tests do not do, and many programs to compile. (`.ci/run package`
# runs the README.)
_SLOW = (
    "README.md",
    "docs/checkpoints.md",
    "docs/exchange.md",
    "docs/flax.md",
    "docs/how-to/accumulation.md",
    "docs/how-to/averaging.md",
    "docs/how-to/clipping.md",
    "docs/how-to/freezing.md",
    "docs/how-to/learning-rate.md",
    "docs/how-to/lora.md",
    "docs/how-to/offload.md",
    "docs/how-to/resetting.md",
    "docs/how-to/resuming.md",
    "docs/optax.md",
    "docs/release.md",
    "docs/tutorials/cnn.md",
    "docs/tutorials/finetuning.md",
    "docs/tutorials/gpt.md",
    "docs/tutorials/optax-in-five-changes.md",
    "docs/tutorials/own-optimizer.md",
)


def test_reference_has_every_optimizer():
    page = (_ROOT / "docs/api/optimizers.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: flashquinox\.(\w+)$", page, re.MULTILINE))
    made = {
        name
        for name, value in vars(fq).items()
        if inspect.isfunction(value)
        and typing.get_type_hints(value).get("return") is fq.Optimizer
    }
    assert made == {*OPTIMIZERS, "add_updates", "optimizer"} and made <= documented


def test_figures_of_the_faq_are_those_of_the_results():
    page = (_ROOT / "docs/faq.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+ \| [^|]+) \|", page, re.MULTILINE))
    rate = lambda x: f"{x['parameters'] / x['median'] / 1e9:.3g} Gparam/s"
    for title, model, figure in (
        ("the step alone, ResNet-50", "resnet50", rate),
        ("the step alone, GPT-2 124M", "gpt2", rate),
        (
            "the step alone, a Llama of 1.2 billion parameters, stacked",
            "llama-stacked",
            rate,
        ),
        (
            "the step alone, an MLP of 135 thousand parameters, in a compiled loop",
            "mlp",
            lambda x: f"{1e6 * x['median']:.1f} µs",
        ),
        (
            "the same, one call from Python for each step",
            "mlp",
            lambda x: f"{1e6 * x['call']['median']:.0f} µs",
        ),
    ):
        assert rows[title] == " | ".join(map(figure, _of_zoo(model)))
    cpu = _result("step-cpu")["rows"]
    times = [cpu[x]["step_ms"] for x in ("flashquinox", "optax float32")]
    title = "the step alone, 14 million parameters in 20 matrices"
    assert rows[title] == " | ".join(f"{x:.2g} ms" for x in times)
    compiled = re.sub(r"\s+", " ", page.partition("The first step compiles.")[2])
    for key in ("trace and lower seconds", "compile seconds"):
        for x in _of_zoo("gpt2"):
            assert f" {x[key]:.2g}" in compiled


def _of_zoo(model: str):
    """The rows of this library and of Optax."""
    found = _result("zoo-h200-1")["rows"]
    rows = {x["contender"]: x for x in found if x["model"] == model}
    return rows["adamw"], rows["optax"]


def _result(name: str):
    return json.loads((_ROOT / "benchmarks/results" / f"{name}.json").read_text())


def test_commands_and_files_that_pages_name_exist():
    """Not run: many take hours of a GPU."""
    texts = {x: x.read_text(encoding="utf-8") for x in (_ROOT / "docs").rglob("*.md")}
    texts |= {x: x.read_text(encoding="utf-8") for x in _ROOT.glob("*.md")}
    # Old versions had other files.
    del texts[_ROOT / "CHANGELOG.md"]
    sources = {
        folder: "".join(x.read_text(encoding="utf-8") for x in folder.rglob("*.py"))
        for folder in (_ROOT / "benchmarks", _ROOT / "examples")
    }
    found = 0
    for page, text in texts.items():
        for path in re.findall(r"`((?:benchmarks|examples)/[\w/.-]+)`", text):
            assert (_ROOT / path).exists(), (page.name, path)
        for path, arguments in _COMMAND.findall(text):
            assert (_ROOT / path).is_file(), (page.name, path)
            source = sources[_ROOT / path.partition("/")[0]]
            for option in re.findall(r"--([\w-]+)", arguments):
                declared = any(f'"{x}{option}"' in source for x in ("--", ""))
                assert declared, (page.name, path, option)
            found += 1
    assert found > 40


@pytest.mark.parametrize("section", ["tutorials", "how-to"])
def test_index_names_every_page_of_its_section(section):
    titles = {"tutorials": "Tutorials", "how-to": "How-to"}
    text = (_ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = re.search(rf"\n  - {titles[section]}:\n((?:   .*\n)+)", text)
    index = _ROOT / "docs" / section / "index.md"
    links = re.findall(r"\]\(([\w./-]+\.md)", index.read_text(encoding="utf-8"))
    named = {(index.parent / x).resolve() for x in links}
    pages = {_ROOT / "docs" / x for x in re.findall(r"[\w/-]+\.md", nav[1])}
    assert len(pages) > 5 and pages - {index} <= named


def test_first_page_is_that_of_the_repository():
    (shown,) = _programs("docs/index.md")
    assert _programs("README.md")[0].source.startswith(shown.source)


@pytest.mark.parametrize(
    "page",
    [
        slow(page, unless=page not in _SLOW)
        for page in _PAGES
        if page != "docs/index.md"
    ],
)
def test_programs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "program", "advance": _advance}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for number, program in enumerate(_programs(page)):
            if (page, number) in _ONLY_COMPILED:
                compile(program.source, f"{page}:{number}", "exec")
                continue
            if (page, number) == _WITH_HALIAX:
                pytest.importorskip("haliax", exc_type=ImportError)
                have_what_haliax_needs(monkeypatch)
            before = _BEFORE.get((page, number), "")
            _pages.run(before, f"before {page}:{number}", names)
            printed = _pages.run(program.source, f"{page}:{number}", names)
            if program.output is not None:
                printed = _pages.as_shown(printed, program.output)
                words = str.split if page in _EXACT else _pages.without_numbers
                assert words(printed) == words(program.output)
        _pages.run(_AFTER.get(page, ""), f"after {page}", names)


def _advance(state):
    import equinox as eqx

    return eqx.tree_at(lambda s: s.steps.count, state, replace_fn=lambda x: x + 1)
