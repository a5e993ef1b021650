"""Libraries that take an optimizer of Optax's: numpyro and Optimistix."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import flashquinox as fq


@pytest.fixture(autouse=True)
def _promotion():
    # Other libraries promote.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


_OURS = {"adam": fq.adam, "sgd": fq.sgd}
_OPTAX = {"adam": optax.adam, "sgd": optax.sgd}


@pytest.mark.once
def test_numpyro():
    """Variational inference of a mean: its optimizer has no arguments but gradients and
    state, to which the parameters belong."""
    numpyro = pytest.importorskip("numpyro", exc_type=ImportError)
    from numpyro.optim import optax_to_numpyro

    data = 2 + jr.normal(jr.key(0), (50,))

    def model():
        mean = numpyro.sample("mean", numpyro.distributions.Normal(0.0, 10.0))
        with numpyro.plate("data", 50):
            numpyro.sample("x", numpyro.distributions.Normal(mean, 1.0), obs=data)

    def run(optim):
        guide = numpyro.infer.autoguide.AutoNormal(model)
        elbo = numpyro.infer.Trace_ELBO()
        svi = numpyro.infer.SVI(model, guide, optax_to_numpyro(optim), elbo)
        result = svi.run(jr.key(1), 200, progress_bar=False)
        return result.params["mean_auto_loc"], result.losses

    (found, losses), (expected, expected_losses) = map(
        run, (fq.adam(0.05), optax.adam(0.05))
    )
    assert abs(expected - 2) < 0.5
    # Vectors and scalars this small have float32 moments.
    assert np.allclose(found, expected, rtol=1e-3)
    assert np.allclose(losses, expected_losses, rtol=1e-2)


@pytest.mark.parametrize("name", _OURS)
def test_optimistix(name):
    """The minimum of a quadratic function of a pytree, with whole groups of moments."""
    optx = pytest.importorskip("optimistix", exc_type=ImportError)
    target = {"a": jr.normal(jr.key(0), (8, 32)), "b": jnp.ones(3)}
    start = jax.tree.map(jnp.zeros_like, target)

    def loss(params, args):
        parts = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), params, args)
        return sum(jax.tree.leaves(parts))

    def run(optimizers):
        solver = optx.OptaxMinimiser(optimizers[name](0.1), rtol=1e-3, atol=1e-3)
        result = optx.minimise(loss, solver, start, args=target, max_steps=512)
        return result.value

    found, expected = run(_OURS), run(_OPTAX)
    for key, x in target.items():
        assert np.allclose(expected[key], x, atol=0.05)
        assert np.allclose(found[key], x, atol=0.05)
