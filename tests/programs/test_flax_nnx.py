"""Programs in the style of Flax NNX, with these optimizers in place of Optax's."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import flashquinox as fq
import flashquinox.checkpoint as fq_checkpoint

from ..helpers import slow, tree_identical


_x = jax.random.normal(jax.random.key(0), (8, 16))
_y = jnp.sin(_x[:, :4])


@pytest.fixture(autouse=True)
def _promotion():
    # Flax's own arithmetic promotes dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class _Model(nnx.Module):
    def __init__(self, rngs, dtype=jnp.bfloat16):
        self.linear = nnx.Linear(16, 4, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def _loss(model):
    return jnp.mean((model(_x) - _y).astype(jnp.float32) ** 2)


# One moment: less to compile.
_lion = fq.lion(1e-2)


def _make(tx=_lion, seed=0, wrt=nnx.Param, dtype=jnp.bfloat16):
    model = _Model(nnx.Rngs(seed), dtype)
    return model, nnx.Optimizer(model, tx, wrt=wrt)


def _update(model, optimizer):
    wrt = nnx.DiffState(0, optimizer.wrt)
    loss, grads = nnx.value_and_grad(_loss, argnums=wrt)(model)
    optimizer.update(model, grads)
    return loss


_traces = []


@nnx.jit
def _step(model, optimizer):
    # Once per program.
    _traces.append(optimizer.tx)
    return _update(model, optimizer)


@pytest.fixture(scope="module")
def trained():
    model, optimizer = _make()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(3):
            _step(model, optimizer)
    return model, optimizer


def _copy(trained):
    return jtu.tree_map(jnp.copy, nnx.clone(trained))


def _goes_on_like(trained, model, optimizer):
    expected_model, expected = _copy(trained)
    assert tree_identical(nnx.state(optimizer), nnx.state(expected))
    for _ in range(2):
        assert _step(model, optimizer) == _step(expected_model, expected)
    assert tree_identical(nnx.state(model), nnx.state(expected_model))
    assert tree_identical(nnx.state(optimizer), nnx.state(expected))


_inject = optax.inject_hyperparams(fq.lion, hyperparam_dtype=jnp.float32)


@pytest.mark.parametrize(
    "tx, dtype, wrt",
    [
        (fq.adamw(1e-2), jnp.bfloat16, nnx.Param),
        (
            fq.lion(1e-2, storage=fq.Storage(moments="learned")),
            jnp.bfloat16,
            nnx.Param,
        ),
        (
            fq.adamw(1e-2, storage=fq.Storage(moments="float32")),
            jnp.bfloat16,
            nnx.All(nnx.Param, nnx.PathContains("kernel")),
        ),
        (
            optax.chain(optax.clip_by_global_norm(1.0), fq.lion(1e-2)),
            jnp.float32,
            nnx.Param,
        ),
        slow(
            optax.MultiSteps(_inject(learning_rate=1e-2), 2),
            jnp.bfloat16,
            nnx.Param,
        ),
        (fq.accumulate(fq.adamw(1e-2), 2), jnp.bfloat16, nnx.Param),
    ],
    ids=["adamw", "learned", "subset", "chain", "multi-steps", "accumulate"],
)
def test_the_state_has_one_structure(tx, dtype, wrt):
    model, optimizer = _make(tx, dtype=dtype, wrt=wrt)
    before, first = nnx.split((model, optimizer)), _loss(model)
    losses = [_step(model, optimizer) for _ in range(4)]
    assert losses[-1] < first
    assert _traces.count(tx) == 1
    after = nnx.split((model, optimizer))
    assert before[0] == after[0]
    assert jtu.tree_structure(before[1]) == jtu.tree_structure(after[1])
    # Nothing but arrays in `Variable`s.
    for variable in jtu.tree_leaves(
        nnx.state(optimizer), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        assert isinstance(variable, nnx.OptState)
        assert isinstance(variable.get_value(), jax.Array)


@pytest.mark.parametrize("loop", ["fori_loop", "while_loop", "scan", "lax.scan"])
def test_loops(loop, trained):
    model, optimizer = _make()
    both = model, optimizer

    def advance(carry):
        _update(*carry)
        return carry

    def merged(state, _):
        both = nnx.merge(graphdef, state)
        return nnx.state(advance(both)), None

    if loop == "fori_loop":
        nnx.fori_loop(0, 3, lambda _, carry: advance(carry), both)
    elif loop == "while_loop":
        nnx.while_loop(lambda carry: carry[1].step[...] < 3, advance, both)
    elif loop == "scan":
        many = nnx.scan(
            lambda carry, x: (advance(carry), x),
            in_axes=(nnx.Carry, 0),
            out_axes=(nnx.Carry, 0),
        )
        many(both, jnp.arange(3))
    else:
        graphdef, state = nnx.split(both)
        state, _ = jax.lax.scan(merged, state, None, length=3)
        nnx.update(both, state)
    assert int(optimizer.opt_state.count) == 3
    # Other programs: multiplications and additions may be contracted, which a bfloat16
    # unit per step covers.
    for found, expected in zip(
        jtu.tree_leaves(nnx.state(model)),
        jtu.tree_leaves(nnx.state(trained[0])),
        strict=True,
    ):
        found, expected = np.float64(found), np.float64(expected)
        np.testing.assert_allclose(found, expected, rtol=3 * 2**-8, atol=1e-4)


def test_cached_partial():
    model, optimizer = _make()
    cached = nnx.cached_partial(_step, model, optimizer)
    losses = [cached() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert _traces.count(_lion) == 1


@pytest.mark.once
def test_an_ensemble():
    @nnx.vmap
    def make(keys):
        return _make(seed=keys)

    @nnx.jit
    @nnx.vmap
    def step(model, optimizer):
        return _update(model, optimizer)

    models, optimizers = make(jax.random.split(jax.random.key(0), 2))
    before = jtu.tree_structure(nnx.state(optimizers))
    first = step(models, optimizers)
    assert np.all(step(models, optimizers) < first)
    assert jtu.tree_structure(nnx.state(optimizers)) == before
    assert optimizers.opt_state.count.shape == (2,)


@pytest.mark.parametrize("target", ["fresh", "eval_shape"])
@pytest.mark.parametrize("manager", [False, True])
def test_orbax(tmp_path, trained, target, manager):
    saved = nnx.state(trained)
    make = lambda: _make(seed=1)
    graphdef, like = nnx.split(make() if target == "fresh" else nnx.eval_shape(make))
    if manager:
        with ocp.CheckpointManager(tmp_path / "run") as checkpoints:
            checkpoints.save(3, args=ocp.args.StandardSave(saved))
            checkpoints.wait_until_finished()
            restored = checkpoints.restore(3, args=ocp.args.StandardRestore(like))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "one", saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "one", like)
    _goes_on_like(trained, *nnx.merge(graphdef, restored))


def test_pure_dict(trained):
    pure = nnx.to_pure_dict(nnx.state(_copy(trained)))
    assert all(isinstance(x, jax.Array) for x in jtu.tree_leaves(pure))
    model, optimizer = _make(seed=1)
    state = nnx.state((model, optimizer))
    nnx.replace_by_pure_dict(state, pure)
    nnx.update((model, optimizer), state)
    _goes_on_like(trained, model, optimizer)


def test_without_an_nnx_optimizer():
    # The functional way: states of `Variable`s go through the optimizer itself.
    graphdef, params, rest = nnx.split(_Model(nnx.Rngs(0)), nnx.Param, ...)
    state = _lion.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: _loss(nnx.merge(graphdef, p, rest)))(params)
        updates, state = _lion.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new, new_state = step(*step(params, state))
    assert step._cache_size() == 1
    assert jtu.tree_structure((new, new_state)) == jtu.tree_structure((params, state))
    # What has no `Variable`s goes with what has.
    bare = nnx.as_pure(params)
    grads = jtu.tree_map(jnp.ones_like, params)
    stepped, _ = _lion.step(bare, nnx.as_pure(state), grads)
    assert jtu.tree_structure(stepped) == jtu.tree_structure(bare)


@pytest.mark.once
def test_whole_modules_in_place_of_their_weights(tied):
    # What has no gradient, such as running averages, is in the module.
    model, _ = tied
    grads = jtu.tree_map(jnp.ones_like, nnx.state(model, nnx.Param))
    for made_for in (model, nnx.state(model, nnx.Param)):
        with pytest.raises(ValueError, match=r"pass what is trained, `nnx\.state"):
            _lion.step(model, _lion.init(made_for), grads)


class _Tied(nnx.Module):
    """An embedding that is the last layer, too; and running statistics."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(40, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(16, 40, use_bias=False, rngs=rngs)
        self.last.kernel = self.embed.embedding

    def __call__(self, tokens):
        x = self.drop(self.norm(self.embed(tokens)))
        return self.embed.attend(x)


