"""Values of a traced tile function, and the statements that compute them."""

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..base import Unsupported
from .types import type_of


# A tile that stands for all: groups, and elements of each.
TILE = (3, 5)
# Of an array whose elements differ: there is no expression.
VARIED = ""
# In place of what the turns of a loop leave behind: it is not known.
STACKED = np.empty((0,))


class Kind(enum.IntEnum):
    """What a value is the same for."""

    LEAF = 0
    GROUP = 1
    ELEMENT = 2

    @staticmethod
    def of(shape: tuple[int, ...]) -> "Kind":
        size = math.prod(shape)
        groups, elements = TILE
        kinds = {1: Kind.LEAF, groups: Kind.GROUP, groups * elements: Kind.ELEMENT}
        if size not in kinds:
            raise Unsupported(f"an array of another shape than a tile's: {shape}")
        return kinds[size]


@dataclasses.dataclass(frozen=True)
class Value:
    """A variable, or a number."""

    text: str
    dtype: Any
    kind: Kind
    # After how many reductions it is known.
    stage: int = 0
    # Whether all elements of a thread are there, in every loop.
    is_array: bool = False
    # Of a number, or an array: itself.
    constant: Any = dataclasses.field(default=None, compare=False)


class Statement(NamedTuple):
    targets: Sequence[Value]
    operands: Sequence[Value]
    # Its lines, of the operands' expressions.
    lines: Callable[[Sequence[str]], list[str]]
    # Of a reduction over the elements of a group: what is applied to two of them.
    reduction: str | None = None

    @property
    def kind(self) -> Kind:
        """Of what there is one such statement."""
        return Kind.ELEMENT if self.reduction else self.targets[0].kind

    @property
    def stage(self) -> int:
        """After how many reductions it stands."""
        return self.targets[0].stage - bool(self.reduction)


def declared(value: Value) -> str:
    return f"{type_of(value.dtype)} {value.text}"


def texts_of(x: Statement) -> list[str]:
    """The expressions of its operands."""
    texts = []
    for y in x.operands:
        is_elsewhere = y.kind == Kind.ELEMENT and y.stage != x.stage
        suffix = "[i]" if y.is_array else "s[i]" if is_elsewhere else ""
        texts.append(y.text + suffix)
    return texts


def indented(lines: Iterable[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)
