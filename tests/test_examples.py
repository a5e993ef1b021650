"""The examples, as a user runs them: in a process of their own, in an empty folder."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


MNIST = Path(__file__).parent.parent / "examples" / "mnist.py"


def command(*arguments):
    return [sys.executable, str(MNIST), *arguments]


def run(folder, *arguments):
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_mnist(tmp_path):
    done = run(
        tmp_path, "--epochs=2", "--train-size=300", "--optimizers=adamw,plain-sgd"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for header in ("accuracy", "bytes", "matrix", "check-", "step"):
        assert header in done.stdout

    folder = tmp_path / "mnist-results"
    rows = json.loads((folder / "results.json").read_text())["results"]
    runs = [(row["optimizer"], row["storage"]) for row in rows]
    assert runs == [
        ("adamw", "compressed"),
        ("adamw", "float32"),
        ("plain-sgd", "compressed"),
        ("plain-sgd", "float32"),
    ]
    largest = [row["bytes_per_parameter_of_largest_matrix"] for row in rows]
    assert largest == [5.125, 12, 3, 4]
    for row in rows:
        assert row["losses"][-1] < row["losses"][0]
        checkpoint = folder / f"{row['optimizer']}-{row['storage']}.eqx"
        assert checkpoint.stat().st_size == row["checkpoint_bytes"]
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.iterdir())) == 6


def test_mnist_help(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert "--epochs" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--epochs=0"], "takes a whole number from 1"),
        (["--train-size=5000"], "from 1 to 4000; got '5000'"),
        (["--adamw-lr=nan"], "takes a positive number; got 'nan'"),
        (["--optimizers=adamw,adam"], "got 'adam'"),
        (["--batch-size=200", "--train-size=100"], "more than the 100 training images"),
        (["--output=file/results"], "file/results"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_mnist_wrong_arguments(tmp_path, arguments, complaint):
    (tmp_path / "file").touch()
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
def test_mnist_interrupted(tmp_path):
    process = subprocess.Popen(
        command("--epochs=1000", "--train-size=100", "--optimizers=plain-sgd"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "mnist-results"
    while process.poll() is None and not folder.exists():
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("\n") == 1
    assert {path.suffix for path in folder.iterdir()} <= {".eqx"}
