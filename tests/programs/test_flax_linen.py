"""Programs in the style of Flax Linen, with these optimizers in place of Optax's."""

import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from flax import serialization, struct, traverse_util
from flax.core import freeze
from flax.training import checkpoints
from flax.training.train_state import TrainState

import flashquinox as fq

from ..helpers import tree_identical


_x = jax.random.normal(jax.random.key(0), (8, 16))
_y = jnp.sin(_x)


@pytest.fixture(autouse=True)
def _promotion():
    # Flax's own arithmetic promotes dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


_params = {
    "Dense_0": {
        "kernel": jax.random.normal(jax.random.key(1), (16, 40)).astype(jnp.bfloat16),
        "bias": jnp.zeros(40, jnp.bfloat16),
    }
}


def _apply():
    raise NotImplementedError


def _make(tx, params=_params):
    return TrainState.create(apply_fn=_apply, params=params, tx=tx)


def _same(restored, trained):
    # What is restored is in NumPy.
    return tree_identical(*(jtu.tree_map(jnp.asarray, x) for x in (restored, trained)))


# Most of the time goes to compilers.
_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@_jit
def _step(state):
    return state.apply_gradients(grads=jtu.tree_map(jnp.sin, state.params))


def _of_kernels(params):
    return jtu.tree_map(lambda x: "a" if x.ndim == 2 else "b", params)


@pytest.mark.parametrize(
    "tx, freeze",
    [
        (fq.adamw(1e-2), freeze),
        (
            optax.chain(
                optax.clip_by_global_norm(1.0),
                fq.sgd(1e-2, 0.9, storage=fq.Storage(moments="learned")),
            ),
            dict,
        ),
        (
            optax.MultiSteps(
                optax.inject_hyperparams(fq.lion, hyperparam_dtype=jnp.float32)(1e-2), 2
            ),
            dict,
        ),
        (
            optax.partition({"a": fq.lion(1e-2), "b": optax.sgd(1e-2)}, _of_kernels),
            dict,
        ),
        (fq.accumulate(fq.adamw(1e-2), 2), dict),
    ],
    ids=["alone", "chain", "multi-steps", "partition", "accumulate"],
)
def test_bytes(tx, freeze):
    trained = _step(_make(tx, freeze(_params)))
    data = serialization.to_bytes(trained)
    restored = serialization.from_bytes(_make(tx, freeze(_params)), data)
    assert jtu.tree_structure(restored) == jtu.tree_structure(trained)
    assert _same(restored, trained)
    # Bit for bit, and in one more program at most: arrays are NumPy's now.
    assert tree_identical(_step(restored), _step(trained))
    # A dictionary of arrays, by which functions of arrays can be mapped.
    stored = jtu.tree_map(np.asarray, serialization.to_state_dict(trained.opt_state))
    paths = traverse_util.flatten_dict(stored, sep="/")
    assert any(path.endswith("Dense_0/kernel/codes") for path in paths)
    again = serialization.from_state_dict(trained.opt_state, stored)
    assert _same(again, trained.opt_state)
    # What to restore to can also be said by shapes.
    shapes = jax.eval_shape(lambda: _make(tx, freeze(_params)).opt_state)
    again = serialization.from_state_dict(shapes, stored)
    assert jtu.tree_structure(again) == jtu.tree_structure(trained.opt_state)


def test_bytes_of_an_average():
    params = fq.cast(_params, jnp.bfloat16)
    optim, ema = fq.lion(1e-2), fq.ema(0.9)
    state = optim.init(params)
    average = ema.init(params, state)
    average = jax.jit(ema.update)(average, *jax.jit(optim.step)(params, state, params))
    data = serialization.to_bytes(average)
    restored = serialization.from_bytes(ema.init(params, state), data)
    assert jtu.tree_structure(restored) == jtu.tree_structure(average)
    assert _same(restored, average)


def test_checkpoints_of_flax(tmp_path):
    trained = _step(_make(fq.lion(1e-2)))
    checkpoints.save_checkpoint_multiprocess(tmp_path, trained, step=1)
    restored = checkpoints.restore_checkpoint(tmp_path, _make(fq.lion(1e-2)))
    assert _same(restored, trained)


def test_groups_that_lie_elsewhere():
    params, coarse, fine = (
        _params["Dense_0"],
        fq.lion(1e-2),
        fq.lion(1e-2, storage=fq.Storage(group_size=16)),
    )
    _, state = jax.jit(coarse.update)(params, coarse.init(params), params)
    data = serialization.to_bytes(state)
    restored = serialization.from_bytes(fine.init(params), data)
    found, expected = (
        jtu.tree_map(jnp.asarray, x.moments["mu"]["kernel"]) for x in (restored, state)
    )
    assert found.group_size == 16
    # Within the coarsest step of the codes, twice.
    found, expected = jax.jit(lambda x, y: (x.decode(), y.decode()))(found, expected)
    assert np.max(np.abs(found - expected)) <= np.max(np.abs(expected)) / 64
    jax.jit(fine.update)(params, restored, params)


