"""The examples, as a user runs them: in a process of their own, in an empty folder."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parent.parent / "examples"


def command(example, *arguments):
    return [sys.executable, str(EXAMPLES / example), *arguments]


def run(folder, example, *arguments):
    return subprocess.run(
        command(example, *arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_wrong(done, complaint, code=2):
    assert done.returncode == code
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


needs_ctrl_c = pytest.mark.skipif(
    sys.platform == "win32", reason="Ctrl-C is no signal there"
)


def interrupt(folder, example, *arguments, file):
    """Ctrl-C, two seconds after it made this file."""
    process = subprocess.Popen(
        command(example, *arguments),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (folder / file).exists():
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("\n") == 1


#
# mnist.py
#


def test_mnist(tmp_path):
    done = run(
        tmp_path,
        "mnist.py",
        "--epochs=2",
        "--train-size=300",
        "--optimizers=adamw,plain-sgd",
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
    # Of AdamW, less than half.
    compressed, float32 = (row["checkpoint_bytes"] for row in rows[:2])
    assert 2 * compressed < float32
    assert f"{compressed / 1e6:.2f} MB instead of {float32 / 1e6:.2f} MB" in done.stdout
    for row in rows:
        assert row["losses"][-1] < row["losses"][0]
        checkpoint = folder / f"{row['optimizer']}-{row['storage']}.eqx"
        assert checkpoint.stat().st_size == row["checkpoint_bytes"]
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.iterdir())) == 6


def test_mnist_help(tmp_path):
    done = run(tmp_path, "mnist.py", "--help")
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
    done = run(tmp_path, "mnist.py", *arguments)
    assert_wrong(done, complaint)


@needs_ctrl_c
def test_mnist_interrupted(tmp_path):
    interrupt(
        tmp_path,
        "mnist.py",
        *("--epochs=1000", "--train-size=100", "--optimizers=plain-sgd"),
        file="mnist-results",
    )
    folder = tmp_path / "mnist-results"
    assert {path.suffix for path in folder.iterdir()} <= {".eqx"}


#
# fsdp.py
#


_SMALL = ("--width=32", "--layers=1", "--length=16", "--batch-size=8")


def test_fsdp(tmp_path):
    def train(devices):
        done = run(
            tmp_path,
            "fsdp.py",
            *(*_SMALL, f"--fake-devices={devices}", "--learning-rate=0.02"),
            *("--steps=30", "--save-every=20", "--json=result.json"),
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return json.loads((tmp_path / "result.json").read_text()), done.stdout

    whole, output = train(4)
    assert whole["step"] == 30 and whole["devices"] == 4
    assert whole["validation_loss"] < whole["validation_loss_before"] - 1
    for title in ("validation loss", "parameters", "float32 AdamW"):
        assert title in output

    # As if it had ended on the way: it goes on, bit for bit; on other devices, whose
    # sums have another order, nearly.
    checkpoints = tmp_path / "fsdp-checkpoints"
    for devices in (4, 2):
        shutil.rmtree(checkpoints / "30")
        resumed, output = train(devices)
        assert "From step 20" in output
        assert resumed["step"] == 30 and len(resumed["losses"]) == 10
        expected = whole["losses"][20:]
        if devices == 4:
            assert resumed["losses"] == expected
            assert resumed["validation_loss"] == whole["validation_loss"]
        else:
            assert resumed["losses"] == pytest.approx(expected, abs=0.05)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["20", "30"]

    other = run(tmp_path, "fsdp.py", *_SMALL, "--layers=2", "--fake-devices=2")
    assert_wrong(other, "has nothing at `model.blocks[1]", code=1)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--steps=0"], "takes a whole number from 1"),
        (["--learning-rate=-1"], "takes a positive number; got '-1'"),
        (["--width=36", "--heads=4"], "takes a multiple of 2 x 4 heads"),
        (["--process=1"], "belong together"),
        (["--json=nowhere/result.json"], "no directory nowhere"),
    ],
)
def test_fsdp_wrong_arguments(tmp_path, arguments, complaint):
    assert_wrong(run(tmp_path, "fsdp.py", *arguments), complaint)
    assert list(tmp_path.iterdir()) == []


def test_fsdp_wrong_devices(tmp_path):
    done = run(tmp_path, "fsdp.py", "--fake-devices=3")
    assert_wrong(done, "takes a multiple of the 3 devices", code=1)


@needs_ctrl_c
def test_fsdp_interrupted(tmp_path):
    interrupt(
        tmp_path,
        "fsdp.py",
        *(*_SMALL, "--fake-devices=2", "--steps=1000000", "--save-every=10"),
        file="fsdp-checkpoints/10",
    )
    steps = [int(path.name) for path in (tmp_path / "fsdp-checkpoints").iterdir()]
    # That of the step it came in is the latest.
    assert len(steps) == 2 and max(steps) > 10
