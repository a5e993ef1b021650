"""References to arrays whose pairs of matrices lie together: see `GroupsInMemory`."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class PairsRef:
    """A reference to an array `(..., rows, ..., matrices, columns)`, by indices of
    `(..., matrices, ..., rows, columns)`."""

    ref: Any
    # In the order of the array, the axes of its indices.
    axes: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        return self.ref.dtype

    def __getitem__(self, index: Any) -> Any:
        return self.ref[self.own(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.ref[self.own(index)] = value

    @property
    def at(self) -> "_Parts":
        return _Parts(self)

    def own(self, index: Any) -> Any:
        return index if index is ... else tuple([index[axis] for axis in self.axes])


@dataclasses.dataclass(frozen=True)
class _Parts:
    pairs: PairsRef

    def __getitem__(self, index: Any) -> Any:
        return self.pairs.ref.at[self.pairs.own(index)]
