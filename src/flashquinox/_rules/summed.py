import equinox as eqx
from jaxtyping import Array, Float, Scalar, ScalarLike

from .rule import AbstractRule, Kept, Moment


class Summed(AbstractRule):
    r"""The sum of gradients, as a moment: $s_t = s_{t-1} + \alpha_t g_t$. Weights have
    no part in it: a step takes none. With `is_read`, the sum stays as it is, and
    gradients have no part in it either: its codec may encode it otherwise."""

    kept: Kept = eqx.field(static=True, default="compressed")
    is_read: bool = eqx.field(static=True, default=False)

    @property
    def moments(self) -> dict[str, Moment]:
        return {"sum": Moment("signed", kept=self.kept)}

    def scalars(self, count: Scalar, learning_rate: Scalar) -> dict[str, ScalarLike]:
        del count
        return {"step": learning_rate}

    def update(
        self,
        grad: Float[Array, "*tile"],
        weight: Float[Array, "*tile"],
        moments: dict[str, Float[Array, "*tile"]],
        scalars: dict[str, Scalar],
    ) -> tuple[Float[Array, "*tile"], dict[str, Float[Array, "*tile"]]]:
        del weight
        if self.is_read:
            return grad, moments
        return grad, {"sum": moments["sum"] + scalars["step"] * grad}
