"""The programs of a page, and what they print.

    python docs/_scripts/pages.py docs/get-started.md docs/tutorials/*.md

runs the programs of each page, one after the other in an empty folder, as a reader
would. A block of text with the title "Output" after a program becomes what that program
prints, and pictures that the programs draw are put into `docs/_static/tutorials`.
`tests/test_documentation.py` runs the same programs, and compares but for numbers.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple


OUTPUT = '```text title="Output"\n'
_PROGRAM = re.compile(
    r"^(?P<indent> *)```python[^\n]*\n(?P<source>.*?)^(?P=indent)```\n"
    rf"(?:\n{re.escape(OUTPUT)}(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


class Program(NamedTuple):
    source: str
    output: str | None
    # The place of the output in the page.
    span: tuple[int, int]


def programs(text: str) -> list[Program]:
    """The blocks of Python in a page of Markdown, and the outputs that it shows."""
    found = []
    # A page may end without a newline.
    for match in _PROGRAM.finditer(text + "\n"):
        source = textwrap.dedent(match["source"])
        found.append(Program(source, match["output"], match.span("output")))
    return found


def run(source: str, name: str, names: dict) -> str:
    """Runs a program among these names, and returns what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name, "exec"), names)
    lines = printed.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def without_numbers(output: str) -> list[str]:
    """The words of what is printed. Numbers differ with versions and machines."""
    return _NUMBER.sub("#", output).split()


def rewritten(text: str, page: str) -> str:
    """The page with the outputs of its programs as they are now."""
    names = {"__name__": "program"}
    parts, end = [], 0
    for number, program in enumerate(programs(text)):
        printed = run(program.source, f"{page}:{number}", names)
        if program.output is not None:
            start, stop = program.span
            parts += [text[end:start], printed]
            end = stop
    return "".join([*parts, text[end:]])


def main() -> None:
    docs = Path(__file__).resolve().parents[1]
    for page in [Path(x).resolve() for x in sys.argv[1:]]:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            page.write_text(rewritten(page.read_text(), page.name))
            for picture in Path(folder).glob("*.png"):
                shutil.copy(picture, docs / "_static" / "tutorials" / picture.name)
        print(f"Wrote {os.path.relpath(page)}.")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("PJRT_NPROC", "32")
    main()
