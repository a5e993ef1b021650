"""The programs of a page, and what they print.

    python docs/_scripts/pages.py docs/get-started.md docs/tutorials/*.md

runs the programs of each page, one after the other in an empty folder, as a reader
would: blocks of Python, and commands of `flashquinox`. A block of text with the title
"Output" after a program becomes what that program prints, and pictures that programs
draw are put into `docs/_static`. `tests/test_documentation.py` runs the same programs,
and compares but for numbers.

    python docs/_scripts/pages.py --table

lists the pages with programs, and the command that runs those of each.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[2]
OUTPUT = '```text title="Output"\n'
_PROGRAM = re.compile(
    r"^(?P<indent> *)```(?P<language>python|bash)[^\n]*\n"
    r"(?P<source>.*?)^(?P=indent)```\n"
    rf"(?:\n{re.escape(OUTPUT)}(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
_COMMAND = re.compile(r"(?:python -m )?flashquinox (.*)")
_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
# A page shows the first lines of an output alone if this is the last one.
_MORE = "...\n"


class Program(NamedTuple):
    source: str
    output: str | None
    # The place of the output in the page.
    span: tuple[int, int]


def programs(text: str) -> list[Program]:
    """The programs in a page of Markdown, and the outputs that it shows."""
    found = []
    # A page may end without a newline.
    for match in _PROGRAM.finditer(text + "\n"):
        source = textwrap.dedent(match["source"])
        if match["language"] == "bash":
            source = _as_python(source)
        if source is not None:
            found.append(Program(source, match["output"], match.span("output")))
    return found


def _as_python(commands: str) -> str | None:
    """The commands as a program. What installs a package, or starts a file, is none."""
    matches = [_COMMAND.fullmatch(x) for x in commands.splitlines()]
    if not all(matches):
        return None
    calls = [f"main({shlex.split(x[1])})" for x in matches if x is not None]
    return "\n".join(["from flashquinox.__main__ import main", "", *calls, ""])


def run(source: str, name: str, names: dict) -> str:
    """Runs a program among these names, and returns what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name, "exec"), names)
    lines = printed.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def as_shown(printed: str, output: str) -> str:
    """Of what is printed, as many lines as the page shows."""
    if not output.endswith(_MORE):
        return printed
    lines = printed.splitlines(keepends=True)
    return "".join([*lines[: output.count("\n") - 1], _MORE])


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
            parts += [text[end:start], as_shown(printed, program.output)]
            end = stop
    return "".join([*parts, text[end:]])


def pages() -> dict[str, list[Program]]:
    """The pages that have programs, by their paths from the root of the repository."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = {str(x.relative_to(ROOT)): programs(x.read_text()) for x in paths}
    return {page: its_programs for page, its_programs in found.items() if its_programs}


def table() -> str:
    """The pages, how many programs and outputs each has, and what runs them."""
    lines = ["| page | programs | outputs | run by |", "| --- | ---: | ---: | --- |"]
    test = "tests/test_documentation.py::test_programs"
    for page, found in pages().items():
        outputs = sum(x.output is not None for x in found)
        # The first page has the beginning of the README's program, as a test compares.
        run_as = "README.md" if page == "docs/index.md" else page
        command = f"`pytest -n 0 -m '' '{test}[{run_as}]'`"
        lines.append(f"| {page} | {len(found)} | {outputs} | {command} |")
    return "\n".join(lines)


def write(page: Path) -> None:
    static = ROOT / "docs" / "_static"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        page.write_text(rewritten(page.read_text(), page.name))
        for picture in Path(folder).glob("*.png"):
            known = static / picture.name
            place = known if known.exists() else static / "tutorials" / picture.name
            shutil.copy(picture, place)
    print(f"Wrote {os.path.relpath(page)}.")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("PJRT_NPROC", "32")
    if sys.argv[1:] == ["--table"]:
        print(table())
    for path in [Path(x).resolve() for x in sys.argv[1:] if x != "--table"]:
        write(path)
