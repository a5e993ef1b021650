"""What is measured of a route."""

import collections
import contextlib
import ctypes
import glob
import os
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from _contenders import JaxStep, optional
from _gpu_routes import plain_step
from _timing import Plan


_STEPS = 10


def rate(step: JaxStep, plan: Plan, side: int) -> float:
    """Parameters a second, in a compiled loop."""
    ready = step.ready(_STEPS, alone=False)
    timing = plan.measure(ready.run, _STEPS)
    assert ready.is_finite()
    ready.close()
    return side**2 / timing.median


def compiled(step: JaxStep) -> dict[str, Any]:
    """How long it takes to make one step, and to call it for the first time."""
    jax.clear_caches()
    operands = (step.params, step.state), step.grads
    arrays = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), operands)
    jax.block_until_ready(arrays)
    start = time.perf_counter()
    lowered = _one(step).lower(*operands)
    traced = time.perf_counter()
    program = lowered.compile()
    jax.block_until_ready(program(*arrays))
    end = time.perf_counter()
    memory: Any = program.memory_analysis()
    return {
        "trace seconds": traced - start,
        "compile seconds": end - traced,
        "temporary bytes": memory.temp_size_in_bytes,
    }


def _one(step: JaxStep) -> Any:
    one = lambda carry, grads: step.step(carry[0], carry[1], grads)
    return jax.jit(one, donate_argnums=0)


def kernels(step: JaxStep) -> dict[str, Any]:
    """What the kernels need of which there is PTX: in the program itself, or where
    compilers write it to when they are asked. Asking takes time, and what was compiled
    before is not written."""
    folder = os.environ[DUMPS]
    os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": folder}
    lowered = _one(step).lower((step.params, step.state), step.grads)
    lowered.compile()
    texts = [path.read_text() for path in pathlib.Path(folder).rglob("*.ptx")]
    texts += [
        re.sub(r"\\([0-9A-F]{2})", lambda x: chr(int(x[1], 16)), text)
        for text in re.findall(r'kernel_data = "((?:[^"\\]|\\.)*)"', lowered.as_text())
    ]
    found = {}
    for text in texts:
        for name in re.findall(r"\.entry\s+(\w+)", text):
            found[name] = attributes(text, name)
    return {"kernels": found}


# The name of what has the folder that jax-triton writes PTX to, and others may.
DUMPS = "JAX_TRITON_DUMP_DIR"
# Of CUDA's driver API, `CUfunction_attribute`.
_LOCAL_BYTES, _REGISTERS = 3, 4


def attributes(ptx: str, name: str) -> dict[str, Any]:
    """What a kernel needs, by the driver that compiles it."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context, module, function = (ctypes.c_void_p() for _ in range(3))
    found: dict[str, Any] = {}

    def call(of: str, *args: Any) -> None:
        code = getattr(cuda, of)(*args)
        if code != 0:
            raise RuntimeError(f"{of}: error {code}")

    try:
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        call("cuCtxSetCurrent", context)
        text = ctypes.create_string_buffer(ptx.encode())
        call("cuModuleLoadData", ctypes.byref(module), text)
        call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        for key, number in (("registers", _REGISTERS), ("local bytes", _LOCAL_BYTES)):
            value = ctypes.c_int()
            call("cuFuncGetAttribute", ctypes.byref(value), number, function)
            found[key] = value.value
    except RuntimeError as error:
        return {"error": str(error)}
    return found


def exported(step: JaxStep) -> dict[str, Any]:
    """Whether `jax.export` accepts one step. Without a GPU, for an H100."""
    operands, treedef = jtu.tree_flatten((step.params, step.state, step.grads))
    # Of arrays alone, which need no names in a file.
    one = jax.jit(lambda *xs: jtu.tree_leaves(step.step(*treedef.unflatten(xs))))
    is_there = jax.default_backend() == "gpu"
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    here = contextlib.nullcontext if is_there else jax.sharding.use_abstract_mesh
    arguments = () if is_there else (mesh,)

    def error_of(checks: list[Any]) -> str:
        try:
            make = jax.export.export(one, platforms=["cuda"], disabled_checks=checks)
            with here(*arguments):
                made = make(*operands)
            if optional("flatbuffers") is not None:
                jax.export.deserialize(made.serialize())
        except Exception as error:
            return " ".join(str(error).split())
        return ""

    if not (error := error_of([])):
        return {"export": "yes"}
    with here(*arguments):
        text = one.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    names = sorted(set(re.findall(r'custom_call @"?([\w.$]+)', text)))
    check = jax.export.DisabledSafetyCheck.custom_call
    if not error_of([check(x) for x in names]):
        return {"export": f"without the check of {', '.join(names)}"}
    return {"export": f"no: {error[-200:]}"}


def differences(step: JaxStep, side: int) -> dict[str, Any]:
    """After one step from a state of three steps of plain XLA: the share of codes of
    moments that differ, and their largest difference; of every array, the share of
    elements that differ."""
    plain = jax.jit(plain_step(side).step)
    keys = jax.random.split(jax.random.key(0), 5)
    normal = lambda key: jax.random.normal(key, (side, side)).astype(jnp.bfloat16)
    params = [0.02 * normal(keys[0])]
    state = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), step.state)
    for key in keys[1:4]:
        params, state = plain(params, state, [1e-3 * normal(key)])
    grads = [1e-3 * normal(keys[4])]
    expected = jtu.tree_leaves(plain(params, state, grads))
    found = jtu.tree_leaves(jax.jit(step.step)(params, state, grads))
    # Codes of moments are beside the weight, the number of the step, and scales.
    shares = {}
    pairs = list(zip(expected, found, strict=True))
    for i, (x, y) in enumerate(pairs):
        shares[f"{i} {x.dtype}"] = float(jnp.mean((x != y).astype(jnp.float32)))
    codes = [pair for pair in pairs if pair[0].dtype in (jnp.int8, jnp.uint8)][:2]
    apart = [jnp.abs(x.astype(jnp.int32) - y.astype(jnp.int32)) for x, y in codes]
    return {
        "differ": max([float(jnp.mean((x > 0).astype(jnp.float32))) for x in apart]),
        "largest difference": max([int(x.max()) for x in apart]),
        "shares": shares,
    }


def profiled(step: JaxStep) -> dict[str, Any]:
    """The kernel that takes the longest, as the profiler sees it."""
    ready = step.ready(_STEPS, alone=False)
    ready.run(1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            ready.run(1)
        ready.close()
        paths = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(paths[0])
        seconds: dict[str, float] = collections.defaultdict(float)
        details = {}
        for plane in data.planes:
            for line in plane.lines if "GPU" in plane.name else ():
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    seconds[event.name] += event.duration_ns / 1e9 / _STEPS
                    details[event.name] = {k: str(v) for k, v in event.stats}
    if not seconds:
        return {}
    name = max(seconds, key=lambda x: seconds[x])
    found = {
        "kernel": name,
        "kernel seconds": seconds[name],
        "kernel details": details[name].get("kernel_details", str(details[name])),
    }
    if numbers := re.findall(r"regs:(\d+)", found["kernel details"]):
        found["registers"] = int(numbers[0])
    return found
