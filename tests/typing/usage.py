"""Programs for type checkers, which are not run: what is typed by a caller stays typed,
and an optimizer goes where one of Optax's does. Pyright and mypy check it."""

import io
from typing import Any, assert_type, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import flashquinox as fq
from flashquinox import exchange
from flashquinox.checkpoint import Checkpoints


class Net(eqx.Module):
    weight: jax.Array


def train(net: Net, grads: Net) -> tuple[Net, fq.OptimizerState]:
    net = fq.cast(net, jnp.bfloat16, keep=lambda x: x.ndim < 2)
    assert_type(net, Net)
    optim = fq.adamw(1e-3, weight_decay=1e-2)
    assert_type(optim, fq.Optimizer)
    state = optim.init(net)
    assert_type(state, fq.OptimizerState)
    assert_type(optim.step(net, state, grads), tuple[Net, fq.OptimizerState])
    clipped = optim.step(net, state, grads, max_norm=1.0)
    assert_type(clipped, tuple[Net, fq.OptimizerState])
    updates, state = optim.update(grads, state, net)
    assert_type(updates, Net)
    assert_type(state, fq.OptimizerState)
    return optim.step(net, state, grads)


def other_trees(params: dict[str, jax.Array]) -> None:
    assert_type(fq.cast(params, "bfloat16"), dict[str, jax.Array])
    optim = fq.lion(1e-3)
    assert_type(
        optim.step(params, optim.init(params), params),
        tuple[dict[str, jax.Array], fq.OptimizerState],
    )


def prepared(net: Net) -> None:
    assert_type(fq.prepare(net, fq.adamw(1e-3)), tuple[Net, fq.OptimizerState])
    init = lambda model: {"of": fq.adamw(1e-3).init(model)}
    assert_type(fq.prepare(net, init, jnp.float16, keep="*.bias"), tuple[Net, Any])


def masters(net: Net, state: fq.OptimizerState, wrapped: tuple[str, int]) -> None:
    assert_type(fq.master_weights(net, state), Net)
    # Also of states of wrappers: they stay what they are.
    assert_type(fq.master_weights(net, wrapped), Net)
    assert_type(fq.from_master_weights(net, net, state), tuple[Net, fq.OptimizerState])
    assert_type(fq.from_master_weights(net, net, wrapped), tuple[Net, tuple[str, int]])
    assert_type(fq.widen_corrections(net, state), fq.OptimizerState)
    assert_type(fq.narrow_corrections(net, wrapped), tuple[str, int])
    assert_type(fq.ensure_precision(net, state, 1e-3), fq.OptimizerState)
    assert_type(exchange.from_optax((), state), fq.OptimizerState)
    assert_type(exchange.load_safetensors("model.safetensors", net), Net)


def restored(saved: Checkpoints, net: Net, state: fq.OptimizerState) -> None:
    assert_type(saved.restore(net, state), tuple[Net, fq.OptimizerState])
    assert_type(saved.restore(net), tuple[Net, None])


def released(net: Net, state: fq.OptimizerState, loss: fq.LayeredLoss) -> None:
    new, new_state, value = fq.release_step(fq.sgd(0.1), loss, net, state, batch=None)
    assert_type(new, Net)
    assert_type(new_state, fq.OptimizerState)
    del value


def with_optax(net: Net, grads: Net) -> None:
    schedule = optax.cosine_decay_schedule(1e-3, 100)
    optim = fq.adamw(schedule, weight_decay=schedule, mask=lambda p: p)
    plain: optax.GradientTransformation = optim
    extended: optax.GradientTransformationExtraArgs = optim
    chain: optax.GradientTransformation = optax.chain(
        optax.clip_by_global_norm(1.0), optim
    )
    steps: Any = optax.MultiSteps(optim, every_k_schedule=2)
    injected: Any = optax.inject_hyperparams(fq.adamw)(learning_rate=1e-3)
    state = chain.init(eqx.filter(net, eqx.is_inexact_array))
    del plain, extended, steps, injected, state, grads


def accumulated(net: Net, grads: Net) -> None:
    optim, ema = fq.accumulate(fq.adamw(1e-3), every=8), fq.ema(0.999)
    assert_type(optim, fq.AccumulatingOptimizer)
    extended: optax.GradientTransformationExtraArgs = optim
    state = optim.init(net)
    assert_type(state, fq.AccumulationState)
    net, state = optim.step(net, state, grads, max_norm=1.0)
    average = ema.update(ema.init(net, state), net, state)
    assert_type(average, fq.EMAState)
    assert_type(ema.model(average, net), Net)
    fq.accumulate(optim.inner, lambda count: 1 + count, bits=16, mean=False)
    del extended


def arguments(mesh: Mesh, net: Net) -> None:
    fq.adam(jnp.asarray(1e-3), b1=0.9)
    fq.sgdw(lambda count: 1e-3 / (1 + count), momentum=0.9)
    fq.lion(1e-3, mask={"weight": True}, shardings=fq.fsdp_shardings(net, mesh))
    fq.adamw(
        1e-3,
        storage=fq.Storage(moments="float32", master_weight_bits=32),
        backend="xla",
    )
    fq.optimizer(fq.Adam(), 1e-3, decay="l2")
    eqx.tree_serialise_leaves(io.BytesIO(), fq.adamw(1e-3).init(net))


def mine(learning_rate: float, **options: Unpack[fq.Options]) -> fq.Optimizer:
    """A user's own factory, with the options of those of the library."""
    storage: fq.Storage = fq.Storage(group_size=64)
    assert_type(storage.codecs, fq.MomentCodecs)
    return fq.lion(learning_rate, decay="independent", storage=storage, **options)


def wrong() -> None:
    """Each line is an error for pyright and for mypy, which say if it is none."""
    mine(1e-3, moments="float32")  # type: ignore[call-arg]
    mine(1e-3, backend="cuda")  # type: ignore[arg-type]
    fq.adamw(1e-3, moments="float32")  # type: ignore[call-arg]
    fq.adamw(1e-3, storage="float32")  # type: ignore[arg-type]
    fq.adamw(1e-3, decay="l2")  # type: ignore[arg-type]
    fq.sgd(1e-3, skip_nonfinite="no")  # type: ignore[arg-type]
    fq.Storage(master_weight_bits=16)  # type: ignore[arg-type]
    fq.accumulate(fq.adamw(1e-3), 8, bits=8)  # type: ignore[arg-type]


class Compiled:
    """Through `filter_jit`, as in a training loop."""

    def __init__(self, net: Net):
        self.optim = fq.adamw(1e-3)
        self.net, self.state = net, self.optim.init(net)

    def step(self, grads: Net) -> None:
        self.net, self.state = self.optim.step(self.net, self.state, grads)
