from jaxtyping import Array, Float, Scalar, ScalarLike

from .rule import AbstractRule, Moment


class Added(AbstractRule):
    r"""The gradient itself: $u_t = \alpha_t g_t$. For updates that something else has
    made."""

    @property
    def moments(self) -> dict[str, Moment]:
        return {}

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
        del weight, moments
        return scalars["step"] * grad, {}