@pytest.fixture(scope="module")
def tied():
    model = fq.cast(_Tied(nnx.Rngs(0)), jnp.bfloat16)
    # Twice: a wrapper around this library's optimizer, too.
    tx = optax.chain(optax.clip_by_global_norm(1.0), _lion)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean(model(jnp.arange(4)).astype(jnp.float32) ** 2)
        optimizer.update(model, nnx.grad(loss)(model))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        step(model, optimizer)
        step(model, optimizer)
    return model, optimizer


def _is_tied(model):
    return model.last.kernel is model.embed.embedding


def test_cast(tied):
    model, _ = tied
    assert _is_tied(model)
    assert model.embed.embedding.dtype == model.norm.scale.dtype == jnp.bfloat16
    # A running average would stand still.
    assert model.norm.mean.dtype == model.norm.var.dtype == jnp.float32
    kept = fq.cast(_Tied(nnx.Rngs(0)), jnp.bfloat16, keep=[nnx.BatchNorm, "embed.*"])
    assert kept.norm.scale.dtype == kept.last.kernel.dtype == jnp.float32
    assert _is_tied(kept)


def test_prepare():
    whole = _Tied(nnx.Rngs(0))
    make = lambda model: nnx.Optimizer(model, _lion, wrt=nnx.Param)
    model, optimizer = fq.prepare(whole, make)
    assert isinstance(optimizer, nnx.Optimizer) and _is_tied(model)
    assert model.norm.mean.dtype == jnp.float32
    found = fq.master_weights(model, optimizer).last.kernel[...]
    expected = whole.last.kernel[...]
    assert np.all(np.abs(found - expected) <= 2**-16 * np.abs(expected))
    assert not tree_identical(found, model.last.kernel[...].astype(jnp.float32))


