"""`verify_weights`: whether weights are those that their corrections belong to."""

import dataclasses
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flashquinox as fq
from flashquinox._optimizer.checksums import check_verify_weights, checksums

from ..helpers import array_of, tree_identical


@pytest.fixture(autouse=True)
def _promotion():
    # Optax's own arithmetic promotes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        yield


def _normal(shape, dtype, scale=1.0):
    return array_of(scale * np.random.default_rng(0).standard_normal(shape), dtype)


def _params():
    return {
        "bfloat16": _normal((4, 32), jnp.bfloat16),
        "float16": _normal((7,), jnp.float16, 1e-3),
        "float32": _normal((3,), jnp.float32),
        "frozen": jnp.ones((5,), jnp.bfloat16),
    }


def _grads(steps):
    """Of all steps: their first axis."""
    rng = np.random.default_rng(3)
    grads = {
        name: array_of(rng.standard_normal((steps, *x.shape)), jnp.bfloat16)
        for name, x in _params().items()
    }
    # One step in five is not taken.
    wide = np.asarray(grads["float32"]).astype(np.float32)
    wide[4::5] = np.nan
    return grads | {"float32": jnp.asarray(wide), "frozen": None}


def _first(grads):
    return jtu.tree_map(lambda x: jnp.asarray(np.asarray(x)[0]), grads)


def _train(optim, steps=50, method="update"):
    """Steps of a loop, with the weights and the state at its end."""

    grads = _grads(steps)

    @eqx.filter_jit
    def run(params, grads):
        def body(carry, grads):
            params, state = carry
            if method == "step":
                return optim.step(params, state, grads), None
            updates, state = optim.update(grads, state, params, value=jnp.asarray(1.0))
            return (eqx.apply_updates(params, updates), state), None

        carry = params, optim.init(params)
        return jax.lax.scan(body, carry, grads)[0]

    params = _params()
    if method == "update":
        # Optax's wrappers take all gradients, and no mixture of 16-bit dtypes.
        params["float16"] = params["float16"].astype(jnp.bfloat16)
        del params["frozen"], grads["frozen"]
    result = run(params, grads)
    jax.effects_barrier()
    return result


_WRAPPERS = {
    "step": lambda optim: optim,
    "update": lambda optim: optim,
    "MultiSteps": lambda optim: optax.MultiSteps(optim, 3),
    "after clipping": lambda optim: optax.chain(optax.clip(1.0), optim),
}


