"""What the command lines of benchmarks have in common."""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Shows the description as it is written. Wrong arguments are one line, and exit
    code 2."""

    def __init__(self, description: str | None):
        keep = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=keep)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_json(self) -> None:
        self.add_argument("--json", type=_file, help="also write the figures here")


def _file(text: str) -> pathlib.Path:
    if pathlib.Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"a directory: {text}")
    return pathlib.Path(text)


def write_json(path: pathlib.Path | None, **record: Any) -> None:
    """What was found, and by which command; if there is a place for it."""
    if path is not None:
        store_json(path, record)
        print(f"Wrote {path}.")


def store_json(path: pathlib.Path, record: dict[str, Any]) -> None:
    record = {"command": command()} | record
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def command() -> str:
    """What was called, from the root of the repository. Of absolute paths it has the
    names alone: their folders are those of one machine."""
    root = pathlib.Path(__file__).resolve().parents[1]
    path = pathlib.Path(sys.argv[0]).resolve()
    program = path.relative_to(root).as_posix() if root in path.parents else path.name
    return " ".join([program, *(re.sub(r"(^|=)/.*/", r"\1", x) for x in sys.argv[1:])])


def run_main(main: Callable[[], None]) -> None:
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read has seen enough. Python would flush again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def shapes(text: str) -> list[tuple[int, ...]]:
    """Shapes of arrays, with commas between them."""
    try:
        return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected shapes such as 512x512,64x3x3; got {text!r}"
        ) from None


def some_of(names: Iterable[str], text: str) -> list[str]:
    """Some of these names, with commas between them."""
    names = list(names)
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in names:
            raise argparse.ArgumentTypeError(
                f"{name!r} is none of {', '.join(names)} (or several, with commas)"
            )
    return list(dict.fromkeys(chosen))


def in_few_words(error: Exception) -> str:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) <= 100 else words[:97] + "..."


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def positive_integer(text: str) -> int:
    number = positive(text)
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(number)


def sizes(text: str) -> list[int]:
    """Sides of matrices of whole groups."""
    try:
        found = [int(x) for x in text.split(",") if x.strip()]
    except ValueError:
        found = [0]
    if any(size <= 0 or size % 32 != 0 for size in found):
        raise argparse.ArgumentTypeError(
            f"{text!r}: sides of matrices, multiples of 32, with commas between them"
        )
    return found


def versions(*packages: str) -> dict[str, str]:
    """Of those packages that are there."""
    there = {}
    for package in packages:
        try:
            there[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return there
