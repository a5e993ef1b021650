"""Steps of optimizers that are measured beside each other, on leaves of given shapes:
of flashquinox, Optax, PyTorch, FlashOptim and flashoptim-jax."""

import dataclasses
import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from _models import Shapes
from _timing import looped, Plan, Program, time_loop
from jaxtyping import PyTree

import flashquinox as fq


# Of every contender that takes them.
HYPERPARAMETERS = {"learning_rate": 1e-3, "weight_decay": 0.01}
MOMENTUM = 0.9
# Optimizers of both libraries that are measured on request, with their defaults but for
# the learning rate; of Optax, as `optax-lamb` and so on.
OTHERS = ("lamb", "lars", "adafactor", "schedule_free_adamw", "muon")


@dataclasses.dataclass(frozen=True)
class Ready:
    """What can be timed: all of its arrays are on the device.

    - `run`: gives the seconds that so many rounds take.
    - `steps`: of a round.
    - `facts`: what is known without timing.
    - `is_finite`: whether weights are, as far as that is quickly found.
    - `close`: frees the arrays.
    """

    run: Callable[[int], float]
    steps: int
    facts: dict[str, Any]
    is_finite: Callable[[], bool]
    close: Callable[[], None]


def _bytes(read: int, updated: int) -> dict[str, int]:
    """What all arrays take; and what a step must move, of them: gradients once, weights
    and state twice."""
    return {"bytes": read + updated, "moved bytes": read + 2 * updated}


#
# JAX
#


@dataclasses.dataclass(frozen=True)
class JaxStep:
    """`step(params, state, grads)` for arrays of these shapes and dtypes."""

    params: PyTree
    state: PyTree
    grads: PyTree
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    # Makes the state. `None` for a state of zeros: then nothing has to be compiled.
    init: Callable[[Any], Any] | None = None

    def ready(self, steps: int, alone: bool = True) -> Ready:
        """So many steps in one compiled program, which Python calls. What it took to
        make it is only told if nothing else goes on: if this is `alone`."""
        program = self._program(steps, alone)
        program.carry, *program.operands = self._arrays()
        arrays = _bytes(_nbytes(program.operands), _nbytes(program.carry))
        finite = lambda: _finite(program.carry[0])
        return Ready(program.run, steps, arrays | program.facts, finite, program.close)

    def facts_of_one_step(self) -> dict[str, Any]:
        return self._program(1, alone=True).facts

    def _program(self, steps: int, alone: bool) -> Program:
        one = lambda carry, grads: self.step(carry[0], carry[1], grads)
        function = looped(one, steps) if steps > 1 else one
        structs = (self.params, self.state), self.grads
        return Program(function, *structs, alone=alone)

    def _arrays(self) -> tuple[tuple[PyTree, PyTree], PyTree]:
        params, grads = (
            jax.device_put([_filled(x.shape, x.dtype, scale) for x in structs])
            for structs, scale in ((self.params, 0.02), (self.grads, 1e-3))
        )
        if self.init is None:
            state = jax.device_put(jtu.tree_map(_zeros, self.state))
        else:
            state = jax.jit(self.init)(params)
        return (params, state), grads


def _nbytes(tree: PyTree) -> int:
    return sum(x.nbytes for x in jtu.tree_leaves(tree))


# Arrays are made on the host: on the device, a program would be compiled for each
# shape. The same random numbers repeat, and the same zeros serve everywhere: with
# others, large models would take longer to fill than to measure.
_RANDOM = np.random.default_rng(0).normal(size=1_000_003)


def _filled(shape: tuple[int, ...], dtype: Any, scale: float) -> np.ndarray:
    return np.resize((scale * _RANDOM).astype(dtype), shape)


def _zeros(x: jax.ShapeDtypeStruct) -> np.ndarray:
    size = x.size * x.dtype.itemsize
    if size > _FEW_ZEROS.size:
        return np.zeros(x.shape, x.dtype)
    return _FEW_ZEROS[:size].view(x.dtype).reshape(x.shape)


_FEW_ZEROS = np.zeros(2**28, np.uint8)


# How many elements are looked at on the host: for a look on the device, a program would
# be compiled for each shape.
_LOOK_AT = 2**22


def _finite(params: list[jax.Array]) -> bool:
    """Of small leaves, and of at least one."""
    seen = 0
    for x in sorted(params, key=lambda x: x.size):
        if seen > 0 and seen + x.size > _LOOK_AT:
            break
        seen += x.size
        if not np.isfinite(np.asarray(x)).all():
            return False
    return True


def our_step(
    optimizer: str,
    shapes: Shapes,
    *,
    dtype: Any = jnp.bfloat16,
    state_for: Any = "auto",
    backend: Any = "auto",
    pack_below: int = 0,
    hyperparameters: dict[str, Any] = HYPERPARAMETERS,
) -> JaxStep:
    """`state_for` is the backend by which groups are laid out."""
    make: Callable[..., Any] = getattr(fq, optimizer)
    keywords: Any = hyperparameters | (
        {"momentum": MOMENTUM} if optimizer == "sgdw" else {}
    )
    keywords |= {"storage": fq.Storage(pack_below=pack_below)}
    params = _structs(shapes, dtype)
    state = jax.eval_shape(make(**keywords, backend=state_for).init, params)
    return JaxStep(params, state, params, make(**keywords, backend=backend).step)


