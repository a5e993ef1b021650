"""Long runs of single elements whose gradients are known, by several optimizers.

No model: the gradient of an element is a function of the step alone, so the run of one
optimizer can be compared with that of another, element by element.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Scalar

import flashquinox as fq


#
# Contenders
#


@dataclasses.dataclass(frozen=True)
class Contender:
    """A column of the table: how weights and moments are stored. `None` is Optax, with
    float32 weights and moments."""

    name: str
    storage: fq.Storage | None

    @property
    def compresses_moments(self) -> bool:
        return self.storage is not None and self.storage.moments != "float32"

    def with_groups_of(self, size: int) -> "Contender":
        if self.storage is None:
            return self
        return Contender(self.name, dataclasses.replace(self.storage, group_size=size))

    @property
    def dtype(self) -> Any:
        return jnp.float32 if self.storage is None else jnp.bfloat16

    def optimizer(
        self, rule: str, learning_rate: Any, b2: Any, **options: Any
    ) -> "fq.Optimizer | optax.GradientTransformation":
        """`rule` is one of "adamw" (without weight decay), "sgd" (with momentum 0.9),
        and "lion" (without weight decay)."""
        library = optax if self.storage is None else fq
        if self.storage is not None:
            options["storage"] = self.storage
        if rule == "sgd":
            return library.sgd(learning_rate, momentum=0.9, **options)
        make = getattr(library, rule)
        return make(learning_rate, b2=b2, weight_decay=0.0, **options)


def take_step(optim: Any, params: PyTree, state: PyTree, grads: PyTree) -> Any:
    """The new parameters and state."""
    if isinstance(optim, fq.Optimizer):
        return optim.step(params, state, grads)
    updates, state = optim.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def full_weights(contender: Contender, params: PyTree, state: PyTree) -> PyTree:
    """Weights in float32, with corrections."""
    return params if contender.storage is None else fq.master_weights(params, state)


def momentum(contender: Contender, state: PyTree) -> PyTree:
    """The momenta of Lion, decoded."""
    if contender.storage is None:
        return optax.tree.get(state, "mu")
    is_moment = lambda x: isinstance(x, fq.QuantMoment)
    return jtu.tree_map(
        lambda x: x.decode() if is_moment(x) else x,
        state.moments["mu"],
        is_leaf=is_moment,
    )


#
# Elements
#

_NEVER = 2**30


class Elements(NamedTuple):
    """Elements of one array. Their gradients in step t, counted from 0, are

        scale(t) * (mean + noise * z_t),    z_t normal,

    where scale(t) is 0 from step `stops` until step `returns`, and decay^t otherwise;
    with the sign (-1)^t for elements that alternate, and a million times as large in
    step `spike`.
    """

    mean: Float[Array, "..."]
    noise: Float[Array, "..."]
    stops: Int[Array, "..."]
    returns: Int[Array, "..."]
    decay: Float[Array, "..."]
    alternates: Bool[Array, "..."]
    spike: Int[Array, "..."]

    @staticmethod
    def of(
        shape: tuple[int, ...],
        mean: Any = 0.0,
        noise: Any = 0.0,
        stops: Any = _NEVER,
        returns: Any = _NEVER,
        decay: Any = 1.0,
        alternates: Any = False,
        spike: Any = _NEVER,
    ) -> "Elements":
        """Fields are broadcast to the shape."""

        def full(value: Any, dtype: Any) -> Any:
            return np.broadcast_to(np.asarray(value, dtype), shape)

        floats = partial(full, dtype=np.float32)
        integers = partial(full, dtype=np.int32)
        return Elements(
            floats(mean),
            floats(noise),
            integers(stops),
            integers(returns),
            floats(decay),
            full(alternates, bool),
            integers(spike),
        )

    def gradients(self, key: Key[Array, ""], t: Int[Scalar, ""]) -> Float[Array, "..."]:
        scale = self.decay ** t.astype(jnp.float32)
        scale = jnp.where((self.stops <= t) & (t < self.returns), 0, scale)
        scale = jnp.where(self.alternates & (t % 2 == 1), -scale, scale)
        scale = jnp.where(t == self.spike, 1e6 * scale, scale)
        normal = jax.random.normal(jax.random.fold_in(key, t), self.mean.shape)
        return scale * (self.mean + self.noise * normal)


def stack(sections: dict[str, Elements]) -> tuple[Elements, dict[str, slice]]:
    """One array of several, which share a program. And the rows of each."""
    rows = {}
    start = 0
    for name, section in sections.items():
        rows[name] = slice(start, start + len(section.mean))
        start += len(section.mean)
    together = zip(*sections.values(), strict=True)
    return Elements(*(jnp.concatenate(fields) for fields in together)), rows


#
# Runs
#


class Run(NamedTuple):
    """What is known of every element, by the name of its array."""

    # Weights after so many steps, in learning rates.
    weights: dict[int, dict[str, np.ndarray]]
    # The largest update of any step up to this one, from the one before in the list.
    largest: dict[int, dict[str, np.ndarray]]
    # After the last step.
    state: PyTree

    def largest_until(self, step: int, name: str) -> np.ndarray:
        """The largest update of each element in the first steps."""
        return np.max([x[name] for t, x in self.largest.items() if t <= step], axis=0)


def run(
    contender: Contender,
    rule: str,
    elements: dict[str, Elements],
    steps: Sequence[int],
    learning_rate: float = 1e-3,
    b2: float = 0.999,
    chunk: int = 100,
) -> Run:
    """From weights of zero, until the last of the steps. Looks at weights after each of
    them, if it is a multiple of `chunk`, which is how many steps one call takes."""
    assert all(step % chunk == 0 for step in steps)
    numbers = jnp.float32(learning_rate), jnp.float32(b2)
    elements = jtu.tree_map(jnp.asarray, elements)
    carry = _start(contender, rule, elements, *numbers)
    found = Run({}, {}, None)
    done = 0
    for step in sorted(set(steps)):
        for first in range(done, step, chunk):
            carry = _advance(contender, rule, chunk, elements, *numbers, carry, first)
        params, state, largest = carry
        weights = jax.device_get(_weights(contender, params, state))
        found.weights[step] = {k: w / learning_rate for k, w in weights.items()}
        found.largest[step] = jax.device_get(largest)
        found = found._replace(state=state)
        carry = params, state, jtu.tree_map(jnp.zeros_like, largest)
        done = step
    return found


@partial(jax.jit, static_argnames=("contender", "rule"))
def _start(
    contender: Contender,
    rule: str,
    elements: dict[str, Elements],
    learning_rate: Scalar,
    b2: Scalar,
) -> Any:
    params = {k: jnp.zeros(x.mean.shape, contender.dtype) for k, x in elements.items()}
    state = contender.optimizer(rule, learning_rate, b2).init(params)
    return params, state, {k: jnp.zeros(x.mean.shape) for k, x in elements.items()}


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def _advance(
    contender: Contender,
    rule: str,
    chunk: int,
    elements: dict[str, Elements],
    learning_rate: Scalar,
    b2: Scalar,
    carry: Any,
    first: Int[Scalar, ""],
) -> Any:
    optim = contender.optimizer(rule, learning_rate, b2)

    def step(carry: Any, t: Scalar) -> tuple[Any, None]:
        params, state, largest = carry
        grads = {k: x.gradients(jax.random.key(1), t) for k, x in elements.items()}
        before = full_weights(contender, params, state)
        params, state = take_step(optim, params, state, grads)
        after = full_weights(contender, params, state)
        largest = {
            k: jnp.maximum(x, jnp.abs(after[k] - before[k]) / learning_rate)
            for k, x in largest.items()
        }
        return (params, state, largest), None

    return jax.lax.scan(step, carry, first + jnp.arange(chunk))[0]


@partial(jax.jit, static_argnums=0)
def _weights(contender: Contender, params: PyTree, state: PyTree) -> PyTree:
    return full_weights(contender, params, state)
