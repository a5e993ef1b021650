from jaxtyping import Array, Float, ScalarLike

from .adam import Adam
from .rule import AbstractRule, hyperparameter
from .sgd import SGD
from .trust_ratio import trust_ratio
from .whole_leaf import AbstractWholeLeafRule


class Lamb(AbstractWholeLeafRule):
    r"""Adam, scaled to the norm of each leaf.

    With $r_t$ the update of [`flashquinox.Adam`][] for a learning rate of -1, and
    $\lambda$ that of L2 regularization,

    $$
    d_t = r_t + \lambda w_{t-1} \qquad
    u_t = -\alpha_t \frac{\|w_{t-1}\|}{\|d_t\|} d_t
    $$

    The factor is 1 where one of the norms is 0.

    ??? cite "Reference"

        You et al., *Large Batch Optimization for Deep Learning: Training BERT in 76
        minutes*, ICLR 2020, [arXiv:1904.00962](https://arxiv.org/abs/1904.00962),
        Algorithm 2, with $\phi(x) = x$.
    """

    b1: ScalarLike = hyperparameter(0.9, high=1.0)
    b2: ScalarLike = hyperparameter(0.999, high=1.0)
    eps: ScalarLike = hyperparameter(1e-6)

    @property
    def before(self) -> AbstractRule:
        return Adam(self.b1, self.b2, self.eps)

    @property
    def after(self) -> AbstractRule:
        return SGD()

    def transform(
        self, direction: Float[Array, "*shape"], weight: Float[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        return trust_ratio(weight, direction) * direction
