"""The models of `benchmarks/zoo.py` are those that were published, and the page of the
documentation shows what is stored of them."""

import importlib
import json
import sys
from pathlib import Path

import pytest


_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def zoo(monkeypatch):
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("_zoo")
    # Other programs in there may have modules of these names too.
    for name in set(sys.modules) - before:
        if name.startswith("_"):
            monkeypatch.delitem(sys.modules, name)


def test_models_have_as_many_parameters_as_published(zoo):
    published = [model for model in zoo.ZOO.values() if model.published is not None]
    assert len(published) >= 14
    for model in published:
        assert len(model.leaves()) > 1


def test_other_numbers_are_noticed(zoo):
    model = zoo.Model("a model", "its paper", lambda: {"x": (1000, 1001)}, "1.00")
    assert model.leaves() == {"x": (1000, 1001)}
    with pytest.raises(ValueError, match=r"has 1\.01 million .* but 1\.00 by"):
        zoo.Model("a model", "its paper", model.shapes, "1.01").leaves()


def test_mixtral_is_right_at_full_size(zoo):
    assert zoo.count(zoo.mixtral(32, 4096, 14336)) == 46_702_792_704


def test_flax_keeps_sorted_names(zoo):
    for name in ("resnet50-flax", "vit-b16", "qwen", "cnn"):
        names = [x.split(".") for x in zoo.ZOO[name].leaves()]
        assert names == sorted(names)


def test_page_shows_the_stored_figures(zoo):
    page = importlib.import_module("_zoo_page")
    results = _BENCHMARKS / "results"
    files = [*sorted(results.glob("zoo-*.json")), results / "optimizers-h200.json"]
    sections = page.page([json.loads(file.read_text()) for file in files])
    text = (_BENCHMARKS.parent / "docs" / "performance.md").read_text()
    assert page.insert(sections, text) == text