def optax_step(
    optimizer: str,
    shapes: Shapes,
    dtype: Any,
    hyperparameters: dict[str, Any] = HYPERPARAMETERS,
) -> JaxStep:
    if optimizer == "sgdw":
        optim = optax.chain(
            optax.trace(MOMENTUM),
            optax.add_decayed_weights(HYPERPARAMETERS["weight_decay"]),
            optax.scale_by_learning_rate(HYPERPARAMETERS["learning_rate"]),
        )
    else:
        there = optax if hasattr(optax, optimizer) else optax.contrib
        optim = getattr(there, optimizer)(**hyperparameters)

    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = optim.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = _structs(shapes, dtype)
    return JaxStep(params, jax.eval_shape(optim.init, params), params, step)


def flashoptim_jax_step(package: Any, optimizer: str, shapes: Shapes) -> JaxStep:
    keywords: Any = HYPERPARAMETERS | (
        {"momentum": MOMENTUM} if optimizer == "sgdw" else {}
    )
    optim = getattr(package, f"flash_{optimizer}")(**keywords)
    params = _structs(shapes, jnp.bfloat16)
    state = jax.eval_shape(optim.init, params)
    return JaxStep(params, state, params, optim.step, optim.init)


def _structs(shapes: Shapes, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    # A list: dictionaries are sorted by JAX.
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes.values()]


#
# PyTorch
#


def optional(name: str) -> Any:
    """A module, or `None` where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def torch_with_gpu() -> Any:
    torch = optional("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


@dataclasses.dataclass(frozen=True)
class TorchStep:
    """An optimizer of PyTorch, made of a list of weights of that dtype."""

    torch: Any
    make: Callable[[list[Any]], Any]
    shapes: Shapes
    dtype: str

    def ready(self, steps: int, alone: bool = True) -> Ready:
        """Of one step, which Python calls: there is no program of several."""
        del steps, alone
        torch, dtype = self.torch, getattr(self.torch, self.dtype)
        params = []
        for shape in self.shapes.values():
            x = torch.empty(shape, dtype=dtype, device="cuda").normal_(0, 0.02)
            param = torch.nn.Parameter(x)
            param.grad = torch.empty_like(x).normal_(0, 1e-3)
            params.append(param)
        optim = self.make(params)

        def run(calls: int) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                optim.step()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000

        def close() -> None:
            for x in params:
                x.grad = None
            optim.state.clear()
            optim.param_groups.clear()
            params.clear()
            torch.cuda.empty_cache()

        start = time.perf_counter()
        optim.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        state = [x for group in optim.state.values() for x in group.values()]
        sizes = lambda xs: sum(x.numel() * x.element_size() for x in xs)
        facts = {
            **_bytes(sizes(x.grad for x in params), sizes([*params, *_tensors(state)])),
            "compile seconds": seconds,
        }
        finite = lambda: all(bool(x.isfinite().all()) for x in params)
        return Ready(run, 1, facts, finite, close)

    def facts_of_one_step(self) -> dict[str, Any]:
        """PyTorch tells nothing of it."""
        return {}


def _tensors(values: list[Any]) -> list[Any]:
    """The tensors among values, and in the fields of objects among them."""
    found = []
    for x in values:
        if hasattr(x, "element_size"):
            found.append(x)
        elif hasattr(x, "__dict__"):
            found += _tensors(list(vars(x).values()))
    return found


def torch_step(torch: Any, shapes: Shapes) -> TorchStep:
    """AdamW in float32."""
    keywords = _torch_keywords("adamw")
    make = lambda params: torch.optim.AdamW(params, fused=True, **keywords)
    return TorchStep(torch, make, shapes, "float32")


def flashoptim_step(
    torch: Any, package: Any, optimizer: str, shapes: Shapes
) -> TorchStep:
    names = {"adamw": "FlashAdamW", "lion": "FlashLion", "sgdw": "FlashSGDW"}
    flash = getattr(package, names[optimizer])
    make = lambda params: flash(params, **_torch_keywords(optimizer))
    return TorchStep(torch, make, shapes, "bfloat16")


def _torch_keywords(optimizer: str) -> dict[str, float]:
    keywords = {
        "lr": HYPERPARAMETERS["learning_rate"],
        "weight_decay": HYPERPARAMETERS["weight_decay"],
    }
    return keywords | ({"momentum": MOMENTUM} if optimizer == "sgdw" else {})


#
# The limit
#


def copy_bandwidth(plan: Plan, size: int) -> float:
    """How many bytes a second are read and written, of an array that is negated in its
    place."""
    timing, _ = time_loop(plan, lambda x: -x, jnp.ones((size // 4,), jnp.float32))
    return 2 * size / timing.median
