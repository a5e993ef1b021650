import equinox as eqx
from jaxtyping import Array, Int32, Integer, PyTree

from ._codec import StoredMoment


class OptimizerState(eqx.Module):
    """What an optimizer keeps between steps. Every field but `count` holds trees of the
    structure of the model, with `None` for leaves that are not trained.

    - `count`: the number of steps taken.
    - `moments`: for each moment of the rule, by its name: `QuantMoment`s, or plain
        arrays if moments are uncompressed.
    - `corrections`: for each weight that is narrower than its master weight, the
        integer correction: see [`flashquinox.ECCWeight`][].
    """

    count: Int32[Array, ""]
    moments: dict[str, PyTree[StoredMoment | None]]
    corrections: PyTree[Integer[Array, "..."] | None]
