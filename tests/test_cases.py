"""Which cases of the table tests take."""

import itertools

from .helpers import Case, CASES, OPTIMIZERS, OURS, pairwise


def _pairs(cases: list[Case], x: str, y: str) -> set[tuple[object, object]]:
    return {(getattr(case, x), getattr(case, y)) for case in cases}


def test_every_pair_is_taken():
    names = ("rule", "dtype"), ("rule", "moments"), ("width", "moments")
    known = [Case(name, OURS) for name in OPTIMIZERS]
    found = pairwise(CASES, *names, known=known)
    for pair in names:
        assert _pairs(found, *pair) == _pairs(CASES, *pair)
    assert found[: len(known)] == known and len(set(found)) == len(found)
    assert len(found) < len(CASES) // 5
    # Each of the others has a pair that no case before it has.
    for n in range(len(known), len(found)):
        before = found[:n]
        assert any(_pairs([found[n]], *pair) - _pairs(before, *pair) for pair in names)


def test_no_case_twice():
    assert len(set(CASES)) == len(CASES) == len(OPTIMIZERS) * 18
    assert all(x != y for x, y in itertools.pairwise(CASES))
