"""Runs everything in this folder, on all GPUs of a machine, until a deadline.

    python benchmarks/evidence/jobs.py --data data --out results/evidence \\
        --devices 4 --seconds 540

Jobs are in `_plan.py`, the important ones first. A job is a program that goes on where
it was stopped, so the same command on another day runs what was left. No job is begun
that would not get to a result in time; none is stopped before its run is written,
except at the deadline itself.

--cpu --small tries all jobs at the smallest size, on --devices processes of a CPU.
"""

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import _benchmarks  # noqa: F401
from _command_line import Parser, positive, positive_integer, run_main
from _plan import Job, plan
from _runs import ENDS, LEFT


@dataclasses.dataclass
class Running:
    job: Job
    device: int
    process: Any
    begin: float


class Queue:
    """Jobs, in the order of their importance, on devices that each have room for two
    halves."""

    _ROOM = 2

    def __init__(
        self, jobs: Sequence[Job], devices: int, ends: float, launch: Callable[..., Any]
    ):
        self.waiting = list(jobs)
        self.running: list[Running] = []
        self.results: dict[str, str] = {}
        self._devices, self._ends, self._launch = devices, ends, launch

    def advance(self, now: float) -> bool:
        """Notes what has ended, and begins what can be. False when nothing runs."""
        for item in list(self.running):
            code = item.process.poll()
            if code is None:
                continue
            self.running.remove(item)
            words = {0: "done", LEFT: "left runs for later"}
            result = words.get(code, f"failed: {code}")
            self.results[item.job.name] = result
            seconds = now - item.begin
            print(f"{item.job.name}: {result}, {seconds:.0f} s", flush=True)
            if code not in words:
                print(item.job.last_words(), flush=True)
        for device in range(self._devices):
            while (job := self._next(device, now)) is not None:
                self.waiting.remove(job)
                process = self._launch(job, device)
                self.running.append(Running(job, device, process, now))
        return bool(self.running)

    def stop(self) -> None:
        for item in self.running:
            item.process.terminate()
            self.results[item.job.name] = "stopped at the deadline"

    def _next(self, device: int, now: float) -> Job | None:
        """The first that has room here and gets to a result in time."""
        taken = sum(x.job.room for x in self.running if x.device == device)
        busy = {x.job.group for x in self.running}
        for job in self.waiting:
            fits = job.room <= self._ROOM - taken and now + job.least < self._ends
            # Jobs of one group write the same files.
            if fits and job.group not in busy:
                return job
        return None


def launcher(arguments: argparse.Namespace, ends: float) -> Callable[..., Any]:
    here = pathlib.Path(__file__).parent
    (arguments.out / "logs").mkdir(parents=True, exist_ok=True)

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")

    def launch(job: Job, device: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {ENDS: str(ends), "PYTHONUNBUFFERED": "1"}
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if arguments.cpu:
            environment["JAX_PLATFORMS"] = "cpu"
        else:
            name = visible[device] if device < len(visible) else ""
            environment["CUDA_VISIBLE_DEVICES"] = name or str(device)
        command = [sys.executable, str(here / job.program), *job.arguments]
        log: TextIO = job.log.open("a")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    return launch


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--devices", type=positive_integer, default=1)
    parser.add_argument("--seconds", type=positive, required=True, help="from now on")
    parser.add_argument("--only", nargs="+", help="jobs whose names begin so")
    parser.add_argument("--cpu", action="store_true", help="no GPU is needed")
    parser.add_argument("--small", action="store_true", help="tiny models, few steps")
    arguments = parser.parse_args()
    jobs = plan(arguments.data, arguments.out, arguments.small)
    if arguments.only:
        jobs = [job for job in jobs if job.name.startswith(tuple(arguments.only))]
    jobs = [job for job in jobs if not job.is_done()]
    ends = time.time() + arguments.seconds
    queue = Queue(jobs, arguments.devices, ends, launcher(arguments, ends))
    while queue.advance(time.time()):
        if time.time() > ends:
            queue.stop()
            break
        time.sleep(0.5)
    for job in queue.waiting:
        print(f"{job.name}: not begun")
    failed = [k for k, x in queue.results.items() if x.startswith("failed")]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_main(main)
