"""The Newton-Schulz iteration, which takes the singular values of matrices to 1."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


# a, b and c of one iteration.
Coefficients = tuple[float, float, float]

# By Jordan (see `flashquinox.Muon`): the slope at zero is as large as it can be while
# singular values end between 0.7 and 1.2.
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)

# By Amsel et al., arXiv:2505.16932: for each iteration the polynomial that leaves the
# smallest largest error, for singular values of at least 0.001 before the first. From
# the last one on, all are the same.
_POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# By which theirs shrinks its argument, for rounding not to take it above 1.
_SAFETY = 1.01

NAMES = ("quintic", "polar_express")


def named_coefficients(name: str, steps: int) -> tuple[Coefficients, ...]:
    """Those of so many iterations."""
    if name == "quintic":
        return (QUINTIC,) * steps
    safe = [
        (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]
    ]
    return tuple((safe + [_POLAR_EXPRESS[-1]] * steps)[:steps])


def orthogonalized(
    x: Float[Array, "stack rows columns"],
    coefficients: tuple[Coefficients, ...],
    eps: float,
) -> Float[Array, "stack rows columns"]:
    r"""For each matrix $X$, about $U V^\top$ of its singular value decomposition
    $U \Sigma V^\top$: by $X \leftarrow a X + (b A + c A^2) X$ with $A = X X^\top$, from
    $X / (\|X\|_F + \epsilon)$. In the dtype of `x`, but for the norm."""
    is_high = x.shape[1] > x.shape[2]
    # The same iteration, with a smaller A.
    x = x.mT if is_high else x
    wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    norm = jnp.sqrt(jnp.sum(wide * wide, axis=(1, 2), keepdims=True))
    x = (wide / (norm + eps)).astype(x.dtype)
    for a, b, c in coefficients:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.mT if is_high else x


def width_scale(rows: int, columns: int) -> float:
    """What keeps the gain of a layer from `rows` inputs to `columns` outputs."""
    # There are matrices without rows.
    return math.sqrt(max(1, columns / max(1, rows)))
