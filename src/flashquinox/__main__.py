"""Flashquinox on the command line: `flashquinox`, or `python -m flashquinox`."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import jax

from ._common.version import __version__
from ._memory.command import run_plan
from ._memory.command_arguments import add_plan


class Parser(argparse.ArgumentParser):
    """A parser that reports wrong arguments in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


_DESCRIPTION = """Flashquinox on the command line.

    %(prog)s plan --model llama-3.1-8b --devices 8 --optimizer adamw

`%(prog)s plan --help` has more.
"""


def program() -> str:
    """The name of this program, as it was called."""
    called = Path(sys.argv[0]).stem if sys.argv else ""
    return "flashquinox" if called == "flashquinox" else "python -m flashquinox"


def parser() -> Parser:
    # The description is already formatted.
    new = partial(Parser, formatter_class=argparse.RawDescriptionHelpFormatter)
    top = new(prog=program(), description=_DESCRIPTION)
    version = f"flashquinox {__version__}"
    top.add_argument("--version", action="version", version=version)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    plan = add_plan(commands)
    plan.set_defaults(run=run_plan, fail=plan.error)
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    # Nothing is computed. On an accelerator, JAX would reserve memory that others need.
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    if sys.stdout is None:
        print(f"{program()}: error: the output is closed", file=sys.stderr)
        sys.exit(1)
    try:
        try:
            settings = parser().parse_args(arguments)
            try:
                settings.run(settings)
            except (ValueError, TypeError) as error:
                settings.fail(str(error))
        finally:
            # Also after the help. An error in Python's own flush at exit could not be
            # caught.
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        # The output cannot be written. Python's flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A closed pipe is no error: its reader has seen enough.
        if not isinstance(error, BrokenPipeError):
            print(f"{program()}: error: {error.strerror}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
