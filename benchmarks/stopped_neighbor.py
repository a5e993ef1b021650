"""What an element that has stopped costs the others of its group.

Its second moment decays, and the codes of the group's second moments have to reach from
there to the largest: their steps become as coarse as they get. Groups of 32 elements
get gradients of noise; in half of the runs, one of them gets none from step 100 on.
Printed is the error of the other elements' updates, |u' - u| / |u| (Euclidean norms),
beside `optax.adamw` on the same gradients: the mean over the last tenth of the steps.
The weights are float32, so that updates are not rounded. Takes a minute on two cores of
a CPU.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _command_line import Parser, run_main, versions, write_json

import flashquinox as fq


GROUP, SHAPE, STOPS = 32, (256, 256), 100
# As many as the second moment of a stopped element takes to leave the range of codes.
STEPS = {0.95: 2_000, 0.999: 40_000}


def error(b2: float, *, stops: bool) -> float:
    """Of the updates of elements that do not stop."""
    ours = fq.adamw(1.0, b2=b2, weight_decay=0.0)
    reference = optax.adamw(1.0, b2=b2, weight_decay=0.0)
    weights = jnp.zeros(SHAPE)
    first = jnp.arange(SHAPE[1]) % GROUP == 0

    def step(states, number):
        grads = jr.normal(jr.fold_in(jr.key(0), number), SHAPE)
        if stops:
            grads = jnp.where(first & (number >= STOPS), 0, grads)
        mine, theirs = states
        found, mine = ours.update(grads, mine, weights)
        expected, theirs = reference.update(grads, theirs, weights)
        found, expected = (
            jnp.where(first, 0, jnp.asarray(x)) for x in (found, expected)
        )
        difference, size = found - expected, jnp.linalg.norm(expected)
        return (mine, theirs), jnp.linalg.norm(difference) / size

    start = ours.init(weights), reference.init(weights)
    steps = STEPS[b2]
    _, errors = jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(steps)))(start)
    return float(jnp.mean(errors[-steps // 10 :]))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_json()
    arguments = parser.parse_args()
    rows = []
    print("b2     no element stops  one of each group stops")
    for b2 in STEPS:
        row = {"b2": b2, "none": error(b2, stops=False), "one": error(b2, stops=True)}
        rows.append(row)
        print(f"{b2:<6} {row['none']:16.4f} {row['one']:24.4f}", flush=True)
    used = versions("jax", "optax")
    write_json(arguments.json, versions=used, results=rows)


if __name__ == "__main__":
    run_main(main)
