"""The program of a kernel: one step of several leaves.

It is a prelude that all kernels share, and one function of four parts. A block finds
out which leaf it is of; a thread, which elements of which group it has, and loads them;
the statements of the translation follow; and what they computed is stored.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..cpp.translation import GRAD, text_of, Translation, WEIGHT
from ..cpp.values import indented
from ..cpp.view import View
from .threads import THREADS, Threads


class Kernel(NamedTuple):
    """What a program depends on. Hashable.

    Its arguments are pointers: to the words of the scalars of all leaves, and, if there
    are any, to those of each leaf; of each leaf in turn, to the gradient and the arrays
    of its state; and to the arrays of the new states, which are the same ones: see
    `first`.
    """

    name: str
    translation: Translation
    views: tuple[View, ...]
    threads: Threads
    # Each scalar as an expression of the words.
    scalars: tuple[str, ...]
    # Of each array of words, how far apart those of the models are: 0 where they share
    # them.
    strides: tuple[int, ...]
    # How many of the new arrays XLA knows as results: see `host_arrays.py`.
    results: int
    # The models that take a step together: their arrays lie one after the other.
    members: int = 1
    # Which of the gradient and the arrays of its state each leaf has as an argument. Of
    # others, there is one array of all leaves, one after the other: gradients and
    # arrays of states before the arguments of leaves, new weights before the other
    # results. Leaves are of one size if that is gradients.
    own: tuple[int, ...] = ()
    # The array whose place the first result takes.
    first: int = WEIGHT
    # The dtype of new weights that are in such an array; old ones are not read. Or
    # `None`.
    fresh: str | None = None
    # That of a new weight in such an array, if they are to be a stack: XLA would not
    # know its parts, put together, to be the array, if it was flat. Or `None`: then
    # leaves of any size start at multiples of `threads.alignment`.
    shape: tuple[int, ...] | None = None

    @property
    def blocks(self) -> int:
        """Those of one model."""
        return sum([self.threads.blocks(view) for view in self.views])

    def states(self, operands: int) -> list[int]:
        """Which of so many arrays of words, gradients and states are written to, in the
        order of the arrays of states."""
        first = len(self.strides) + self._has_stack
        start = first + len(self._common)
        own = [self.own[i % len(self.own)] for i in range(operands - start)]
        kept = WEIGHT if self.first == GRAD else GRAD
        of_leaves = [start + i for i, which in enumerate(own) if which != kept]
        return [*range(first, start), *of_leaves]

    def own_results(self, operands: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        """The shapes and the dtypes of results in memory of their own, which come
        before the others: the array of new weights; or, if all of a state is in host
        memory, a number that nobody writes or reads, but that can be waited for."""
        if self.fresh is not None:
            members = operands[-1].shape[:-1]
            own = (self.before(len(self.views), WEIGHT),)
            if self.shape is not None:
                own = len(self.views), *self.shape
            return [jax.ShapeDtypeStruct((*members, *own), jnp.dtype(self.fresh))]
        if self.results == 0:
            return [jax.ShapeDtypeStruct((1,), jnp.int32)]
        return []

    @property
    def _has_stack(self) -> bool:
        """Whether gradients are in one array."""
        return GRAD not in self.own

    @property
    def _common(self) -> list[int]:
        """The arrays of states that all leaves have in one."""
        arrays = range(WEIGHT + 1, len(self.translation.input_types))
        return [i for i in arrays if i not in self.own]

    def before(self, leaf: int, array: int) -> int:
        """How many entries an array of all leaves has before those of a leaf."""
        is_scale = self.translation.is_scale[array]
        sizes = [view.groups if is_scale else view.size for view in self.views[:leaf]]
        if array == WEIGHT and self._has_flat_results:
            unit = self.threads.alignment
            sizes = [-(-size // unit) * unit for size in sizes]
        return sum(sizes)

    @property
    def _has_flat_results(self) -> bool:
        return self.fresh is not None and self.shape is None

    @property
    def _words(self) -> list[tuple[str, int]]:
        return list(zip(("shared", "own"), self.strides, strict=False))

    @property
    def source(self) -> str:
        body = "\n".join(f"  {line}" for line in self._body())
        pointers = ",\n".join(f"    {line}" for line in self._pointers())
        head = f'extern "C" __global__ void __launch_bounds__({THREADS}) {self.name}('
        return f"{text_of('cpp/prelude.h')}\n{head}\n{pointers}) {{\n{body}\n}}\n"

    def _pointers(self) -> Iterator[str]:
        yield ", ".join(f"const int* {x}" for x, _ in self._words)
        types = self.translation.input_types
        if self._has_stack:
            yield f"{types[GRAD]}* grads"
        for i in self._common:
            yield f"{types[i]}* c{i}"
        for leaf in range(len(self.views)):
            yield ", ".join(f"{types[i]}* p{leaf}_{i}" for i in self.own)
        yield ", ".join(f"void* q{i}" for i in range(max(1, self.results)))

    def _body(self) -> Iterator[str]:
        threads = self.threads
        are_parts = self.members > 1 or self._has_parts
        aligned = threads.aligned(self.views, are_parts)
        yield f"constexpr int N = {threads.elements}, LANES = {threads.lanes};"
        yield f"constexpr int GROUP_SIZE = {threads.group_size}, ALIGNED = {aligned};"
        yield ""
        yield from self._leaf()
        yield ""
        yield from self._elements()
        yield ""
        yield from self.translation.lines
        yield ""
        yield from self._stores()

    def _leaf(self) -> Iterator[str]:
        member = " of a member" if self.members > 1 else ""
        yield f"// The leaf{member} that this block is of, and the first of its blocks."
        if self.members > 1:
            yield f"const unsigned block = blockIdx.x % {self.blocks}u;"
            yield f"const long long member = blockIdx.x / {self.blocks}u;"
        else:
            yield "const unsigned block = blockIdx.x;"
        yield "unsigned leaf, number, first_block, groups;"
        yield "long long size;"
        if not self._is_consecutive:
            yield "unsigned run, groups_of_run, columns;"
        for i, kind in enumerate(self.translation.input_types):
            yield f"{kind}* p{i};"
        ends = itertools.accumulate(self.threads.blocks(view) for view in self.views)
        yield from self._chosen([0, *ends], 0, len(self.views))
        if self.members > 1:
            for words, stride in self._words:
                yield f"{words} += member * {stride};"
            for i, is_scale in enumerate(self.translation.is_scale):
                size = "groups" if is_scale else "size"
                if i not in self.own:
                    size = f"{self.before(len(self.views), i)}ll"
                yield f"p{i} += member * {size};"

    def _chosen(self, starts: Sequence[int], first: int, last: int) -> Iterator[str]:
        """One of the leaves from `first` to before `last`, by binary search."""
        if last - first > 1:
            middle = (first + last) // 2
            yield f"if (block < {starts[middle]}u) {{"
            yield from indented(self._chosen(starts, first, middle))
            yield "} else {"
            yield from indented(self._chosen(starts, middle, last))
            yield "}"
            return
        view = self.views[first]
        yield f"leaf = {first}; number = {view.number or 0}u;"
        yield f"first_block = {starts[first]}u;"
        yield f"groups = {view.groups}u; size = {view.size}ll;"
        if not self._is_consecutive:
            yield f"run = {view.run}u; groups_of_run = {view.groups_of_run}u;"
            yield f"columns = {view.columns}u;"
        types = self.translation.input_types
        texts = [f"p{first}_{i}" for i in range(len(types))]
        whole = {i: f"c{i}" for i in self._common}
        if self._has_stack:
            whole[GRAD] = "grads"
        if self.fresh is not None:
            whole[WEIGHT] = f"({types[WEIGHT]}*)q0"
        for i, text in whole.items():
            texts[i] = f"{text} + {self.before(first, i)}ll"
        yield " ".join(f"p{i} = {text};" for i, text in enumerate(texts))

    @property
    def _has_parts(self) -> bool:
        """Whether leaves are parts of arrays, wherever the one before ends."""
        in_one = len(self.translation.input_types) - len(self.own)
        return in_one > int(self._has_flat_results)

    @property
    def _is_consecutive(self) -> bool:
        return self.views[0].is_consecutive

    def _elements(self) -> Iterator[str]:
        yield "// The group that this thread is of. Where there is none, it computes"
        yield "// the last one with the others, and stores nothing."
        yield f"const unsigned first_thread = (block - first_block) * {THREADS}u;"
        yield "const unsigned thread = first_thread + threadIdx.x;"
        yield "const bool is_there = thread / LANES < groups;"
        yield "const unsigned group = is_there ? thread / LANES : groups - 1;"
        if self._is_consecutive:
            yield "const long long start = (long long)group * GROUP_SIZE, stride = 1;"
            if self._has_partial:
                yield "const long long left = size - start;"
        else:
            yield "const unsigned column = group % columns, row = group / columns;"
            yield "const unsigned of_run = row % groups_of_run * GROUP_SIZE;"
            yield "const long long stride = columns;"
            yield "const long long first_row = (long long)(row / groups_of_run) * run;"
            yield "const long long start = (first_row + of_run) * stride + column;"
            if self._has_partial:
                yield "const unsigned left = run - of_run;"
        yield "// Of its elements, this thread has N" + (
            ", of which `count` exist." if self._has_partial else "."
        )
        yield "const int first = thread % LANES * N;"
        if self._has_partial:
            yield "const int here = left < GROUP_SIZE ? (int)left : GROUP_SIZE;"
            yield "const int count = here - first;"
        yield "const long long at = start + first * stride;"
        arrays = []
        types = zip(
            self.translation.input_types, self.translation.is_scale, strict=True
        )
        for i, (kind, is_scale) in enumerate(types):
            if i == WEIGHT and self.fresh is not None:
                continue
            if is_scale:
                yield f"const {kind} x{i} = p{i}[group];"
            else:
                yield f"{kind} x{i}[N];"
                arrays.append((f"x{i}", i))
        yield from self._moved("load", arrays)
        scalars = zip(self.translation.scalar_types, self.scalars, strict=True)
        for i, (kind, text) in enumerate(scalars):
            yield f"const {kind} s{i} = {text};"
        for i, (kind, is_scale) in enumerate(self._outputs):
            if not is_scale:
                yield f"{kind} y{i}[N];"

    def _stores(self) -> Iterator[str]:
        yield "if (!is_there) return;"
        arrays = []
        for i, (_, is_scale) in enumerate(self._outputs, start=1):
            if is_scale:
                yield f"if (first == 0) p{i}[group] = y{i - 1};"
            else:
                arrays.append((f"y{i - 1}", self.first if i == WEIGHT else i))
        yield from self._moved("store", arrays)

    def _moved(self, function: str, arrays: Sequence[tuple[str, int]]) -> Iterator[str]:
        """Loads or stores, of elements of a thread in arrays with these numbers. Code
        that no thread runs is left out: to compile it takes as long."""
        whole = [f"{function}<N, ALIGNED>({x}, p{i} + at, stride);" for x, i in arrays]
        if not self._has_partial:
            yield from whole
            return
        yield "if (count >= N) {"
        yield from indented(whole)
        yield "} else {"
        yield from indented(
            f"{function}_part<N>({x}, p{i} + at, count, stride);" for x, i in arrays
        )
        yield "}"

    @property
    def _has_partial(self) -> bool:
        """Whether a thread may have fewer elements than others."""
        return not self.threads.are_full(self.views)

    @property
    def _outputs(self) -> list[tuple[str, bool]]:
        """The types of the new arrays, and whether they are scales."""
        types, is_scale = self.translation.output_types, self.translation.is_scale[1:]
        return list(zip(types, is_scale, strict=True))