@pytest.mark.product
@pytest.mark.parametrize("name", _WRAPPERS)
def test_ordinary_steps_pass(name):
    method = "step" if name == "step" else "update"
    make = lambda verify: _WRAPPERS[name](
        fq.sgd(1e-3, skip_nonfinite=True, verify_weights=verify)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, state = _train(make("error"), method=method)
    if name == "step":
        expected, plain = _train(make(None), method=method)
        assert tree_identical(params, expected)
        assert tree_identical(dataclasses.replace(state, checksums=None), plain)
        assert int(state.count) == 40
        # One number for each weight with a correction.
        shapes = jtu.tree_map(lambda x: (x.shape, x.dtype.name), state.checksums)
        assert shapes == {
            "bfloat16": ((), "uint32"),
            "float16": ((), "uint32"),
            "float32": None,
            "frozen": ((), "uint32"),
        }
        assert plain.checksums is None


def _plateau(optim):
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    return optax.chain(optim, plateau)


@pytest.mark.product
@pytest.mark.parametrize(
    "wrap",
    [
        lambda optim: optax.chain(optim, optax.scale(0.5)),
        lambda optim: optax.chain(optim, optax.keep_params_nonnegative()),
        _plateau,
        lambda optim: optax.contrib.schedule_free(optim, 1e-3),
    ],
    ids=["scale", "keep_params_nonnegative", "plateau", "schedule_free"],
)
def test_what_comes_after_is_seen(wrap):
    optim = wrap(fq.sgd(1e-3, verify_weights="warn"))
    with pytest.warns(UserWarning) as caught:
        _train(optim, steps=8)
    message = str(caught[0].message)
    assert "`sgd(...).update`: the weight at `['bfloat16']`" in message
    assert "last in `optax.chain`" in message and "from_master_weights" in message


def test_lookahead_is_seen():
    params = {"w": _normal((4, 32), jnp.bfloat16)}
    optim = optax.lookahead(fq.sgd(1e-2, verify_weights="error"), 2, 0.5)
    both = optax.LookaheadParams.init_synced(params)
    state = optim.init(both)
    update = eqx.filter_jit(optim.update)
    with pytest.raises(RuntimeError, match=r"at `\['w'\]`"):
        for _ in range(4):
            updates, state = update(params, state, both)
            both = optax.apply_updates(both, updates)


@pytest.mark.parametrize("jit", [lambda f: f, eqx.filter_jit], ids=["eager", "jit"])
def test_an_edit_raises(jit):
    optim = fq.sgd(1e-3, verify_weights="error")
    params = _params()
    state = optim.init(params)
    step = jit(optim.step)
    grads = {name: None for name in params}
    params, state = step(params, state, grads)
    swapped = params["float16"][jnp.array([1, 0, 2, 3, 4, 5, 6])]
    with pytest.raises(RuntimeError, match=r"`sgd.*step`: the weight at `\['float16'"):
        step(params | {"float16": swapped}, state, grads)
    # Weights without a correction may be anything.
    step(params | {"float32": jnp.zeros(3)}, state, grads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_every_bit_and_every_place_counts(dtype):
    x = _normal((6, 5), dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)
    (original,) = checksums([x])
    flips = [bits.at[2, 3].set(bits[2, 3] ^ np.uint16(1 << i)) for i in range(16)]
    others = [jax.lax.bitcast_convert_type(y, dtype) for y in flips]
    others += [x[::-1], x[:, ::-1], -x, x.at[0].set(x[1]).at[1].set(x[0]), x * 0]
    found = [int(y) for y in checksums(others)]
    assert int(original) not in found and len(set(found)) == len(found)
    # What arithmetic changes of a weight that did not move.
    least = jnp.asarray(2.0**-130 if dtype == jnp.bfloat16 else 0.0, dtype)
    same = [x.at[0, 0].set(z) for z in (jnp.asarray(0.0, dtype), -least, least)]
    assert len({int(y) for y in checksums(same)}) == 1
    nans = [x.at[0, 0].set(z) for z in (jnp.asarray(jnp.nan, dtype), -jnp.nan)]
    assert len({int(y) for y in checksums(nans)}) == 1
    # Subnormal numbers of float16 are weights like others.
    if dtype == jnp.float16:
        small = [x.at[0, 0].set(z) for z in (2.0**-20, -(2.0**-20))]
        assert len({int(y) for y in checksums(small)}) == 2


@pytest.mark.once
def test_our_edits_are_no_error():
    optim = optax.chain(fq.sgd(1e-3, verify_weights="error"))
    names = ("bfloat16", "frozen")
    params, grads = ({k: x[k] for k in names} for x in (_params(), _first(_grads(1))))
    state = optim.init(params)
    update = eqx.filter_jit(optim.update)
    masters_of = eqx.filter_jit(fq.master_weights)

    def go_on(params, state):
        updates, state = update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    params, state = go_on(params, state)
    masters = jtu.tree_map(
        lambda x: jnp.asarray(np.float32(1.01) * x), masters_of(params, state)
    )
    masters["frozen"] = None
    params, state = fq.from_master_weights(masters, params, state)
    params, state = go_on(params, fq.widen_corrections(params, state))
    params, state = go_on(params, fq.narrow_corrections(params, state))
    edit = eqx.filter_jit(fq.from_master_weights)
    params, state = edit(masters_of(params, state), params, state)
    params, state = go_on(params, state)
    with pytest.raises(RuntimeError):
        go_on(jtu.tree_map(lambda x: 2 * x, params), state)


def test_states_of_the_other_kind_are_refused():
    params, grads = _params(), _first(_grads(1))
    off, on = fq.sgd(1e-3), fq.sgd(1e-3, verify_weights="error")
    without, kept = off.init(params), on.init(params)
    with pytest.raises(ValueError, match=r"no checksum .*`verify_weights='error'`"):
        on.step(params, without, grads)
    with pytest.raises(ValueError, match=r"has a checksum .*`verify_weights=None`"):
        off.step(params, kept, grads)
    # As the messages say.
    new = dataclasses.replace(without, checksums=on.init(params).checksums)
    assert tree_identical(new, kept)
    assert tree_identical(dataclasses.replace(kept, checksums=None), without)
    with pytest.raises(ValueError, match=r"`lion\(verify_weights=...\)` must be"):
        check_verify_weights("lion", "always")


def test_ensembles():
    optim = fq.sgd(1e-2, verify_weights="error")
    params = {"w": _normal((3, 4, 32), jnp.bfloat16)}
    state = jax.vmap(optim.init)(params)
    step = eqx.filter_jit(jax.vmap(optim.step))
    params, state = step(params, state, params)
    assert state.checksums["w"].shape == (3,)
    params, state = step(params, state, params)
    with pytest.raises(RuntimeError, match=r"at `\['w'\]`"):
        step({"w": params["w"].at[1, 2, 3].set(0.0)}, state, params)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    params = {"w": _normal((4, 64), jnp.bfloat16)}
    optim = fq.sgd(1e-2, verify_weights="error")
    alone = optim.init(params)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = jtu.tree_map(lambda x: jax.device_put(x, sharding), params)
    with jax.set_mesh(mesh):
        state = optim.init(params)
        assert int(state.checksums["w"]) == int(alone.checksums["w"])
        step = eqx.filter_jit(optim.step)
        params, state = step(params, state, params)
        params, state = step(params, state, params)
        masters = fq.master_weights(params, state)
        params, state = fq.from_master_weights(masters, params, state)
        params, state = step(params, state, params)
        with pytest.raises(RuntimeError, match=r"at `\['w'\]`"):
            jax.block_until_ready(step({"w": -params["w"]}, state, params))


def test_gradient_release():
    weights = _normal((3, 16, 16), jnp.bfloat16)
    model = {"blocks": {"w": weights}, "head": weights[0]}
    loss = fq.LayeredLoss(
        lambda model: model["blocks"],
        lambda model, batch, key: batch,
        lambda block, x, batch, key: jnp.tanh(x @ block["w"]),
        lambda model, x, batch, key: jnp.sum((x @ model["head"]).astype(jnp.float32)),
    )
    optim = fq.sgd(1e-2, verify_weights="error")

    @eqx.filter_jit
    def step(model, state):
        batch = jnp.ones((16,), jnp.bfloat16)
        return fq.release_step(optim, loss, model, state, batch)[:2]

    state = optim.init(model)
    for _ in range(3):
        model, state = step(model, state)
    assert int(state.count) == 3
    edited = eqx.tree_at(lambda model: model["blocks"]["w"], model, -weights)
    with pytest.raises(RuntimeError, match=r"at `\['blocks'\]\['w'\]`"):
        step(edited, state)
