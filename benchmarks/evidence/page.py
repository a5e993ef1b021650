"""The tables and pictures of the page "Evidence", of the results that there are.

    python benchmarks/evidence/page.py
    python benchmarks/evidence/page.py --into docs/evidence.md --pictures docs/_static

Prints the tables, and which goals are missed.
"""

import pathlib

import _benchmarks  # noqa: F401
from _command_line import Parser, run_main
from _goals import failures, tables
from _page import sections
from _zoo_page import insert


RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--into", type=pathlib.Path, help="the page")
    parser.add_argument("--pictures", type=pathlib.Path, help="the folder of pictures")
    arguments = parser.parse_args()
    found = {**tables(arguments.results), **sections(arguments.results)}
    for name, text in found.items():
        print(f"## {name}\n\n{text}\n")
    for line in failures(arguments.results):
        print(line)
    if arguments.into is not None:
        arguments.into.write_text(insert(found, arguments.into.read_text()))
    if arguments.pictures is not None:
        from _pictures import plot_all

        plot_all(arguments.results, arguments.pictures)


if __name__ == "__main__":
    run_main(main)
