"""The command itself; what `plan` prints is in `memory/test_memory.py`."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import flashquinox as fq
from flashquinox.__main__ import main

from .test_memory import _GPT2


_ROOT = Path(__file__).parents[2]
_CALLS = {
    "/usr/local/bin/flashquinox": "flashquinox",
    "flashquinox.exe": "flashquinox",
    "/lib/flashquinox/__main__.py": "python -m flashquinox",
}


def _main(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code


def test_version(capsys):
    assert _main("--version") == 0
    assert capsys.readouterr().out == f"flashquinox {fq.__version__}\n"


def test_is_one_version_and_one_program():
    settings = _ROOT / "pyproject.toml"
    project = tomllib.loads(settings.read_text(encoding="utf-8"))["project"]
    assert project["version"] == fq.__version__
    assert project["scripts"] == {"flashquinox": "flashquinox.__main__:main"}


@pytest.mark.parametrize("called", _CALLS)
def test_calls_itself_as_it_was_called(called, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called])
    name = _CALLS[called]
    for arguments in (["--help"], ["plan", "--help"]):
        assert _main(*arguments) == 0
        help = capsys.readouterr().out
        assert help.startswith(f"usage: {name} ")
        assert f"    {name} plan " in help or f"  {name} plan --model" in help
        assert "%(prog)s" not in help
    assert _main("plan") == 2
    assert capsys.readouterr().err.startswith(f"{name} plan: error: ")


def test_config_of_a_directory(tmp_path, capsys):
    """As models are stored; the file itself is the same."""
    (tmp_path / "config.json").write_text(json.dumps(_GPT2))
    found = []
    for path in (tmp_path, tmp_path / "config.json"):
        main(["plan", f"--config={path}"])
        title, *table = capsys.readouterr().out.splitlines()
        assert title.startswith(f"{path}, adamw")
        assert "124,439,808 parameters" in title
        found.append(table)
    assert found[0] == found[1]


def test_files_that_were_written_are_named(tmp_path, capsys):
    picture = str(tmp_path / "plan.svg")
    main(["plan", "--params=7e9", f"--plot={picture}"])
    assert capsys.readouterr().out.endswith(f"\nWrote {picture}.\n")
    main(["plan", "--params=7e9", f"--plot={picture}", "--json"])
    assert json.loads(capsys.readouterr().out)["written"] == [picture]
    main(["plan", "--params=7e9", "--json"])
    assert json.loads(capsys.readouterr().out)["written"] == []


def test_sums_and_averages(capsys):
    plan = ["plan", "--params=7e9", "--json"]
    bytes_of = {}
    for arguments in ([], ["--accumulate"], ["--accumulate=16"], ["--ema"]):
        main([*plan, *arguments])
        found = json.loads(capsys.readouterr().out)["on_each_device"]["flashquinox"]
        bytes_of[" ".join(arguments)] = found["accumulators"] + found["averages"]
    assert [x / 7e9 for x in bytes_of.values()] == [0, 3, 2.0625, 3]


@pytest.mark.once
def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "flashquinox", "plna"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("python -m flashquinox: error: argument command: ")
    assert done.stderr.count("\n") == 1
