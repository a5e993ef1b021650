"""Rules whose update needs a whole leaf: its norm, or the products of its matrices.

A step of such a rule is three parts. An elementwise rule turns the gradient into a
direction, with moments of its own; a function of the whole leaf turns the direction
into another one; and a second elementwise rule takes that for its gradient. The
elementwise rules run wherever all rules run. The function runs in plain XLA.
"""

import abc

import equinox as eqx
from jaxtyping import Array, Float, Scalar, ScalarLike

from .rule import AbstractRule, Moment


class _AbstractTwoPasses(eqx.Module):
    """What all rules of whole leaves have: a rule before the function, and one after
    it."""

    @property
    @abc.abstractmethod
    def before(self) -> AbstractRule | None:
        """The rule of the first pass. Its update, for a learning rate of -1, is the
        direction. It does not see the weight: its `weight` is an array of no meaning.
        With `None`, the direction is the gradient.

        Is called whenever a step is traced.
        """

    @property
    @abc.abstractmethod
    def after(self) -> AbstractRule:
        """The rule of the second pass, with the learning rate of the step: its gradient
        is what the function made of the direction. [`flashquinox.SGD`][] without
        momentum, for example, multiplies by the learning rate.
        """

    @property
    @abc.abstractmethod
    def moments(self) -> dict[str, Moment]:
        """All that a state keeps."""


def _of_both(rule: _AbstractTwoPasses) -> dict[str, Moment]:
    """The moments of the rules of both passes."""
    before = rule.before
    return (before.moments if before is not None else {}) | rule.after.moments


class AbstractWholeLeafRule(_AbstractTwoPasses):
    r"""A rule that needs norms or means of a whole leaf.

    With $\operatorname{before}$ and $\operatorname{after}$ two elementwise rules, and
    $\lambda w$ for L2 regularization,

    $$d = \operatorname{before}(g), \quad w \leftarrow (1 - \alpha\lambda) w +
    \operatorname{after}(\operatorname{transform}(d + \lambda w, w))$$

    ??? Example

        Sign descent with the mean magnitude of each leaf:

        ```python
        class ScaledSign(fq.AbstractWholeLeafRule):
            @property
            def before(self):
                return fq.SGD(0.9)

            @property
            def after(self):
                return fq.SGD()

            def transform(self, direction, weight):
                del weight
                return jnp.sign(direction) * jnp.mean(jnp.abs(direction))

        optim = fq.optimizer(ScaledSign(), learning_rate=1e-3)
        ```
    """

    @property
    def moments(self) -> dict[str, Moment]:
        """Those of both rules."""
        return _of_both(self)

    @abc.abstractmethod
    def transform(
        self, direction: Float[Array, "*shape"], weight: Float[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """Is called once for each leaf in every step, in plain XLA, with the whole leaf
        as its shape says, however it is divided among devices: XLA adds collectives
        where reductions need them. Numeric fields of `self` are available.

        **Arguments:**

        - `direction`: the direction, with L2 regularization already added.
        - `weight`: the master weight before this step.

        Both are float32, or float64 for leaves in float64.

        **Returns:**

        What the second pass gets as gradient: an array like `direction`.
        """


class AbstractMeansRule(_AbstractTwoPasses):
    r"""A rule that needs a whole leaf, and keeps means of it over some of its axes,
    such as [`flashquinox.Adafactor`][].

    With $\operatorname{before}$ and $\operatorname{after}$ two elementwise rules,
    $\lambda w$ for L2 regularization, and means $v$,

    $$d = \operatorname{before}(g), \quad (d', v) \leftarrow
    \operatorname{transform}(d + \lambda w, w, v), \quad w \leftarrow
    (1 - \alpha\lambda) w + \operatorname{after}(d')$$
    """

    @property
    @abc.abstractmethod
    def means(self) -> dict[str, Moment]:
        """The names of the means, and what each of them is: a
        [`flashquinox.Moment`][] with `mean_over`. The names are keys of
        `OptimizerState.moments`, beside those of the moments of both rules.

        Is called when the optimizer is built, and whenever a state is made or a step is
        traced. It may depend on static fields.
        """

    @property
    def moments(self) -> dict[str, Moment]:
        """The means, and the moments of both rules."""
        return _of_both(self) | self.means

    @abc.abstractmethod
    def transform(
        self,
        direction: Float[Array, "*shape"],
        weight: Float[Array, "*shape"],
        means: dict[str, Float[Array, "..."]],
        count: Scalar,
    ) -> tuple[Float[Array, "*shape"], dict[str, Float[Array, "..."]]]:
        """Is called once for each leaf in every step, in plain XLA, with the whole leaf
        as its shape says, however it is divided among devices: XLA adds collectives
        where reductions need them. Numeric fields of `self` are available.

        **Arguments:**

        - `direction`: the direction, with L2 regularization already added.
        - `weight`: the master weight before this step.
        - `means`: those of the previous step, as if by `keepdims`: of the axes of the
            weight, those in `mean_over` have the length 1. Before the first step they
            are zeros.
        - `count`: the number of this step, counted from 1.

        All are float32, or float64 for leaves in float64.

        **Returns:**

        A 2-tuple of what the second pass gets as gradient, an array like `direction`,
        and the new means, arrays like the old ones.
        """


class AbstractMatrixRule(_AbstractTwoPasses):
    r"""A rule that needs products of a leaf's matrices, such as [`flashquinox.Muon`][].

    Matrices of the same shape are stacked, over all axes of a leaf that are not of its
    matrices and over leaves, for one call of `transform`. On a mesh, each device gets
    its share of the stack, with whole matrices.
    """

    @property
    def moments(self) -> dict[str, Moment]:
        """Those of both rules."""
        return _of_both(self)

    @abc.abstractmethod
    def axes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of a leaf of this shape that are the rows of its matrices, and those
        that are the columns, as negative numbers. All others are of a stack.

        **Raises:**

        `ValueError` for shapes without matrices, with the reason and the remedy.
        """

    @abc.abstractmethod
    def scale(self, rows: int, columns: int) -> ScalarLike:
        """What the learning rate is multiplied by, for matrices of this shape."""

    @abc.abstractmethod
    def transform(
        self, matrices: Float[Array, "stack rows columns"]
    ) -> Float[Array, "stack rows columns"]:
        """Is called once for each stack in every step, on each device of a mesh, with
        its share of the matrices. Numeric fields of `self` are not available here.

        **Arguments:**

        - `matrices`: the directions of these matrices, in bfloat16; in float64 for
            leaves in float64. Some may be zero, to fill up a stack.

        **Returns:**

        What the second pass gets as gradient: an array like `matrices`.
        """


WholeLeafRule = AbstractWholeLeafRule | AbstractMeansRule | AbstractMatrixRule
AnyRule = AbstractRule | WholeLeafRule


def elementwise_parts(rule: AnyRule) -> list[AbstractRule]:
    """The elementwise rules that a rule is made of."""
    if isinstance(rule, AbstractRule):
        return [rule]
    before = rule.before
    return ([] if before is None else [before]) + [rule.after]
