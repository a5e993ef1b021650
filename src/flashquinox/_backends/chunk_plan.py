"""Which groups of which leaves make a chunk."""

import functools
from collections import Counter
from typing import NamedTuple


class Piece(NamedTuple):
    """Consecutive groups of a leaf."""

    leaf: int
    start: int
    number: int


class Window(NamedTuple):
    """A chunk of one leaf, from a group on."""

    leaf: int
    start: int


class Plan(NamedTuple):
    # Groups of a chunk.
    size: int
    windows: tuple[Window, ...]
    # The chunks of shorter leaves, and of partial groups.
    shared: tuple[tuple[Piece, ...], ...]


def best_size(
    numbers: tuple[tuple[int, int], ...], least: int, most: int, of_turn: int
) -> int:
    """How many groups a chunk has, of at least half of `most`, for these leaves to take
    the least time, if a turn takes as long as its groups and so many more. `numbers`
    are those of [`plan_chunks`][]."""
    # Of round numbers: with 262,112 elements in place of 262,144, a step of 4096 x 4096
    # takes an eighth longer.
    step = 1 << max(0, most.bit_length() - 5)
    counted = Counter(numbers)
    times = {
        size: _turns(counted, size) * (size + of_turn)
        for size in range(most // step * step, max(most // 2, least - 1), -step)
    }
    # A larger one that is nearly as good has fewer chunks that leaves share, each of
    # which has moves of its own to compile.
    enough = _NEARLY * min(times.values(), default=0)
    return next((size for size, time in times.items() if time <= enough), least)


# Times of a step differ by so much from run to run.
_NEARLY = 1.02


def _turns(counted: Counter[tuple[int, int]], size: int) -> int:
    """How many chunks of so many groups these leaves have: at least so many, where some
    are shared. To plan every size would take seconds for thousands of leaves."""
    windows = in_shared = more_than_half = 0
    for (number, whole), leaves in counted.items():
        rest = number
        if whole >= size:
            windows += leaves * -(-whole // size)
            rest -= whole
        in_shared += leaves * rest
        more_than_half += leaves * (2 * rest > size)
    return windows + max(-(-in_shared // size), more_than_half)


@functools.lru_cache(maxsize=256)
def plan_chunks(numbers: tuple[tuple[int, int], ...], most: int) -> Plan:
    """The chunks of leaves: one for all of them, if they have no more than `most`
    groups; otherwise chunks of so many. `numbers` are those of all groups of a leaf and
    of those that are not partial."""
    every = sum([number for number, _ in numbers])
    if every <= most:
        pieces = [Piece(leaf, 0, number) for leaf, (number, _) in enumerate(numbers)]
        return Plan(every, (), (tuple(pieces),))
    windows: list[Window] = []
    pieces = []
    for leaf, (number, whole) in enumerate(numbers):
        first = 0
        if whole >= most:
            # The last window is moved back, to be as long as the others.
            for first in range(0, whole, most):
                windows.append(Window(leaf, min(first, whole - most)))
            first = whole
        if first < number:
            pieces.append(Piece(leaf, first, number - first))
    shared: list[list[Piece]] = []
    room: list[int] = []
    # The largest first, each into the first chunk that has room for it.
    pieces.sort(key=lambda piece: -piece.number)
    # Those with room for one at least.
    some_room: list[int] = []
    for piece in pieces:
        chunk = next((i for i in some_room if room[i] >= piece.number), len(room))
        if chunk == len(room):
            some_room.append(chunk)
            room.append(most)
            shared.append([])
        room[chunk] -= piece.number
        shared[chunk].append(piece)
        if room[chunk] < pieces[-1].number:
            some_room.remove(chunk)
    return Plan(most, tuple(windows), tuple([tuple(x) for x in shared]))
