"""How kernels for GPUs divide leaves among threads."""

import dataclasses
import math
from collections.abc import Sequence

from ..cpp.view import View


# Of a block. 64 are as fast, 256 up to a tenth slower (measured on an H200).
THREADS = 128
_WARP = 32
# The elements of a thread: one load of 16 bytes for each moment. With 8, what concerns
# groups is computed by twice as many threads, and a step takes a tenth longer; with 32,
# registers are for fewer threads, and it takes a fifth longer (measured on an H200).
_MANY_ELEMENTS = 16
# Of kernels for so few elements that most of the GPU is idle: then a thread's own time
# counts.
_FEW_ELEMENTS = 4
_SMALL = 2**19


@dataclasses.dataclass(frozen=True)
class Threads:
    """How the groups of a kernel are divided among threads."""

    group_size: int
    # The threads that share a group: a power of two, neighbours in a warp.
    lanes: int

    @staticmethod
    def of(views: Sequence[View]) -> "Threads":
        is_small = sum([view.size for view in views]) <= _SMALL
        elements = _FEW_ELEMENTS if is_small else _MANY_ELEMENTS
        size = views[0].group_size
        lanes = 2 ** math.ceil(math.log2(max(1.0, size / elements)))
        return Threads(size, min(_WARP, lanes))

    @property
    def elements(self) -> int:
        """Of a thread."""
        return -(-self.group_size // self.lanes)

    def are_full(self, views: Sequence[View]) -> bool:
        """Whether each thread has as many elements as all others."""
        is_divisible = self.lanes * self.elements == self.group_size
        return is_divisible and all([view.run % self.group_size == 0 for view in views])

    def aligned(self, views: Sequence[View], are_parts: bool) -> int:
        """As many elements of a thread that are consecutive start at a multiple of
        their number: a power of two. `are_parts`: of arrays with one leaf after the
        other, as those of an ensemble or of a stack."""
        if not views[0].is_consecutive:
            return 1
        starts = [view.size for view in views] if are_parts else []
        return math.gcd(self.alignment, *starts)

    @property
    def alignment(self) -> int:
        """The first element of each thread is at a multiple of this number, a power of
        two, where groups are of consecutive elements."""
        common = math.gcd(self.group_size, self.elements)
        return common & -common

    def blocks(self, view: View) -> int:
        """The blocks of threads for a leaf."""
        return -(-view.groups * self.lanes // THREADS)
