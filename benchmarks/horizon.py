"""Does every element train? Long runs of elements that stop, that are small beside the
largest of their group, that return, and that shrink.

    python benchmarks/horizon.py
    python benchmarks/horizon.py --rows stops,small --moments learned sqrt/flashquinox
    python benchmarks/horizon.py --page benchmarks/results/horizon-h200.json

Columns:

- optax: float32 weights and moments;
- default: `fq.Storage()`, with a 32-bit master weight;
- flashoptim: moments by the paper's codec, with a 32-bit master weight;
- bf16: bfloat16 weights without a correction (`master_weight_bits=None`), and float32
  moments;
- those of --moments: moments by other codecs, with a 32-bit master weight.

Rows (--rows):

- stops: an element gets no gradient from step 100 on, the others of its group do: how
  far it moves in 5,000 steps, in learning rates. Groups along either axis (those of
  the paper's codec are always along the last), of 16, 32 and 128. For Lion, whose
  updates are signs, how much momentum is left;
- pruned: a network whose smaller half of weights is set to zero and gets no gradient
  any more: its loss after 4,000 steps, and how far these weights moved;
- vanished: rows of an embedding whose tokens do not occur any more, with groups along
  the vocabulary: how far they move;
- small: elements of a hundredth to a hundred-thousandth of their group's largest: which
  share of Optax's way they cover in 2,000 steps, and the largest update in learning
  rates;
- long: 100,000 steps of AdamW with gradients over three decades in each group, and of
  SGD with small elements;
- returns: elements that get gradients again after 1,000 steps without, and elements
  whose gradients shrink to a thousandth;
- decays: 100,000 steps of weight decay, of a learning rate times weight decay from 1e-5
  to 3e-8, also with master weights of 24 bits: how much weights decay, over what they
  should.

A star marks what misses the bound of its line; brackets hold the smallest and the
largest of elements or seeds. The error of the next update and the largest update of a
model in training are in `benchmarks/quality.py`.

All rows take minutes on a GPU, and longer on a CPU. --page prints, of figures that
--json has written, the table of the page "How it works".
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
from _command_line import (
    Parser,
    positive_integer,
    run_main,
    some_of,
    versions,
    write_json,
)
from _elements import Contender
from _horizon_decay import decays
from _horizon_figures import Figure, Setup
from _horizon_groups import returns, small, stops
from _horizon_long import long
from _horizon_models import pruned, vanished
from _horizon_page import page_table
from _storages import BFLOAT16

import flashquinox as fq


ROWS: dict[str, Callable[[Setup], Iterator[Figure]]] = {
    row.__name__: row for row in (stops, pruned, vanished, small, long, returns, decays)
}


def contenders(moments: list[str | tuple[str, str]]) -> dict[str, Contender]:
    storages = {
        "optax": None,
        "default": fq.Storage(master_weight_bits=32),
        "flashoptim": fq.Storage(master_weight_bits=32, moments="flashoptim"),
        "bf16": BFLOAT16,
    }
    for name in moments:
        key = name if isinstance(name, str) else "/".join(name)
        storages[key] = fq.Storage(master_weight_bits=32, moments=name)
    return {name: Contender(name, storage) for name, storage in storages.items()}


def _moments(text: str) -> str | tuple[str, str]:
    """A name of a codec, or two with a slash between them."""
    first, slash, second = text.partition("/")
    known = fq.MomentCodecs.names()
    if first not in known or (slash and second not in known):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(known)}, nor two of these with a slash"
        )
    return (first, second) if slash else first


# Of a number, and of a column with its star and its range.
_NUMBER, _WIDTH = 11, 32


def print_header(names: list[str]) -> None:
    columns = "".join(f"{name:>{_NUMBER}}".ljust(_WIDTH) for name in names)
    print(f"{'':46}{'to reach':>14}{columns}".rstrip())


def print_figure(figure: Figure, names: list[str]) -> None:
    cells = []
    for name in names:
        if name not in figure.values:
            cells.append(f"{'-':>{_NUMBER}}".ljust(_WIDTH))
            continue
        star = "*" if figure.is_met(name) is False else ""
        between = ""
        if name in figure.ranges:
            between = "[{}, {}]".format(*map(_number, figure.ranges[name]))
        cell = f"{_number(figure.values[name]):>{_NUMBER}}{star:1} {between}"
        cells.append(cell.ljust(_WIDTH))
    reach = ""
    if figure.reach is not None:
        low, high = figure.reach
        reach = f"<= {high:.3g}" if low == 0 else f"{low:.3g} to {high:.3g}"
    print(f"  {figure.measure:44}{reach:>14}{''.join(cells)}".rstrip(), flush=True)


def _number(x: float) -> str:
    """Four digits."""
    if x == 0 or 1e-3 <= abs(x) < 1e6:
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"
    return f"{x:.1e}"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--rows",
        type=partial(some_of, ROWS),
        default=list(ROWS),
        help=f"some of {','.join(ROWS)} (default: all)",
    )
    parser.add_argument(
        "--moments",
        type=_moments,
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"further columns: {', '.join(fq.MomentCodecs.names())}, or two of these "
        "with a slash, for first and second moments",
    )
    standard = list(contenders([]))
    parser.add_argument(
        "--columns",
        type=partial(some_of, standard),
        default=standard,
        help=f"of the standard ones, some of {','.join(standard)} (default: all); "
        "Optax's is always there",
    )
    parser.add_argument(
        "--seeds",
        type=positive_integer,
        default=4,
        help="networks that are pruned, and how many times more elements there are "
        "(default: 4)",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a tenth of the steps (row long: a hundredth) and no bounds, to see that "
        "all rows work",
    )
    parser.add_argument(
        "--page",
        type=pathlib.Path,
        metavar="JSON",
        help="print the table of the documentation, of the figures in this file",
    )
    parser.add_json()
    arguments = parser.parse_args()
    if arguments.page is not None and not arguments.page.is_file():
        parser.error(f"--page: no such file: {arguments.page}")
    return arguments


# Of the table of the documentation.
_TITLES = {
    "optax": "float32",
    "default": "**default**",
    "flashoptim": "the paper's codec",
    "bf16": "bfloat16 weights",
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.page is not None:
        records = json.loads(arguments.page.read_text())["figures"]
        print(page_table([Figure.of_record(x) for x in records], _TITLES))
        return
    there = versions("jax", "jaxlib", "optax", "equinox", "flashquinox")
    device = jax.devices()[0].device_kind
    print(f"{device}, " + ", ".join(f"{k} {v}" for k, v in there.items()))
    chosen = contenders(arguments.moments)
    left_out = contenders([]).keys() - {"optax", *arguments.columns}
    names = [name for name in chosen if name not in left_out]
    setup = Setup(
        tuple(chosen[name] for name in names),
        seeds=arguments.seeds,
        tiny=arguments.tiny,
        rows=frozenset(arguments.rows),
    )
    print_header(names)
    figures: list[Figure] = []
    seconds = {}
    for row in arguments.rows:
        start, case = time.perf_counter(), None
        for figure in ROWS[row](setup):
            if figure.case != case:
                print(f"{row}: {figure.case}")
            case = figure.case
            if arguments.tiny:
                figure.reach = None
            print_figure(figure, names)
            figures.append(figure)
        seconds[row] = round(time.perf_counter() - start, 1)
    for name in [] if arguments.tiny else names[1:]:
        met = [figure.is_met(name) for figure in figures]
        judged = [x for x in met if x is not None]
        print(f"{name}: {sum(judged)} of {len(judged)} bounds reached")
    print(f"{sum(seconds.values()):.0f} s")
    write_json(
        arguments.json,
        arguments={"seeds": arguments.seeds, "tiny": arguments.tiny},
        device=device,
        versions=there,
        seconds=seconds,
        storage={name: repr(chosen[name].storage) for name in names[1:]},
        figures=[figure.record() for figure in figures],
    )


if __name__ == "__main__":
    run_main(main)
