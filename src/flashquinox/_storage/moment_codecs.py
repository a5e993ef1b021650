import math
from typing import Any, Literal

import equinox as eqx

from .._common.number_checks import check_constant
from .._common.text import shown
from .._rules.rule import Moment, MomentKind
from .codec import AbstractMomentCodec
from .companded import CompandedCodec
from .curves import AbstractCurve, MuLawCurve, RationalCurve
from .fitted_log import FittedLogCodec
from .flashoptim import FlashOptimCodec
from .full_precision import FullPrecision
from .layout import choose_layout, flattened, Layout
from .linear import LinearCodec
from .softsign import SoftsignCodec


class MomentCodecs(eqx.Module):
    r"""Which codec stores which moment.

    `MomentCodecs.named` gives those that [`flashquinox.Storage`][] accepts by name:

    - `"flashquinox"`: fitted logarithm for averages of squares; evenly spaced codes
        for moments relative to one of these, and softsign for other signed moments.
        All are rounded by the rotating threshold.
    - `"flashoptim"`: the codec of the paper.
    - `"float32"`: no compression.
    - `"linear"`, `"sqrt"`, `"fourth_root"`, `"softsign"`, `"log"`: one companding curve
        for both, by a [`flashquinox.CompandedCodec`][]: $x$, $\sqrt x$,
        $\sqrt[4]x$, $2x / (1 + x)$, or $\ln(1 + \mu x) / \ln(1 + \mu)$ with $\mu$
        = 255 for signed moments and 65,535 for averages of squares. (`"softsign"` has
        the [`flashquinox.SoftsignCodec`][] for signed moments.)
    - `"learned"`: a [`flashquinox.RationalCurve`][] for every moment of every leaf, of
        the square root for averages of squares.

    Of a pair of names, the first is for signed moments and the second for averages of
    squares: `Storage(moments=("learned", "flashquinox"))`.

    A signed moment that its rule names as one relative to an average of squares (see
    [`flashquinox.Moment`][]) is stored so by the codec `relative`, which is `signed`
    where it is not given. With `relative=None` it is stored as it is, as by
    `"flashoptim"` and `"float32"`.

    Leaves of at most one axis (biases, the scales of norms) with fewer than
    `smallest_vector` elements keep their moments in full precision: they hold a
    negligible share of the bytes, and the loss of precision would be the largest there.
    So does a moment that its rule keeps exact (see [`flashquinox.Moment`][]), whatever
    the leaf.
    """

    signed: AbstractMomentCodec
    nonnegative: AbstractMomentCodec
    relative: AbstractMomentCodec | None
    smallest_vector: int = eqx.field(static=True)

    def __init__(
        self,
        signed: AbstractMomentCodec,
        nonnegative: AbstractMomentCodec,
        *,
        relative: AbstractMomentCodec | Literal["signed"] | None = "signed",
        smallest_vector: int = 4096,
    ):
        if relative == "signed":
            # Numbers in full precision have nothing to gain.
            relative = None if isinstance(signed, FullPrecision) else signed
        _check_codec("signed", "signed", signed)
        _check_codec("nonnegative", "nonnegative", nonnegative)
        if relative is not None:
            _check_codec("relative", "signed", relative)
        check_constant("MomentCodecs", "smallest_vector", smallest_vector)
        self.signed = signed
        self.nonnegative = nonnegative
        self.relative = relative
        self.smallest_vector = smallest_vector

    @staticmethod
    def named(name: str | tuple[str, str]) -> "MomentCodecs":
        if isinstance(name, str):
            return _named[name]
        signed, nonnegative = (_named[x] for x in name)
        if signed.relative is None:
            return MomentCodecs(signed.signed, nonnegative.nonnegative)
        return MomentCodecs(
            signed.signed, nonnegative.nonnegative, relative=signed.relative
        )

    @staticmethod
    def names() -> tuple[str, ...]:
        return tuple(_named)

    def of(self, moment: Moment, shape: tuple[int, ...]) -> AbstractMomentCodec:
        """The codec for a moment of a leaf of this shape."""
        small = len(shape) <= 1 and math.prod(shape) < self.smallest_vector
        if small or moment.kept == "exact":
            return FullPrecision()
        if moment.kind == "nonnegative":
            return self.nonnegative
        if moment.relative_to is None or self.relative is None:
            return self.signed
        return self.relative

    def base_of(self, moment: Moment, shape: tuple[int, ...]) -> str | None:
        """The name of the moment to the root of which this one of a leaf of this shape
        is stored relative, if it is."""
        if self.relative is None or isinstance(self.of(moment, shape), FullPrecision):
            return None
        return moment.relative_to

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
            return flattened(shape, group_size)
        return choose_layout(shape, group_size, prefer_rows, parts)


def _check_codec(name: str, kind: MomentKind, codec: Any) -> None:
    if not isinstance(codec, AbstractMomentCodec):
        raise TypeError(
            f"`MomentCodecs({name}=...)` takes a "
            f"`flashquinox.AbstractMomentCodec`; got {shown(codec)}."
        )
    if kind not in codec.kinds:
        raise ValueError(
            f"`MomentCodecs({name}=...)` got a {type(codec).__name__} for "
            f"{' and '.join(map(repr, codec.kinds))} moments. Codecs for "
            "signed moments come first."
        )


def _companded(signed: AbstractCurve, nonnegative: AbstractCurve) -> MomentCodecs:
    return MomentCodecs(
        CompandedCodec("signed", signed), CompandedCodec("nonnegative", nonnegative)
    )


def _root(root: int) -> MomentCodecs:
    curve = RationalCurve(0.0, root)
    return _companded(curve, curve)


_named = {
    "flashquinox": MomentCodecs(
        SoftsignCodec(), FittedLogCodec(), relative=LinearCodec()
    ),
    "flashoptim": MomentCodecs(
        FlashOptimCodec("signed"),
        FlashOptimCodec("nonnegative"),
        relative=None,
        smallest_vector=0,
    ),
    "float32": MomentCodecs(FullPrecision(), FullPrecision()),
    "linear": _root(1),
    "sqrt": _root(2),
    "fourth_root": _root(4),
    "softsign": MomentCodecs(
        SoftsignCodec(), CompandedCodec("nonnegative", RationalCurve(1.0))
    ),
    "log": _companded(MuLawCurve(255.0), MuLawCurve(65535.0)),
    "learned": _companded(
        RationalCurve(1.0, learned=True), RationalCurve(1.0, 2, learned=True)
    ),
}