def test_master_weights(tied):
    model, optimizer = tied
    whole = fq.master_weights(model, optimizer)
    assert _is_tied(whole)
    found = whole.last.kernel[...]
    assert found.dtype == jnp.float32
    assert tree_identical(found.astype(jnp.bfloat16), model.last.kernel[...])
    assert not tree_identical(found, model.last.kernel[...].astype(jnp.float32))
    # Of the weights alone, and by the state alone.
    params = nnx.state(model, nnx.Param)
    weights = fq.master_weights(params, optimizer.opt_state)
    assert tree_identical(nnx.state(whole, nnx.Param), weights)
    # There and back.
    edited = jtu.tree_map(lambda x: x * 2, weights)
    new_params, new = fq.from_master_weights(edited, params, optimizer)
    assert isinstance(new, nnx.Optimizer)
    assert jtu.tree_structure(new) == jtu.tree_structure(optimizer)
    again = fq.master_weights(new_params, new)
    difference = again["embed"]["embedding"][...] - 2 * found
    assert np.all(np.abs(difference) <= 2**-16 * np.abs(2 * found))


def test_precision_of_an_nnx_optimizer(tied):
    model, optimizer = tied
    report = fq.check_numerics(model, optimizer, learning_rate=1e-2)
    assert len(report.leaves) == 3
    wide = fq.widen_corrections(model, optimizer, "embed.embedding")
    assert jtu.tree_structure(wide) == jtu.tree_structure(optimizer)
    corrections = wide.opt_state[1].corrections
    assert corrections["embed"]["embedding"].dtype == jnp.int16
    assert corrections["norm"]["bias"].dtype == jnp.int8
    with pytest.raises(TypeError, match=r"the `nnx\.Optimizer` itself"):
        fq.master_weights(model, nnx.state(optimizer))


def test_map_moments(trained):
    model, optimizer = _copy(trained)
    same = fq.map_moments(lambda m: m, optimizer)
    _goes_on_like(trained, model, same)
    model, optimizer = _copy(trained)
    reset = fq.map_moments(lambda m: 0 * m, optimizer)
    assert jtu.tree_structure(reset) == jtu.tree_structure(optimizer)
    fq.map_moments(lambda m: np.testing.assert_array_equal(m, 0) or m, reset)
    _update(model, reset)


def test_checkpoints(tied, tmp_path):
    model, optimizer = tied

    def make():
        model = fq.cast(_Tied(nnx.Rngs(1)), jnp.bfloat16)
        return model, nnx.Optimizer(model, optimizer.tx, wrt=nnx.Param)

    with fq_checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, model, optimizer)
        restored = checkpoints.restore(*make())
        shapes = checkpoints.restore(*nnx.eval_shape(make))
        alone, _ = checkpoints.restore(_Tied(nnx.Rngs(1)), None)
    for found in (restored, shapes):
        assert _is_tied(found[0])
        for kind in (nnx.Param, nnx.BatchStat, nnx.OptState):
            expected = nnx.state((model, optimizer), kind)
            assert tree_identical(nnx.state(found, kind), expected)
    whole = fq.master_weights(model, optimizer)
    assert tree_identical(nnx.state(alone, nnx.Param), nnx.state(whole, nnx.Param))


@pytest.mark.parametrize("width, of_scales", [(32, ("model", None)), (4, ("model",))])
def test_names_of_mesh_axes(width, of_scales):
    # As each array of a state can have them: scales of one group, and scalars, cannot.
    init = nnx.with_metadata(
        nnx.initializers.lecun_normal(), out_sharding=("model", "data")
    )
    with nnx.use_eager_sharding(False):
        layer = nnx.Linear(16, width, kernel_init=init, rngs=nnx.Rngs(0))
        tx = fq.lion(1e-2, storage=fq.Storage(moments="learned"))
        optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
    moment = nnx.get_partition_spec(nnx.state(optimizer)).opt_state.moments["mu"]
    spec = {name: x.get_value() for name, x in moment["kernel"].items()}
    assert spec["codes"] == jax.sharding.PartitionSpec("model", "data")
    assert spec["scales"] == jax.sharding.PartitionSpec(*of_scales)
    assert spec["parameter"] == jax.sharding.PartitionSpec()
