"""Models of Haliax: arrays with named axes, and stacked layers."""

import io
import warnings
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import flashquinox as fq

from ..helpers import have_what_haliax_needs, slow, tree_identical


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import haliax as hax
    # One that is made for another version of JAX does not import.
    except ImportError:
        pytest.skip("needs a Haliax for this JAX", allow_module_level=True)


_BATCH, _PLACE = hax.Axis("batch", 8), hax.Axis("place", 6)
_VOCAB, _EMBED = hax.Axis("vocab", 20), hax.Axis("embed", 32)
_HIDDEN, _LAYERS = hax.Axis("hidden", 64), hax.Axis("layers", 2)


@pytest.fixture(autouse=True)
def _as_haliax_needs(monkeypatch):
    have_what_haliax_needs(monkeypatch)
    # Haliax promotes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class _Block(eqx.Module):
    norm: hax.nn.LayerNorm
    up: hax.nn.Linear
    down: hax.nn.Linear
    dropout: hax.nn.Dropout
    identity: eqx.nn.Identity

    @staticmethod
    def init(*, key):
        keys = jr.split(key)
        return _Block(
            hax.nn.LayerNorm.init(_EMBED),
            hax.nn.Linear.init(_EMBED, _HIDDEN, key=keys[0]),
            hax.nn.Linear.init(_HIDDEN, _EMBED, key=keys[1], use_bias=False),
            hax.nn.Dropout(0.1),
            eqx.nn.Identity(),
        )

    def __call__(self, x, *, key):
        y = self.down(hax.nn.gelu(self.up(self.norm(x))))
        return self.identity(x + self.dropout(y, key=key))


class _Model(eqx.Module):
    embed: hax.nn.Embedding
    blocks: hax.nn.Stacked
    head: hax.nn.Linear
    counts: jax.Array

    @staticmethod
    def init(key):
        keys = jr.split(key, 3)
        return _Model(
            hax.nn.Embedding.init(_VOCAB, _EMBED, key=keys[0]),
            hax.nn.Stacked.init(_LAYERS, _Block)(key=jr.split(keys[1])),
            hax.nn.Linear.init(_EMBED, _VOCAB, key=keys[2]),
            jnp.arange(3),
        )

    def __call__(self, tokens, *, key):
        x = self.blocks.fold(self.embed(tokens), key=jr.split(key))
        return self.head(x)


_init = eqx.filter_jit(_Model.init)


def _loss(model, key):
    """Each token is the one before it plus 3."""
    tokens = (jnp.arange(8)[:, None] + 3 * jnp.arange(6)) % 20
    tokens = hax.named(tokens, (_BATCH, _PLACE))
    logits = model(tokens, key=key).astype(jnp.float32)
    target = hax.nn.one_hot((tokens + 3) % 20, _VOCAB)
    return hax.nn.cross_entropy_loss(logits, _VOCAB, target).scalar()


