"""How far is an update of Muon from that in float32, by how its momentum is stored?

Newton-Schulz makes all singular values of a matrix equal: the smallest ones of a
momentum, below a thousandth of its norm, are raised to the size of the largest. So is
whatever rounding has added to them. A byte-level GPT of 3.3 million parameters, whose
layers are stacked, is trained by `optax.contrib.muon` in float32. Its gradients also go
to others, each with its own momentum and with weights that stay:

- float32: the products of the iteration are of bfloat16 numbers, as in all rows below;
- 16 bits: by `flashquinox.TaperedCodec`;
- 8 bits: the default;
- the paper's: its codec of 8 bits;
- Optax, bfloat16: `optax.contrib.muon(mu_dtype=jnp.bfloat16)`, products in float32.

Columns, of the matrices of four kinds in steps 10 to 100:

- bytes: per parameter, with a bfloat16 weight and its correction; of Optax, with a
    float32 weight;
- error: |u' - u| / |u| (Euclidean norms) of a kind and a step, the mean;
- length: |u'| / |u|, the mean;
- largest: the largest element of any step, over that in float32.

Takes minutes on a CPU.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import optax.contrib
from _command_line import Parser, positive_integer, run_main, versions, write_json
from _gpt import (
    Attention,
    float32_weights,
    load_text,
    loss,
    matrices_of_layers,
    sample,
)
from _storages import MOMENTUM_16_BITS
from jaxtyping import Array, PyTree

import flashquinox as fq


@dataclasses.dataclass(frozen=True)
class Task:
    width: int = 256
    layers: int = 4
    vocabulary: int = 256
    context: int = 128
    attention: Attention = "xla"


BATCH, RATE, WARM_UP, FIRST = 8, 3e-3, 100, 10
_OPTIONS: dict[str, Any] = {"consistent_rms": 0.2, "weight_decay": 0.0}


def _ours(storage: fq.Storage) -> fq.Optimizer:
    numbers = {"weight_dimension_numbers": matrices_of_layers}
    return fq.muon(1.0, storage=storage, **numbers, **_OPTIONS)


def _optax(rate: Any, **options: Any) -> optax.GradientTransformation:
    numbers = {"muon_weight_dimension_numbers": matrices_of_layers}
    return optax.contrib.muon(rate, **numbers, **_OPTIONS, **options)


def _contenders() -> dict[str, tuple[float, Any]]:
    """Bytes per parameter of a matrix, and the optimizer."""
    return {
        "float32": (7.0, _ours(fq.Storage(moments="float32"))),
        "16 bits": (5.0625, _ours(MOMENTUM_16_BITS)),
        "8 bits": (4.0625, _ours(fq.Storage())),
        "the paper's": (4.0625, _ours(fq.Storage(moments="flashoptim"))),
        "Optax, bfloat16": (6.0, _optax(1.0, mu_dtype=jnp.bfloat16)),
    }


def measure(steps: int) -> list[dict[str, Any]]:
    weights, static = float32_weights(Task(), 0)
    text = jnp.asarray(load_text(None))
    stay = jtu.tree_map(jnp.zeros_like, weights)
    rate = optax.linear_schedule(0.0, RATE, WARM_UP)
    train, exact, contenders = _optax(rate), _optax(1.0), _contenders()
    of = {name: optim for name, (_, optim) in contenders.items()}

    def step(carry: Any, key: Array) -> tuple[Any, Any]:
        weights, state, exact_state, states = carry
        batch = sample(text, BATCH, key)
        mean = lambda weights: loss(eqx.combine(weights, static), batch)
        grads = jax.grad(mean)(weights)
        updates, state = train.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        update, exact_state = exact.update(grads, exact_state, stay)
        found, new = {}, {}
        for name, optim in of.items():
            theirs, new[name] = optim.update(grads, states[name], stay)
            found[name] = jtu.tree_map(_compared, _stacks(theirs), _stacks(update))
        return (weights, state, exact_state, new), found

    start = (
        weights,
        train.init(weights),
        exact.init(stay),
        {name: optim.init(stay) for name, optim in of.items()},
    )
    keys = jax.random.split(jax.random.key(0), steps)
    _, found = jax.jit(lambda x: jax.lax.scan(step, start, x))(keys)
    return [
        {"momentum": name, "bytes": size, **_summary(found[name])}
        for name, (size, _) in contenders.items()
    ]


def _stacks(updates: PyTree) -> list[Array]:
    return [x for x in jtu.tree_leaves(updates) if x.ndim == 3]


def _compared(found: Array, exact: Array) -> Array:
    size = jnp.linalg.norm(exact)
    largest = [jnp.max(jnp.abs(x)) for x in (found, exact)]
    error, length = jnp.linalg.norm(found - exact), jnp.linalg.norm(found)
    return jnp.stack([error / size, length / size, *largest])


def _summary(found: list[Array]) -> dict[str, float]:
    """Of each kind (steps, columns)."""
    error, length, largest, exact = np.stack(found, -1)[FIRST:].transpose(1, 0, 2)
    return {
        "error": float(np.mean(error)),
        "length": float(np.mean(length)),
        "largest": float(np.max(largest) / np.max(exact)),
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    print("| momentum | bytes | error | length | largest |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        name, size, *figures = row.values()
        print(f"| {name} | {size:g} | {' | '.join(f'{x:.2f}' for x in figures)} |")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=positive_integer, default=100)
    parser.add_json()
    arguments = parser.parse_args()
    if arguments.steps <= FIRST:
        parser.error(f"--steps must be more than {FIRST}; got {arguments.steps}")
    rows = measure(arguments.steps)
    print_rows(rows)
    write_json(
        arguments.json,
        arguments={"steps": arguments.steps},
        device=jax.devices()[0].device_kind,
        versions=versions("jax", "optax"),
        results=rows,
    )


if __name__ == "__main__":
    run_main(main)