_other = {"kernel": jnp.zeros((17, 40), jnp.bfloat16), "bias": jnp.zeros(40)}


@pytest.mark.parametrize(
    "other, params, message",
    [
        (fq.lion(1e-2), _params["Dense_0"], "`./moments/mu/kernel`, a moment of"),
        (
            fq.adamw(1e-2, storage=fq.Storage(master_weight_bits=32)),
            None,
            "int8 of shape (40,) was stored",
        ),
        (
            fq.adamw(1e-2, storage=fq.Storage(moments="softsign")),
            None,
            "`./moments/mu/kernel`, a moment of",
        ),
        (
            fq.adamw(1e-2, storage=fq.Storage(moments="float32")),
            None,
            "`./moments/mu/kernel`, nothing was",
        ),
        (fq.adamw(1e-2), {"kernel": _other["kernel"]}, "was stored, where"),
        (fq.adamw(1e-2), _other, "`./corrections/bias`, int8 of shape (40,)"),
        (optax.adamw(1e-2), None, "`./0/0"),
    ],
)
def test_states_of_something_else(other, params, message):
    # Whichever is stored, and whichever restored to.
    ours = fq.adamw(1e-2).init(_params["Dense_0"])
    theirs = other.init(_params["Dense_0"] if params is None else params)
    if isinstance(theirs, fq.OptimizerState):
        with pytest.raises(ValueError) as raised:
            serialization.from_bytes(theirs, serialization.to_bytes(ours))
        assert message in str(raised.value)
    with pytest.raises(ValueError, match="from_state_dict"):
        serialization.from_bytes(ours, serialization.to_bytes(theirs))


_ORDERS = """
import sys
import flashquinox as fq, jax.numpy as jnp
assert not any(name.startswith("flax") for name in sys.modules)
state = fq.lion(1e-2).init({"w": jnp.ones((2, 40), jnp.bfloat16)})
from flax.serialization import from_bytes, to_bytes
assert type(from_bytes(state, to_bytes(state))) is fq.OptimizerState
"""


@pytest.mark.once
def test_flax_may_come_later():
    subprocess.run([sys.executable, "-c", _ORDERS], check=True)


@struct.dataclass
class _Mine:
    params: dict
    optimizer: fq.OptimizerState
    count: int = struct.field(pytree_node=False, default=0)


def test_a_dataclass_of_flax():
    params = _params["Dense_0"]
    optim = fq.lion(1e-2)
    mine = _Mine(params, optim.init(params))

    @jax.jit
    def step(mine):
        new, state = optim.step(mine.params, mine.optimizer, mine.params)
        return mine.replace(params=new, optimizer=state)

    mine = step(step(mine))
    data = serialization.to_bytes(mine)
    again = serialization.from_bytes(_Mine(params, optim.init(params)), data)
    assert tree_identical(step(again), step(mine))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(16, param_dtype=jnp.bfloat16, kernel_init=init)(x), None


class _Net(nn.Module):
    """Stacked layers, whose kernels have names of mesh axes, and running statistics."""

    @nn.compact
    def __call__(self, x, train):
        layers = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers()(x, None)
        return nn.BatchNorm(use_running_average=not train)(x)


class _BatchState(TrainState):
    batch_stats: dict


def test_a_network():
    net = _Net()
    variables = _jit(partial(net.init, train=True))(jax.random.key(0), _x)
    make = lambda: _BatchState.create(
        apply_fn=net.apply,
        params=variables["params"],
        tx=fq.lion(1e-2),
        batch_stats=variables["batch_stats"],
    )

    @_jit
    def step(state):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            found, new = net.apply(variables, _x, True, mutable=["batch_stats"])
            return jnp.mean((found - _y).astype(jnp.float32) ** 2), new["batch_stats"]

        grads = jax.value_and_grad(loss, has_aux=True)
        (value, stats), grads = grads(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats), value

    state = make()
    before = jtu.tree_structure(state)
    losses = []
    for _ in range(4):
        state, loss = step(state)
        losses.append(loss)
    assert losses[-1] < losses[0]
    assert jtu.tree_structure(state) == before
    # A prefix, as `jax.jit(out_shardings=...)` takes it.
    specs = nn.get_partition_spec(state.opt_state)
    kernel = specs.moments["mu"]["Scan_Block_0"]["Dense_0"]["kernel"]
    wanted = jax.sharding.PartitionSpec("layers", None, "model")
    assert jtu.tree_leaves(kernel) == [wanted]
    again = serialization.from_bytes(state, serialization.to_bytes(state))
    assert tree_identical(step(again), step(state))