def _train(optim, model, way, steps=10):
    trainable = hax.tree_util.tree_map(
        lambda x: eqx.is_inexact_array(getattr(x, "array", x)), model
    )
    part = eqx.filter(model, trainable)
    state = optim.init(part if way == "part" else model)

    # Most of the time goes to compilers.
    @partial(hax.named_jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(model, state, key):
        part, rest = eqx.partition(model, trainable)
        value, grads = eqx.filter_value_and_grad(
            lambda part: _loss(eqx.combine(part, rest), key)
        )(part)
        if way == "step":
            return *optim.step(model, state, grads), value
        updates, state = optim.update(grads, state, part if way == "part" else model)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for i in range(steps):
        model, state, value = step(model, state, jr.key(i))
        losses.append(float(value))
    return model, state, losses


@pytest.fixture(scope="module")
def trained():
    """A bfloat16 model, its optimizer and state, and losses beside Optax's."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.core, "is_constant_dim", lambda _: True, raising=False)
            model = _init(jr.key(0))
            expected = _train(optax.lion(1e-2), model, "part")[2]
            narrow = fq.cast(model, jnp.bfloat16, keep=[hax.nn.LayerNorm, "head"])
            # One moment: less to compile. AdamW is on the mesh below.
            optim = fq.lion(1e-2)
            new, state, losses = _train(optim, narrow, "step")
    return optim, narrow, new, state, losses, expected


@pytest.mark.once
def test_trains_as_with_optax(trained):
    _, narrow, new, _, losses, expected = trained
    learned = expected[0] - expected[-1]
    assert learned > 0.2 * expected[0]
    # Logits in bfloat16, and moments of 8 bits.
    assert np.max(np.abs(np.subtract(losses, expected))) <= 0.1 * learned
    assert jtu.tree_structure(new) == jtu.tree_structure(narrow)
    assert np.array_equal(new.counts, narrow.counts)


@pytest.mark.once
@pytest.mark.parametrize("way", ["part", slow("whole")])
def test_updates_are_steps(trained, way):
    """As programs of Optax take them: of what is trained, or of everything."""
    optim, narrow, _, _, losses, _ = trained
    assert np.allclose(_train(optim, narrow, way, 3)[2], losses[:3], rtol=2**-7)


def test_cast_and_master_weights(trained):
    _, narrow, new, state, _, _ = trained
    kept = narrow.blocks.stacked.norm
    assert isinstance(kept, fq.Float32Layer)
    assert isinstance(kept.weight, hax.NamedArray) and kept.weight.dtype == jnp.float32
    assert narrow.head.weight.dtype == jnp.float32
    assert narrow.embed.weight.dtype == jnp.bfloat16
    masters = fq.master_weights(new, state)
    assert masters.embed.weight.axes == narrow.embed.weight.axes
    again, same = fq.from_master_weights(masters, new, state)
    assert tree_identical(fq.master_weights(again, same), masters)
    by_path = fq.cast(_init(jr.key(0)), jnp.bfloat16, keep="*.up.weight")
    assert by_path.blocks.stacked.up.weight.dtype == jnp.float32
    assert by_path.blocks.stacked.up.bias.dtype == jnp.bfloat16
    wide = fq.widen_corrections(new, state, ["embed", "*.down.weight"])
    assert wide.corrections.embed.weight.array.dtype == jnp.int16
    assert wide.corrections.blocks.stacked.up.weight.array.dtype == jnp.int8


def test_masks_and_plans(trained):
    """Named arrays count as leaves in `haliax.tree_util`, and as parts in JAX."""
    optim, narrow, _, state, _, _ = trained
    grads = jtu.tree_map(
        lambda x: np.zeros_like(x) if eqx.is_inexact_array(x) else None, narrow
    )
    decays = lambda tree: hax.tree_util.tree_map(
        lambda x: isinstance(x, hax.NamedArray) and x.ndim > 1, tree
    )
    masked = fq.sgdw(0.5, weight_decay=0.5, mask=decays)
    new, _ = masked.step(narrow, masked.init(narrow), grads)
    for where, moved in (
        (lambda m: m.embed.weight.array, True),
        (lambda m: m.head.bias.array, False),
    ):
        assert bool(jnp.all(where(new) == where(narrow))) is not moved
    assert fq.memory_plan(narrow, optim) == fq.memory_plan(
        eqx.filter_eval_shape(lambda: narrow), optim
    )
    assert int(state.count) == 10


def test_checkpoints(trained, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    from flashquinox.checkpoint import Checkpoints

    optim, narrow, new, state, _, _ = trained
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (new, state))
    file.seek(0)
    like = narrow, optim.init(narrow)
    assert tree_identical(eqx.tree_deserialise_leaves(file, like), (new, state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, new, state)
        checkpoints.wait()
        assert tree_identical(checkpoints.restore(*like), (new, state))


def test_axis_mapping():
    """A mesh, and arrays divided along named axes: `init` under `named_jit` and `step`
    make states that are divided like their weights."""
    kinds = (AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=kinds, devices=jax.devices()[:4])
    mapping = {"embed": "data"}
    model = fq.cast(hax.nn.Linear.init(_HIDDEN, _EMBED, key=jr.key(0)), jnp.bfloat16)
    grads = jtu.tree_map(jnp.ones_like, model)
    optim = fq.adamw(1e-2)
    expected = jax.jit(optim.step)(model, optim.init(model), grads)
    with jax.set_mesh(mesh):
        placed = hax.shard(model, mapping)
        with pytest.warns(UserWarning, match="not known how it is divided"):
            make = hax.named_jit(optim.init, axis_resources=mapping)
            unknowing = make(placed)
            step = hax.named_jit(optim.step, axis_resources=mapping)
            found = [step(placed, unknowing, grads)]
        state = optim.init(placed)
        assert state.shardings
        found.append(hax.named_jit(optim.step)(placed, state, grads))
    for new, new_state in found:
        assert new.weight.array.sharding.spec == placed.weight.array.sharding.spec
        for x, y in zip(
            jtu.tree_leaves((new, new_state)), jtu.tree_leaves(expected), strict=True
        ):
            assert np.array_equal(np.asarray(x), np.asarray(y))
