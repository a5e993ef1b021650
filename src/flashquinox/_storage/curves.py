"""Companding curves: where the codes of a moment lie between zero and the largest
element of its group."""

import abc
import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from .._common.arithmetic import accurate_quotient, rounded_quotient
from .._common.number_checks import check_constant, check_flag


class AbstractCurve(eqx.Module):
    """An increasing curve from [0, 1], which is the magnitude of an element in units of
    the largest of its group, to [0, 1], where codes are evenly spaced.

    The roots that a curve begins with are taken before elements are compared with
    others: `compress` and `expand` are of $n$, the `root`-th root of an element in
    units of the largest one's. Both are called for each tile in each step, possibly
    inside a kernel, with arrays in float32 (float64 for leaves in float64), and must be
    elementwise.
    """

    @property
    @abc.abstractmethod
    def root(self) -> int:
        """1, 2 or 4."""

    @abc.abstractmethod
    def compress(self, n: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        """From elements to codes: is called when a moment is encoded. A scale that was
        rounded down leaves some `n` a little above 1."""

    @abc.abstractmethod
    def expand(self, y: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        """The inverse of `compress`: is called when a moment is decoded."""


class RationalCurve(AbstractCurve):
    r"""A family of one parameter $a \ge 0$, of the root $n = x^{1/\text{root}}$:

    $$y = \frac{(1 + a) \, n}{1 + a \, n}, \qquad n = \frac{y}{1 + a - a \, y}$$

    With $a = 0$ it is linear in the root, with $a = 1$ it is softsign. The larger $a$
    is, the more codes there are for small elements: their share up to $n = 1/a$ is
    one half.

    With `learned=True`, `a` is where training begins: each moment of each leaf finds
    its own, and keeps it in the state (see [`flashquinox.QuantMoment`][]).

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.2,
        has softsign for first moments, and the linear curve of the square root for
        second ones. That both are of one family, which can be learned, is this
        library's.
    """

    a: float = eqx.field(static=True, default=1.0)
    root: int = eqx.field(static=True, default=1)  # pyright: ignore[reportIncompatibleMethodOverride]
    learned: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_constant("RationalCurve", "a", self.a)
        check_constant("RationalCurve", "root", self.root)
        check_flag("RationalCurve", "learned", self.learned)
        if not 0 <= self.a < math.inf or self.root not in (1, 2, 4):
            raise ValueError(
                f"`RationalCurve(a={self.a}, root={self.root})`: `a` must be at least "
                "0, and `root` 1, 2 or 4."
            )

    @property
    def initial(self) -> float | None:
        """What a learned curve begins with. `None` for one that is fixed."""
        return self.a if self.learned else None

    def at(self, a: Scalar) -> AbstractCurve:
        """The curve of this parameter, which may be traced."""
        return _LearnedRationalCurve(a, self.root)

    def compress(self, n: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        return _compress(n, self.a)

    def expand(self, y: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        return _expand(y, self.a)


class _LearnedRationalCurve(AbstractCurve):
    a: Scalar
    root: int = eqx.field(static=True, default=1)  # pyright: ignore[reportIncompatibleMethodOverride]

    def compress(self, n: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        return _compress(n, self.a)

    def expand(self, y: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        return _expand(y, self.a)


def _compress(n: Float[Array, "*tile"], a: float | Scalar) -> Float[Array, "*tile"]:
    if isinstance(a, float) and a == 0:
        return n
    return (1 + a) * rounded_quotient(n, 1 + a * n)


def _expand(y: Float[Array, "*tile"], a: float | Scalar) -> Float[Array, "*tile"]:
    if isinstance(a, float) and a == 0:
        return y
    return accurate_quotient(y, (1 + a) - a * y)


class MuLawCurve(AbstractCurve):
    r"""A logarithm that goes through zero, with $\mu > 0$:

    $$y = \frac{\ln(1 + \mu \, x)}{\ln(1 + \mu)}, \qquad
    x = \frac{(1 + \mu)^y - 1}{\mu}$$

    Codes are evenly spaced on the logarithm of elements above $1/\mu$, and on the
    elements themselves below.

    ??? cite "Reference"

        ITU-T Recommendation G.711, which has it for telephony, with $\mu = 255$.
    """

    mu: float = eqx.field(static=True, default=255.0)

    def __check_init__(self):
        check_constant("MuLawCurve", "mu", self.mu)
        if not 0 < self.mu < math.inf:
            raise ValueError(f"`MuLawCurve(mu={self.mu})`: `mu` must be more than 0.")

    @property
    def root(self) -> int:
        return 1

    def compress(self, n: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        return jnp.log(1 + self.mu * n) * (1 / math.log1p(self.mu))

    def expand(self, y: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        return (jnp.exp(math.log1p(self.mu) * y) - 1) * (1 / self.mu)
