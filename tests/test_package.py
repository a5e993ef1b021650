"""What is released says the same in all of its files. `.ci/run package` builds it, and
runs the README's example in an empty environment."""

import inspect
import re
import tomllib
from pathlib import Path

import jax
import pytest

import flashquinox as fq
from flashquinox import checkpoint, exchange


_ROOT = Path(__file__).parents[1]
_TEXTS = [
    _ROOT / name
    for name in ("README.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")
]
_GITHUB = [x for x in (_ROOT / ".github").rglob("*.yml") if "ISSUE" in str(x)]


def _project():
    return tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]


def _read(name):
    return (_ROOT / name).read_text(encoding="utf-8")


def test_version():
    version = _project()["version"]
    assert fq.__version__ == version
    assert f"\nversion: {version}\n" in _read("CITATION.cff")
    assert re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", *_changelog()
    )


def _changelog():
    return _read("CHANGELOG.md"), re.MULTILINE


def test_changelog_has_a_link_for_each_version():
    text, flags = _changelog()
    versions = re.findall(r"^## \[(.*?)\]", text, flags)
    assert versions[0] == "Unreleased"
    assert versions == re.findall(r"^\[(.*?)\]: https://", text, flags)


def test_pins_of_ruff_agree():
    dependencies = _project()["optional-dependencies"]["docs"]
    (pin,) = (x.removeprefix("ruff==") for x in dependencies if x.startswith("ruff"))
    assert f"rev: v{pin}\n" in _read(".pre-commit-config.yaml")


def test_classifiers_are_the_pythons_that_are_tested():
    prefix = "Programming Language :: Python :: 3."
    classified = [x for x in _project()["classifiers"] if x.startswith(prefix)]
    minors = [x.removeprefix(prefix) for x in classified]
    (tested,) = re.findall(
        r" python-version: \[(.*)\]", _read(".github/workflows/tests.yml")
    )
    assert [f'"3.{minor}"' for minor in minors] == tested.split(", ")
    assert f">=3.{minors[0]}" == _project()["requires-python"]


# GitHub shows nothing of a file that it cannot read: it only never runs it.
@pytest.mark.parametrize(
    "path", sorted((_ROOT / ".github").rglob("*.yml")), ids=lambda x: x.name
)
def test_github_can_read(path):
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for job in content.get("jobs", {}).values():
        assert "timeout-minutes" in job and job["steps"]


# A tag can be moved to other code, which then has the permissions of the job.
@pytest.mark.parametrize(
    "path", sorted((_ROOT / ".github/workflows").iterdir()), ids=lambda x: x.name
)
def test_actions_are_pinned(path):
    lines = [x for x in path.read_text(encoding="utf-8").split("\n") if "uses:" in x]
    pinned = re.compile(r" *(- )?uses: [\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert lines and all(map(pinned.fullmatch, lines)), lines


# Files outside of the folder of the package are not there where a reader of PyPI is.
@pytest.mark.parametrize("path", [*_TEXTS[:1], *_TEXTS[1:3]], ids=lambda x: x.name)
def test_links_are_absolute(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)


@pytest.mark.parametrize("path", [*_TEXTS, *_GITHUB], ids=lambda x: x.name)
def test_addresses_are_those_of_the_project(path):
    urls = _project()["urls"]
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"https://[\w.]*github[\w./-]*", text)
    own = [x for x in found if "flashquinox" in x]
    assert all(x.startswith((urls["Repository"], urls["Documentation"])) for x in own)


def test_pages_that_the_readme_names_exist():
    start = _project()["urls"]["Documentation"]
    pages = re.findall(rf"\({re.escape(start)}([\w/-]+)/\)", _read("README.md"))
    assert pages
    for page in pages:
        assert (_ROOT / "docs" / f"{page}.md").is_file(), page


@pytest.mark.parametrize(
    "function",
    [fq.adamw, fq.adam, fq.adan, fq.lion, fq.sgd, fq.sgdw],
    ids=lambda x: x.__name__,
)
def test_help_of_optimizers_is_readable(function):
    text = str(inspect.signature(function))
    assert text.startswith("(learning_rate: ScalarOrSchedule, ")
    assert "b1: ScalarLike = 0.9" in text or "momentum: ScalarLike | None" in text
    assert "storage: Storage = Storage()" in text
    assert "skip_nonfinite: bool = False" in text
    assert text.endswith(" -> Optimizer")
    assert len(text) < 700


@pytest.mark.parametrize("module", [fq, checkpoint, exchange], ids=lambda x: x.__name__)
def test_help_has_short_types(module):
    for name, item in vars(module).items():
        if name.startswith("_") or not callable(item):
            continue
        if isinstance(item, type):
            item = vars(item).get("__init__")
            # What other libraries give a class has their types.
            if not inspect.isfunction(item):
                continue
        text = str(inspect.signature(item)).replace("<class 'jax.numpy.", "")
        assert not re.search(r"[a-z_]\.\w|Union|~|<class", text), (name, text)


def test_what_wraps_a_method_has_its_signature():
    """`equinox.filter_jit` asks for it."""
    optim = fq.adamw(1e-3)
    for method in (optim.init, optim.step, optim.update):
        names = list(inspect.signature(method).parameters)
        assert list(inspect.signature(jax.vmap(method)).parameters) == names
