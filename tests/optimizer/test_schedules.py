"""What a schedule returns in a program, where its value is not known."""

import jax
import jax.numpy as jnp
import pytest

import flashquinox as fq

from ..helpers import tree_identical


_model = {"w": jnp.ones((4, 64), jnp.bfloat16), "b": jnp.ones(5)}
_grads = jax.tree.map(jnp.ones_like, _model)


@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay"])
def test_nan_in_a_program(argument):
    """With `skip_nonfinite`, a step of such a rate is not taken; without, it shows."""
    broken = lambda count: jnp.where(count == 1, jnp.nan, 1e-3)
    for skip in (True, False):
        rates = {"learning_rate": 1e-3, argument: broken}
        optim = fq.adamw(**rates, skip_nonfinite=skip)
        step = jax.jit(optim.step)
        first = step(_model, optim.init(_model), _grads)
        assert first[1].count == 1
        second = step(*first, _grads)
        if skip:
            assert tree_identical(first, second)
        else:
            assert all(jnp.all(jnp.isnan(x)) for x in second[0].values())


def test_traced_peak_of_zero():
    """Counts as a peak of 1, as that of a learning rate of 0: no NaN."""

    def step(rate, peak):
        optim = fq.adamw(
            rate, weight_decay=0.5, decay="independent", peak_learning_rate=peak
        )
        return optim.step(_model, fq.adamw(1e-3).init(_model), _grads)[0]

    new = jax.jit(step)(0.0, 0.0)
    assert tree_identical(new, _model)
