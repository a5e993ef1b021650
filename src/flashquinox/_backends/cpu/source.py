"""The program for a CPU: one step of several leaves.

A block is of some groups of one leaf. A thread takes them a few at a time: it loads
their elements, computes in loops over groups, and over the elements of each, of which
compilers make vectors, and stores what it computed.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from ..cpp.statements import Walk
from ..cpp.translation import text_of, Translation
from ..cpp.types import type_of
from ..cpp.values import indented, Kind, Statement, texts_of, Value
from ..cpp.view import View


# Elements that a thread has at a time: with what is computed of them, they stay in the
# smallest cache.
_ELEMENTS = 512
# Compilers make vectors of so many groups.
_FEWEST_GROUPS = 8
# Past its end, a leaf is computed with elements of its own once more. Where no leaf is
# larger than this, fewer elements at a time take less: a step of the MLP of the zoo
# takes five sixths of the time (two cores of a Xeon); of large leaves, up to a tenth
# more.
_SMALL = 2**12


def most_together(group_size: int) -> int:
    """How many groups a thread has at a time."""
    return max(_FEWEST_GROUPS, _ELEMENTS // group_size)


def groups_together(views: Sequence[View]) -> int:
    """The same, of leaves that are stored alike."""
    if max(view.size for view in views) <= _SMALL:
        return _FEWEST_GROUPS
    return most_together(views[0].group_size)


class Source(NamedTuple):
    """What a program depends on. Hashable."""

    translation: Translation
    group_size: int
    # How many groups a thread has at a time.
    together: int
    # Each scalar as an expression of the words.
    scalars: tuple[str, ...]
    # How many arrays of words there are.
    words: int
    # Which of the gradient and the arrays of its state all leaves have in one array,
    # and which each has.
    common: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def text(self) -> str:
        """In C++, but for its name."""
        names = ("cpu/host.h", "cpp/prelude.h", "cpu/program.h", "cpu/call.h")
        body = "\n".join(indented(self._body()))
        head = (
            "static void take_block(const Call& call, const Leaf& view, unsigned leaf, "
            "long long member, long long block) {"
        )
        return "\n".join([*map(text_of, names), f"{head}\n{body}\n}}\n"])

    def _body(self) -> Iterator[str]:
        yield f"constexpr int N = {self.group_size}, M = {self.together};"
        yield "const long long start = block * call.groups_of_block;"
        yield "const long long next = start + call.groups_of_block;"
        yield "const long long end = next < view.groups ? next : view.groups;"
        yield "const unsigned number = (unsigned)view.number;"
        for i, name in enumerate(("shared", "own")[: self.words]):
            place = f"call.in[{i}] + member * call.strides[{i}]"
            yield f"const int* {name} = (const int*){place};"
        types = self.translation.input_types
        for i, place in self._places(self.own, self.words).items():
            kind = f"const {types[i]}*"
            yield f"{kind} p{i} = ({kind})call.in[{place}] + {self._before(i)};"
        outputs = [i for i, _ in enumerate(self._outputs, start=1)]
        own = [i for i in outputs if i not in self.common]
        for i, place in self._places(own, 0).items():
            kind, _ = self._outputs[i - 1]
            yield f"{kind}* q{i - 1} = ({kind}*)call.out[{place}] + {self._before(i)};"
        scalars = zip(self.translation.scalar_types, self.scalars, strict=True)
        for i, (kind, text) in enumerate(scalars):
            yield f"const {kind} s{i} = {text};"
        yield "for (long long first = start; first < end; first += M) {"
        yield from indented(self._groups())
        yield "}"

    def _places(self, own: Sequence[int], first: int) -> dict[int, str]:
        """Which of the operands, or results, after the first ones are these arrays of a
        leaf, and which are those of all leaves."""
        places = {i: f"{at}" for at, i in enumerate(self.common, start=first)}
        for at, i in enumerate(own, start=first + len(self.common)):
            places[i] = f"{at} + leaf * {len(own)}ll"
        return places

    def _before(self, array: int) -> str:
        """The entries of an array that are of members before this one, and of leaves
        before this one."""
        kind = "groups" if self.translation.is_scale[array] else "elements"
        if array in self.common:
            return f"member * call.{kind} + view.{kind}_before"
        return f"member * view.{kind}"

    def _groups(self) -> Iterator[str]:
        """A few groups. Past the end, they are the last one once more."""
        yield "const bool are_whole ="
        yield "  view.is_consecutive && first + M <= end &&"
        yield "  (first + M) * N <= view.elements;"
        yield "long long numbers[M];"
        yield "for (int g = 0; g < M; ++g)"
        yield "  numbers[g] = first + g < end ? first + g : end - 1;"
        yield "Place places[M];"
        yield "if (!are_whole)"
        yield "  for (int g = 0; g < M; ++g) places[g] = place_of(view, numbers[g], N);"
        for i in (*self.common, *self.own):
            kind = self.translation.input_types[i]
            if self.translation.is_scale[i]:
                yield f"{kind} x{i}_of[M];"
                yield f"for (int g = 0; g < M; ++g) x{i}_of[g] = p{i}[numbers[g]];"
            else:
                yield f"{kind} x{i}_of[M][N];"
                yield f"if (!are_whole) load_groups<M, N>(x{i}_of, p{i}, places);"
        for i, (kind, is_scale) in enumerate(self._outputs):
            yield f"{kind} y{i}_of[M]{'' if is_scale else '[N]'};"
        yield from self.translation.lines
        for i, (_, is_scale) in enumerate(self._outputs):
            if is_scale:
                yield f"for (int g = 0; g < M; ++g) q{i}[numbers[g]] = y{i}_of[g];"
            else:
                size = f"sizeof y{i}_of"
                yield f"if (are_whole) memcpy(q{i} + first * N, y{i}_of, {size});"
                yield f"else store_groups<M, N>(q{i}, y{i}_of, places);"

    @property
    def _outputs(self) -> list[tuple[str, bool]]:
        """The types of the new arrays, and whether they are scales."""
        types, is_scale = self.translation.output_types, self.translation.is_scale[1:]
        return list(zip(types, is_scale, strict=True))


def lines(walk: Walk) -> Iterator[str]:
    """The statements of a function, in loops over groups and their elements."""
    loops = _loops(walk.statements)
    kept = _kept(loops)
    for kind, statements in loops:
        if kind == Kind.LEAF:
            for x in statements:
                yield from x.lines(texts_of(x))
            continue
        targets = [y for x in statements for y in x.targets]
        reductions = [x for x in statements if x.reduction]
        reduced = {x.targets[0] for x in reductions}
        for y in targets:
            if y in reduced or (y.kind == Kind.GROUP and y in kept):
                if not _is_output(y):
                    yield f"{_stored_type(y)} {y.text}_of[M];"
            elif y.kind == Kind.ELEMENT and y in kept:
                yield f"{_stored_type(y)} {y.text}_of[M][N];"
        for x in reductions:
            yield f"{type_of(x.targets[0].dtype)} {x.targets[0].text}_all[M][N];"
        yield "for (int g = 0; g < M; ++g) {"
        yield from indented(_opened(kind, statements))
        if kind == Kind.GROUP:
            for x in statements:
                yield from indented(x.lines(texts_of(x)))
                for y in x.targets:
                    if y in kept:
                        yield f"  {y.text}_of[g] = {_stored(y)};"
        else:
            for y in targets:
                if y.kind == Kind.ELEMENT and y in kept:
                    yield f"  auto* {y.text}s = {y.text}_of[g];"
            yield "  LOOP"
            yield "  for (int i = 0; i < N; ++i) {"
            for x in statements:
                if x.reduction:
                    (text,) = texts_of(x)
                    yield f"    {x.targets[0].text}_all[g][i] = {text};"
                    continue
                yield from indented(indented(x.lines(texts_of(x))))
                for y in x.targets:
                    if y in kept:
                        yield f"    {y.text}s[i] = {_stored(y)};"
            yield "  }"
        yield "}"
        for x in reductions:
            name = x.targets[0].text
            yield "for (int g = 0; g < M; ++g)"
            yield f"  {name}_of[g] = reduced_{x.reduction}<N>({name}_all[g]);"


def _loops(
    statements: Sequence[Statement],
) -> list[tuple[Kind, list[Statement]]]:
    """The statements of one loop each, in order."""
    of_loop = lambda x: (x.stage, x.kind)
    ordered = sorted(statements, key=of_loop)
    return [
        (kind, list(some)) for (_, kind), some in itertools.groupby(ordered, of_loop)
    ]


def _kept(loops: Sequence[tuple[Kind, list[Statement]]]) -> set[Value]:
    """What other loops read than the one that computes it."""
    kept = set()
    for kind, statements in loops:
        here = {y for x in statements for y in x.targets if not x.reduction}
        for x in statements:
            kept |= {y for y in x.operands if y not in here and not y.is_array}
            if kind == Kind.GROUP:
                kept |= {y for y in x.targets if _is_output(y)}
    return kept


def _opened(kind: Kind, statements: Sequence[Statement]) -> Iterator[str]:
    """What a loop reads that others have computed, of a group."""
    here = {y for x in statements for y in x.targets if not x.reduction}
    operands = {y: None for x in statements for y in x.operands if y not in here}
    for y in operands:
        if y.kind == Kind.GROUP:
            stored = f"{y.text}_of[g]"
            value = f"{stored} != 0" if _is_bool(y) else stored
            yield f"const {type_of(y.dtype)} {y.text} = {value};"
        elif y.kind == Kind.ELEMENT and y.is_array:
            place = f"p{y.text[1:]} + (first + g) * N"
            yield f"const auto* {y.text} = are_whole ? {place} : {y.text}_of[g];"
        elif y.kind == Kind.ELEMENT:
            yield f"const auto* {y.text}s = {y.text}_of[g];"
    if kind == Kind.ELEMENT:
        for x in statements:
            for y in x.targets:
                if y.is_array:
                    yield f"auto* {y.text} = {y.text}_of[g];"


def _is_output(y: Value) -> bool:
    return y.text.startswith("y")


def _is_bool(y: Value) -> bool:
    return y.dtype == jnp.bool_


def _stored_type(y: Value) -> str:
    # Compilers make vectors of integers, and not of `bool` in memory.
    return "int" if _is_bool(y) else type_of(y.dtype)


def _stored(y: Value) -> str:
    return f"{y.text} ? 1 : 0" if _is_bool(y) else y.text
