"""What the command lines of benchmarks have in common."""

import argparse
from collections.abc import Iterable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Wrong arguments are one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


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
