"""Floors of the library: what may import what."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashquinox


_ROOT = Path(flashquinox.__file__).parent
# From the ground up: a floor imports from those before it.
_FLOORS = (
    "_compat",
    "_common",
    "_rules",
    "_storage",
    "_model",
    "_tile",
    "_backends",
    "_sharding",
    "_optimizer",
)
# Above all floors, and none of them above another.
_WINGS = ("_precision", "_release", "_memory", "_checkpoint", "_exchange")
_PUBLIC = (
    "__init__",
    "__main__",
    "checkpoint",
    "exchange",
    "memory",
    "precision",
    "release",
)


def test_every_module_has_its_floor():
    at_the_top = {path.stem for path in _ROOT.iterdir() if path.suffix == ".py"}
    folders = {path.name for path in _ROOT.iterdir() if any(path.glob("*.py"))}
    assert at_the_top | folders == {*_FLOORS, *_WINGS, *_PUBLIC}


def test_contributing_shows_every_folder():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.partition("```text\n")[2].partition("```")[0]
    shown = set(re.findall(r"\b(_\w+)(?:/|\.py)", tree))
    assert shown == {*_FLOORS, *_WINGS}


def test_imports_run_down():
    up = [f"{who} imports {what}" for who, what in _imports() if not _down(who, what)]
    assert not up, "\n".join(up)


@pytest.mark.parametrize(
    "who, what, down",
    [
        ("_storage.codec", "_rules.rule", True),
        ("_storage.codec", "_storage.layout", True),
        ("_rules.adam", "_storage.codec", False),
        ("_exchange.files", "_optimizer.states", True),
        ("_exchange.files", "_precision.cast", False),
        ("_optimizer.engine", "_exchange.files", False),
        ("_optimizer.engine", "precision", False),
        ("__main__", "_memory.command", True),
    ],
)
def test_down(who: str, what: str, down: bool):
    assert _down(who, what) == down


def _down(who: str, what: str) -> bool:
    here, there = who.split(".")[0], what.split(".")[0]
    if here in _PUBLIC or here == there:
        return True
    if here in _WINGS:
        return there in _FLOORS
    return there in _FLOORS[: _FLOORS.index(here)]


def _imports() -> Iterator[tuple[str, str]]:
    """Which module imports which, also inside of functions."""
    for path in sorted(_ROOT.rglob("*.py")):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = parts[: len(parts) - node.level]
                module = (*package, *(node.module.split(".") if node.module else ()))
                for name in [module] if module else [(x.name,) for x in node.names]:
                    yield ".".join(parts), ".".join(name)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [x.name for x in node.names]
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                for name in names:
                    if name.split(".")[0] == "flashquinox":
                        yield ".".join(parts), name.partition(".")[2] or "__init__"
