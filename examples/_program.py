"""What the examples have in common as programs: Ctrl-C, wrong arguments, and files that
are complete or absent. It imports nothing that takes long, so that Ctrl-C is heard from
the beginning."""

import argparse
import contextlib
import errno
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn


# Ctrl-C is looked for between steps, and the step that it came in is saved. As an
# exception it could come in the middle of anything, even where Python drops it: in a
# callback of the garbage collector, say.
interrupted = threading.Event()
imported = threading.Event()


def listen() -> None:
    """From now on, the first Ctrl-C sets `interrupted`. The second one does not wait:
    before `imported` is set, it ends the program."""
    signal.signal(signal.SIGINT, _on_interrupt)


def _on_interrupt(signum, frame):
    del signum, frame
    if not interrupted.is_set():
        interrupted.set()
        return
    if not imported.is_set():
        # In the midst of an import, an exception comes out as pages of others.
        os._exit(130)
    raise KeyboardInterrupt


class Parser(argparse.ArgumentParser):
    """Wrong arguments are one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        wrong(f"{message} (see --help)")


def wrong(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def positive_number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"takes a positive number; got {text!r}")


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    last = 2**32 - 1 if maximum is None else maximum
    limit = ", below 2**32" if maximum is None else f" to {maximum}"

    def parse(text: str) -> int:
        # Python reads no longer ones from strings.
        if text.isdecimal() and minimum <= int(text[:12]) <= last:
            return int(text[:12])
        raise argparse.ArgumentTypeError(
            f"takes a whole number from {minimum}{limit}; got {text!r}"
        )

    return parse


def check_folder(option: str, folder: Path) -> None:
    """Makes the folder if need be, and tries whether it takes files: what is written
    there at the end would else be an error only then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_takes_files(folder)
    except OSError as error:
        wrong(f"argument {option}: cannot write to {folder}: {error.strerror}")


def check_file(option: str, path: Path) -> None:
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _check_takes_files(path.parent)
    except OSError as error:
        wrong(f"argument {option}: cannot write {path}: {error.strerror}")


def _check_takes_files(folder: Path) -> None:
    trial = folder / f".{os.getpid()}.tmp"
    trial.touch()
    trial.unlink()


@contextlib.contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary file to write. It becomes `path` when all is written, and is removed
    if anything comes between: an error, or Ctrl-C."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def saved(step: int, folder: Path) -> str:
    """What a program says that was interrupted."""
    return f"Step {step} is saved in {folder}. The same command goes on from it."


def run(main: Callable[[], None], when_interrupted: str) -> None:
    """Runs it, and says in one line that it was interrupted, and what is left: the text
    of its own `KeyboardInterrupt`, or the one here."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        print(f"Interrupted. {str(interrupt) or when_interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read has seen enough. Python would flush again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
