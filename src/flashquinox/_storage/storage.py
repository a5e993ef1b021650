"""How an optimizer stores weights and moments."""

import functools
import itertools
from typing import Any, final, Literal, TypeAlias

import equinox as eqx
import numpy as np

from .._common.number_checks import check_flag
from .._common.text import shown
from .codec import AbstractMomentCodec
from .codec_checks import check_codec
from .moment_codecs import MomentCodecs
from .split import CORRECTION_DTYPES


MasterWeightBits: TypeAlias = Literal["auto", 24, 32] | None
Moments: TypeAlias = str | tuple[str, str] | MomentCodecs

# What `master_weight_bits="auto"` is for weights that a correction can extend.
AUTO_BITS: Literal[24] = 24


@final
class Storage(eqx.Module):
    r"""How an optimizer stores weights and moments: the argument `storage` of
    [`flashquinox.adamw`][] and the others.

    A weight in bfloat16 or float16 and its integer correction $\ell$ together hold a
    master weight of 24 or 32 bits; see [`flashquinox.ECCWeight`][]. A moment is codes
    of 8 bits and one 16-bit scale per group. With the defaults, AdamW stores

    $$\underbrace{2}_\text{weight} + \underbrace{1}_\text{correction}
    + 2 \left(\underbrace{1}_\text{codes} + \underbrace{2/32}_\text{scales}\right)
    = 5.125 \text{ bytes per parameter.}$$

    ??? Example

        ```python
        storage = fq.Storage(master_weight_bits=32, moments="float32")
        optim = fq.adamw(1e-3, storage=storage)
        ```

    All fields are static, and a storage has a hash. `moments` keeps the shortest
    spelling of the codecs: `Storage(moments=("log", "log"))` equals
    `Storage(moments="log")`.

    **Arguments:**

    - `master_weight_bits`: the precision in which bfloat16 and float16 weights
        accumulate updates. 24 adds an `int8` correction per weight, 32 an `int16`;
        `None` none. `"auto"` is 24, but does not ask for such weights: 24 and 32 are an
        error for a model, or a group of weights, that has none.
    - `moments`: how moments are stored: `"flashquinox"` (8 bits), `"learned"` (8 bits,
        by curves that follow the moments), `"flashoptim"` (8 bits, the paper's codec),
        `"float32"` (uncompressed), another name or a pair of names in
        [`flashquinox.MomentCodecs`][], or one of these.
    - `group_size`: how many elements share a scale: a multiple of 16 from 16 to 128.
    - `dither_weights`: whether master weights of bfloat16 and float16 weights are
        rounded by a threshold that rotates from step to step, instead of to nearest: a
        step of a hundredth of a unit in their last place then moves them by one unit in
        one of a hundred cases, where rounding to nearest would lose it. A weight that
        gets no update does not move. With `master_weight_bits=None` they are rounded to
        the weight itself; with 32, bfloat16 weights lose nothing to round.
    - `pack_below`: arrays of leaves with fewer elements than this are parts of a few
        common ones: for small models whose steps are single calls from Python, as JAX
        takes a microsecond and more for each array of a call. 65,536 is a good bound;
        0 packs nothing. Every number is the same, and the fields of a state show each
        array by itself; its leaves, as JAX and `eqx.tree_at` see them, are the common
        arrays. Kernels for GPUs and programs for CPUs take these as they are, where all
        that are in one are trained alike; otherwise, and on TPUs, a step copies the
        parts out and back, and takes longer to compile the more small leaves there are.
        Leaves that are divided over devices, or whose state is in host memory, and
        those in `Variable`s of Flax are not packed. Under `jit`, none are where a mesh
        with automatic axes is set, which may divide them; where none is set, JAX does
        not tell, so call `init` outside of `jit` then, or pass `shardings`. In an
        ensemble, the axis of the members comes first, and may be divided.

    **Raises:**

    `ValueError` or `TypeError` for arguments out of range, and for a codec that is not
    elementwise or whose parts do not fit together.
    """

    master_weight_bits: MasterWeightBits = eqx.field(static=True)
    moments: Moments = eqx.field(static=True)
    group_size: int = eqx.field(static=True)
    dither_weights: bool = eqx.field(static=True)
    pack_below: int = eqx.field(static=True)

    def __init__(
        self,
        *,
        master_weight_bits: MasterWeightBits = "auto",
        moments: Moments = "flashquinox",
        group_size: int | np.integer = 32,
        dither_weights: bool = True,
        pack_below: int | np.integer = 0,
    ):
        self.master_weight_bits = _check_master_weight_bits(master_weight_bits)
        self.moments = _shortest(_check_moments(moments))
        self.group_size = _check_group_size(group_size)
        self.dither_weights = check_flag("Storage", "dither_weights", dither_weights)
        self.pack_below = _check_pack_below(pack_below)

    @property
    def codecs(self) -> MomentCodecs:
        """The codecs that `moments` means."""
        if isinstance(self.moments, MomentCodecs):
            return self.moments
        return _named(self.moments)

    @property
    def correction_dtype(self) -> np.dtype | None:
        """The dtype of the corrections of bfloat16 and float16 weights."""
        bits = self.master_weight_bits
        if bits is None:
            return None
        return CORRECTION_DTYPES[AUTO_BITS if bits == "auto" else bits]

    def __repr__(self) -> str:
        """One line: the call that makes this, without what is left at its default."""
        changed = [
            f"{name}={_text(value)}"
            for name, default in _DEFAULTS.items()
            if (value := getattr(self, name)) != default
        ]
        return f"Storage({', '.join(changed)})"


