import math

import equinox as eqx

from ._codec import AbstractMomentCodec
from ._codecs.fitted_log import FittedLogCodec
from ._codecs.flashoptim import FlashOptimCodec
from ._codecs.full_precision import FullPrecision
from ._codecs.softsign import SoftsignCodec
from ._layout import choose_layout, Layout
from ._rule import MomentKind


class MomentCodecs(eqx.Module):
    """Which codec stores which moment.

    `MomentCodecs.named` gives the three that `moments=` accepts by name:

    - `"flashquinox"`: softsign, rounded to nearest, for signed moments; fitted
        logarithm with rotating dither for averages of squares.
    - `"flashoptim"`: the codec of the paper.
    - `"float32"`: no compression.

    Leaves of at most one axis (biases, the scales of norms) with fewer than
    `smallest_vector` elements keep their moments in full precision: they hold a
    negligible share of the bytes, and the loss of precision would be the largest there.
    """

    signed: AbstractMomentCodec
    nonnegative: AbstractMomentCodec
    smallest_vector: int = eqx.field(static=True, default=4096)

    @staticmethod
    def named(name: str) -> "MomentCodecs":
        return _named[name]

    @staticmethod
    def names() -> tuple[str, ...]:
        return tuple(_named)

    def of(self, kind: MomentKind, shape: tuple[int, ...]) -> AbstractMomentCodec:
        """The codec for a moment of this kind, of a leaf of this shape."""
        if len(shape) <= 1 and math.prod(shape) < self.smallest_vector:
            return FullPrecision()
        return self.signed if kind == "signed" else self.nonnegative

    def layout(
        self,
        shape: tuple[int, ...],
        group_size: int,
        prefer_rows: bool = False,
        parts: tuple[int, ...] | None = None,
    ) -> Layout:
        """The groups of a leaf of this shape, which is cut into `parts` along each
        axis."""
        if self.signed.flattened or self.nonnegative.flattened:
            return Layout(shape, None, group_size)
        return choose_layout(shape, group_size, prefer_rows, parts)


_named = {
    "flashquinox": MomentCodecs(SoftsignCodec(), FittedLogCodec()),
    "flashoptim": MomentCodecs(
        FlashOptimCodec("signed"), FlashOptimCodec("nonnegative"), smallest_vector=0
    ),
    "float32": MomentCodecs(FullPrecision(), FullPrecision()),
}
