"""A step that subtracts a millionth of each weight, without a gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashquinox as fq

from ..helpers import float64


_SHARE = 1e-6
# As dense in each part of a power of two.
_WEIGHTS = jnp.exp2(jnp.arange(-2048, 2048, dtype=jnp.float32) / 2048).reshape(32, 128)

_FORMS = {
    "decoupled": partial(fq.adamw, 1e-3, weight_decay=1e-3),
    "of a schedule": partial(fq.sgdw, 1e-3, weight_decay=lambda _: jnp.float32(1e-3)),
    "independent": partial(
        fq.lion, 1e-3, weight_decay=4e-6, decay="independent", peak_learning_rate=4e-3
    ),
    "of matrices": partial(fq.muon, 1e-3, weight_decay=1e-3),
    "unscaled": partial(fq.adafactor, 1e-3, weight_decay_rate=1e-6),
    "of a rule": partial(fq.optimizer, fq.SGD(), 1e-2, weight_decay=1e-4),
}


@pytest.mark.parametrize(
    "form, backend",
    [
        *((form, "xla") for form in _FORMS),
        pytest.param("of a rule", "tpu", marks=pytest.mark.slow),
    ],
)
def test_small_shares_are_subtracted(form, backend):
    """1 - 1e-6, as a factor on the weight, is 1.3 % too much in float32."""
    optim = _FORMS[form](backend=backend)
    new, _ = optim.step(_WEIGHTS, optim.init(_WEIGHTS), jnp.zeros_like(_WEIGHTS))
    old = float64(_WEIGHTS)
    found = (old - float64(new)) / old / _SHARE
    # Each weight is rounded by up to half of its unit, 2^-24 of it: evenly, so that the
    # mean of all has a standard deviation of that by the root of 3 times their number.
    deviation = 2.0**-24 / _SHARE / (3 * old.size) ** 0.5
    assert abs(np.mean(found) - 1) <= 4 * deviation


def test_small_shares_arrive_in_24_bits():
    """A share that is a thirtieth to a fifteenth of a unit."""
    weights = jnp.linspace(1, 2, 128, endpoint=False, dtype=jnp.bfloat16)
    optim = fq.sgdw(1e-3, weight_decay=1e-3)
    steps = 2**14

    def step(_, carry):
        return optim.step(*carry, jnp.zeros_like(weights))

    carry = jax.lax.fori_loop(0, steps, step, (weights, optim.init(weights)))
    old, new = float64(weights), float64(fq.master_weights(*carry))
    found = np.log(new / old) / (steps * np.log1p(-_SHARE))
    # What is due, give or take the discrepancy of thresholds: two units of 2^-15.
    assert abs(np.mean(found) - 1) <= 2 * 2.0**-15 / (steps * _SHARE)