_named = functools.cache(MomentCodecs.named)

_DEFAULTS = {
    "master_weight_bits": "auto",
    "moments": "flashquinox",
    "group_size": 32,
    "dither_weights": True,
    "pack_below": 0,
}


def check_storage(call: str, value: Any) -> Storage:
    if isinstance(value, Storage):
        return value
    hint = " Make one: `Storage(...)`." if value is Storage else ""
    raise TypeError(
        f"`{call}(storage=...)` takes a `flashquinox.Storage`; got "
        f"{shown(value)}.{hint}"
    )


def _check_master_weight_bits(value: Any) -> MasterWeightBits:
    bits = _as_python(value)
    if bits is None or (type(bits) in (int, str) and bits in ("auto", 24, 32)):
        return bits
    raise ValueError(
        "`Storage(master_weight_bits=...)` must be 'auto', 24, 32 or None; got "
        f"{shown(value)}."
    )


def _check_group_size(value: Any) -> int:
    size = _as_python(value)
    if type(size) is int and size in range(16, 129, 16):
        return size
    raise ValueError(
        "`Storage(group_size=...)` must be a multiple of 16 from 16 to 128, as an "
        f"integer; got {shown(value)}."
    )


def _check_pack_below(value: Any) -> int:
    size = _as_python(value)
    if type(size) is int and size >= 0:
        return size
    raise ValueError(
        "`Storage(pack_below=...)` must be a number of elements, as an integer of at "
        f"least 0; got {shown(value)}."
    )


def _as_python(value: Any) -> Any:
    return int(value) if isinstance(value, np.integer) else value


def _check_moments(moments: Any) -> MomentCodecs:
    if isinstance(moments, MomentCodecs):
        for codec in filter(
            None, (moments.signed, moments.nonnegative, moments.relative)
        ):
            _check_hash(codec)
            check_codec("Storage", codec)
        return moments
    known = MomentCodecs.names()
    is_known = lambda name: isinstance(name, str) and name in known
    if is_known(moments):
        return MomentCodecs.named(moments)
    if isinstance(moments, tuple | list) and len(moments) == 2:
        signed, nonnegative = moments
        if is_known(signed) and is_known(nonnegative):
            return MomentCodecs.named((signed, nonnegative))
    names = ", ".join(map(repr, known))
    raise ValueError(
        f"`Storage(moments=...)` must be one of {names}, a pair of these (for signed "
        "moments and for averages of squares), or a `flashquinox.MomentCodecs`; got "
        f"{shown(moments)}."
    )


def _check_hash(codec: AbstractMomentCodec) -> None:
    try:
        hash(codec)
    except TypeError as error:
        raise TypeError(
            f"`Storage(moments=...)`: a {type(codec).__name__} has no hash ({error}), "
            "but is part of programs. Its fields must be static: numbers, strings, "
            "curves and the like, not arrays."
        ) from None


def _shortest(codecs: MomentCodecs) -> Moments:
    """The first name or pair of names that means these codecs; the codecs themselves if
    there is none. So equal codecs have one spelling."""
    named = {name: MomentCodecs.named(name) for name in MomentCodecs.names()}
    for name, other in named.items():
        if other == codecs:
            return name
    signed = [name for name, x in named.items() if x.signed == codecs.signed]
    nonnegative = [
        name for name, x in named.items() if x.nonnegative == codecs.nonnegative
    ]
    pairs = itertools.product(signed, nonnegative)
    return next((x for x in pairs if MomentCodecs.named(x) == codecs), codecs)


def _text(value: Any) -> str:
    if isinstance(value, MomentCodecs):
        alike = MomentCodecs(value.signed, value.nonnegative).relative
        relative = "" if value.relative == alike else f", relative={value.relative!r}"
        return f"MomentCodecs({value.signed!r}, {value.nonnegative!r}{relative})"
    return repr(value)
