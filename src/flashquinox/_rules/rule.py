"""An optimizer is three things: a *rule* (which moments it keeps, and how they turn a
gradient into an update), a *codec* (how a moment is stored in 8 bits), and a *split*
(how a float32 weight is stored as a narrow weight plus a correction).

For example, AdamW is `Adam` (the rule) with decoupled weight decay; its first moment is
stored in units of the second one's root, in evenly spaced codes, and its second through
logarithmic companding; and its weights are bfloat16 plus an int8 correction.

Only the rule differs between optimizers. It sees float32 arrays of one tile, never
bytes, so the same few lines serve every backend.
"""

import abc
import dataclasses
import functools
import math
from typing import Any, get_args, Literal, TypeAlias, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Scalar, ScalarLike


MomentKind: TypeAlias = Literal["signed", "nonnegative"]
Kept: TypeAlias = Literal["compressed", "exact"]


def check_kind(call: str, kind: Any) -> None:
    """Raises if there is no such kind of moment: a codec would treat it as one of the
    two."""
    if kind not in get_args(MomentKind):
        raise ValueError(
            f"`{call}(kind=...)` must be 'signed' or 'nonnegative'; got {kind!r}."
        )


@dataclasses.dataclass(frozen=True)
class Moment:
    r"""What a rule says of one of its moments.

    `before` and `after` name two of the rule's `scalars`: the stored moment is
    multiplied by the first before `update` sees it, and what `update` returns is
    multiplied by the second before it is stored. `None` is 1.

    These two products are free for a compressed moment, as they go into the scales of
    its groups. With $\beta / (1 - \beta)$ before and $1 - \beta$ after, an exponential
    moving average $m \leftarrow \beta m + (1 - \beta) x$ is one addition of $x$.

    ??? Example

        ```python
        fq.Moment("signed")  # an average of gradients
        fq.Moment("nonnegative")  # an average of squares
        fq.Moment("signed", before="decay", after="one_minus_decay")
        fq.Moment("signed", kept="exact")  # the previous gradient
        fq.Moment("signed", relative_to="nu")  # in units of the root of `nu`
        fq.Moment("nonnegative", kept="exact", mean_over=(-1,))  # one for each row
        ```

    With `relative_to`, a compressed moment $m$ may be stored as $r = m / \sqrt{v}$,
    where $v$ is the average of squares of this name, before that is rounded; it is
    decoded as $m = r \sqrt{v}$ with the stored $v$. An update $m / \sqrt{v}$ is then
    as precise as $r$ is, however $v$ is rounded. $r$ is of one size for all elements
    of a group, however much their gradients differ.

    **Arguments:**

    - `kind`: `"signed"`, or `"nonnegative"` for averages of squares, which are stored
        without a sign. `Storage(moments=...)` has a codec for each kind.
    - `before`: the name of a scalar, or `None`.
    - `after`: the name of a scalar, or `None`.
    - `kept`: `"compressed"`, or `"exact"` for a moment that must not be rounded, such
        as a previous gradient. That one is stored in the dtype in which its leaf is
        computed, whatever `Storage(moments=...)` says: 4 bytes per parameter in
        float32.
    - `relative_to`: the name of an average of squares of the same rule, without
        `before` and `after`, or `None`. `Storage(moments=...)` decides whether it is
        used.
    - `mean_over`: axes of a weight, as negative numbers, over which it has a single
        number: a matrix has as many as rows with `(-1,)`. In a state, these axes have
        the length 1. Only for the means of a [`flashquinox.AbstractMeansRule`][],
        which are kept exact.

    **Raises:**

    `ValueError` for another `kind` or `kept`; for `relative_to` with a moment that is
    not signed or is kept exact; and for `mean_over` with one that is not kept exact,
    or that has `before` or `after`.
    """

    kind: MomentKind = "signed"
    before: str | None = None
    after: str | None = None
    kept: Kept = "compressed"
    relative_to: str | None = None
    mean_over: tuple[int, ...] = ()

    def __post_init__(self):
        check_kind("Moment", self.kind)
        if self.kept not in get_args(Kept):
            raise ValueError(
                f"`Moment(kept=...)` must be 'compressed' or 'exact'; got "
                f"{self.kept!r}."
            )
        if self.relative_to is not None and (
            self.kind != "signed" or self.kept != "compressed"
        ):
            raise ValueError(
                f"`Moment(relative_to={self.relative_to!r})` is for a signed moment "
                f"that may be compressed; got kind={self.kind!r}, kept={self.kept!r}."
            )
        axes = self.mean_over
        are_axes = isinstance(axes, tuple) and all(
            [isinstance(x, int) and x < 0 for x in axes]
        )
        is_plain = self.kept == "exact" and self.before is None and self.after is None
        if not are_axes or (axes and not is_plain):
            raise ValueError(
                f"`Moment(mean_over={axes!r})` takes a tuple of negative numbers, of a "
                f"moment without factors that is kept 'exact'; got kept={self.kept!r}, "
                f"before={self.before!r}, after={self.after!r}."
            )

    def shape(self, of_weight: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this moment of a weight.

        **Raises:**

        `ValueError` if the weight has not all axes in `mean_over`.
        """
        means = [len(of_weight) + axis for axis in self.mean_over]
        if any([axis < 0 for axis in means]):
            raise ValueError(
                f"a weight of shape {of_weight} has not the axes {self.mean_over}, "
                "over which there are means. Use a rule that has others for it, as "
                "`flashquinox.adafactor` does."
            )
        return tuple([1 if i in means else n for i, n in enumerate(of_weight)])


def hyperparameter(
    default: ScalarLike | None,
    *,
    low: float = 0.0,
    high: float = math.inf,
    optional: bool = False,
) -> Any:
    """A numeric field of a rule that has a valid range.

    ??? Example

        ```python
        class Momentum(fq.AbstractRule):
            beta: float = fq.hyperparameter(0.9, high=1.0)  # 0 <= beta < 1
        ```

    **Arguments:**

    - `default`: the value of the field where none is given. If it is `None`, the field
        may be `None`.
    - `low`, `high`: `low <= value < high`. [`flashquinox.optimizer`][] checks this when
        it is called, wherever the value is not traced.
    - `optional`: whether the field may be `None` although its default is not.

    **Returns:**

    The field, as from `equinox.field`. A number without a valid range needs none of
    this: `beta: float = 0.9`.
    """
    optional = optional or default is None
    metadata = {_RANGE: (low, high), _OPTIONAL: optional}
    return eqx.field(default=default, metadata=metadata)


_RANGE = "flashquinox_range"
_OPTIONAL = "flashquinox_optional"


def ranges_of(rule: Any) -> dict[str, tuple[float, float]]:
    """The valid ranges of a rule's hyperparameters, by their names; not of those that
    may be `None`, and are."""
    return {
        field.name: field.metadata[_RANGE]
        for field in dataclasses.fields(rule)
        if _RANGE in field.metadata
        and not (field.metadata[_OPTIONAL] and getattr(rule, field.name) is None)
    }


class AbstractRule(eqx.Module):
    r"""The arithmetic of an optimizer, for one element.

    A rule turns a gradient $g$ and the previous moments into an update $u$ and the new
    moments. The weight then becomes

    $$w \leftarrow (1 - \alpha \lambda) \, w + u$$

    where $\lambda$ is the decoupled weight decay and $\alpha$ the learning rate, or,
    for L2 regularization, $w \leftarrow w + u$ with $g + \lambda w$ in place of $g$.
    Decay, masks, schedules, storage and sharding are not the rule's business.

    Numeric hyperparameters are ordinary fields: they may be traced arrays. Everything
    that changes the structure of the computation (`nesterov`, say) must be a static
    field.

    ??? Example

        Heavy-ball momentum in a dozen lines:

        ```python
        class HeavyBall(fq.AbstractRule):
            momentum: float = 0.9

            @property
            def moments(self):
                return {"trace": fq.Moment("signed")}

            def scalars(self, count, learning_rate):
                return {"momentum": self.momentum, "step": -learning_rate}

            def update(self, grad, weight, moments, scalars):
                trace = scalars["momentum"] * moments["trace"] + grad
                return scalars["step"] * trace, {"trace": trace}

        optim = fq.optimizer(HeavyBall(0.9), learning_rate=1e-2)
        ```
    """

    @property
    @abc.abstractmethod
    def moments(self) -> dict[str, Moment]:
        """The names of the moments this rule keeps, and what each of them is. The names
        are the keys of `OptimizerState.moments`.

        Is called when the optimizer is built, and whenever a state is made or a step is
        traced. It may depend on static fields, and on whether a field is `None`.
        """

    @abc.abstractmethod
    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        """Is called once in every step, before `update`, to compute what is the same
        for all elements: fold as much as possible in here. (It is called once for each
        dtype in which leaves are computed.)

        **Arguments:**

        - `count`: the number of this step, counted from 1: a floating-point scalar.
        - `learning_rate`: the learning rate of this step: a scalar of the same dtype.

        **Returns:**

        A dictionary of scalars, each of shape `()`: Python numbers or arrays. They are
        cast to the dtype of `count`.
        """

    @abc.abstractmethod
    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        """Is called for every tile of every leaf, between the decoding of its moments
        and their encoding, possibly inside a kernel: elementwise arithmetic only, which
        [`flashquinox.optimizer`][] checks. Numeric fields of `self` are not available
        here; pass them through `scalars`.

        All arrays are of one shape, which is the backend's choice, and of one dtype:
        float32, or float64 for leaves in float64.

        **Arguments:**

        - `grad`: the gradient, with L2 regularization already added.
        - `weight`: the master weight before this step.
        - `moments`: the decoded moments of the previous step, each times its `before`.
            Before the first step they are zeros.
        - `scalars`: what the method `scalars` returned, as arrays of shape `()`.

        **Returns:**

        A 2-tuple of the update, which is *added* to the weight, and the new moments,
        each before it is multiplied by its `after`: arrays like `grad`.
        """


class _Withheld:
    """Stands for a numeric hyperparameter where only the rule's structure is wanted."""

    def __repr__(self) -> str:
        return "<hyperparameter: use `scalars`>"


_withheld = _Withheld()
_Rule = TypeVar("_Rule", bound=eqx.Module)


def _is_numeric(x: object) -> bool:
    return eqx.is_array_like(x) and not isinstance(x, bool)


@functools.lru_cache(maxsize=256)
def moments_of(structure: Any) -> dict[str, Moment]:
    """The moments of a rule without its numbers. A step asks for them at each leaf."""
    return structure.moments


def rule_structure(rule: _Rule) -> _Rule:
    """The rule without its numbers: hashable, free of tracers, safe to close over."""
    return jtu.tree_map(lambda x: _withheld if _is_numeric(x) else x, rule)


def rule_scalars(
    rule: AbstractRule, count: Scalar, learning_rate: Scalar, dtype: DTypeLike
) -> dict[str, Scalar]:
    """`rule.scalars` in the precision `dtype`. Python numbers stay Python numbers, so
    that `1 - b2` is rounded once only.
    """
    scalars = raw_scalars(rule, count, learning_rate, dtype)
    return {name: jnp.asarray(value, dtype) for name, value in scalars.items()}


def raw_scalars(
    rule: AbstractRule, count: Scalar, learning_rate: Scalar, dtype: DTypeLike
) -> Any:
    """The same as the rule returns it, whatever that is."""
    cast = lambda x: x.astype(dtype) if eqx.is_array(x) else x
    return jtu.tree_map(cast, rule).scalars(
        jnp.asarray(count, dtype), jnp.asarray(learning_rate, dtype)
    )
