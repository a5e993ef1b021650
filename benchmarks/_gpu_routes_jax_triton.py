"""AdamW by jax-triton: the jaxpr of `update_tile`, written as a kernel in Triton's own
language. One warp takes 16 groups.

It has the operations that this step consists of, and is the measure of a way, not a
translator of whatever a rule may say.
"""

import functools
import importlib
import importlib.util
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.lax as lax
import numpy as np
from _gpu_routes import GROUP, NAME, Problem, traced_tile
from jaxtyping import Array

from flashquinox._common.arithmetic import (
    accurate_quotient,
    byte_times,
    canonical_pattern,
    Replaceable,
    rounded_quotient,
    rounded_root,
)


# Where it is installed.
jax_triton: Any = importlib.import_module("jax_triton")

_GROUPS = 16
_HEAD = """import triton
import triton.language as tl


@triton.jit
def reciprocal(x):
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def nearest(x):
    return tl.inline_asm_elementwise(
        "cvt.rni.f32.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def pattern(x):
    return tl.minimum(x.to(tl.int32, bitcast=True), 0x7FC00000)

"""
_TYPES = {
    "float32": "tl.float32",
    "bfloat16": "tl.bfloat16",
    "bool": "tl.int1",
    **{
        f"{sign}int{bits}": f"tl.{sign}int{bits}"
        for sign in ("", "u")
        for bits in (8, 16, 32)
    },
}
_OPERATIONS = {
    lax.add_p: "{} + {}",
    lax.sub_p: "{} - {}",
    lax.mul_p: "{} * {}",
    lax.div_p: "{} * reciprocal({})",
    lax.max_p: "tl.maximum({}, {})",
    lax.min_p: "tl.minimum({}, {})",
    lax.abs_p: "tl.abs({})",
    lax.sqrt_p: "tl.sqrt({})",
    lax.round_p: "nearest({})",
    lax.and_p: "{} & {}",
    lax.or_p: "{} | {}",
    lax.xor_p: "{} ^ {}",
    lax.not_p: "~{}",
    lax.shift_left_p: "{} << {}",
    lax.shift_right_logical_p: "{} >> {}",
    lax.shift_right_arithmetic_p: "{} >> {}",
    lax.eq_p: "{} == {}",
    lax.ne_p: "{} != {}",
    lax.lt_p: "{} < {}",
    lax.le_p: "{} <= {}",
    lax.gt_p: "{} > {}",
    lax.ge_p: "{} >= {}",
    lax.select_n_p: "tl.where({0}, {2}, {1})",
    lax.reduce_max_p: "tl.max({}, 1)",
    lax.reduce_min_p: "tl.min({}, 1)",
}
_REPLACED = {
    byte_times: "{}.to(tl.int32) * {}",
    canonical_pattern: "pattern({}).to(tl.uint32, bitcast=True)",
    rounded_quotient: "tl.div_rn({}, {})",
    accurate_quotient: "tl.div_rn({}, {})",
    rounded_root: "tl.sqrt_rn({})",
}


def _lines(jaxpr: Any, names: dict[Any, str], prefix: str) -> Iterator[str]:
    """The statements of a jaxpr. `names` has its arguments; its results are added."""

    def name(atom: Any) -> str:
        if not hasattr(atom, "val"):
            return names[atom]
        value = np.asarray(atom.val).item()
        return f"tl.full((), {value!r}, {_TYPES[str(atom.aval.dtype)]})"

    for number, eqn in enumerate(jaxpr.eqns):
        operands = [name(x) for x in eqn.invars]
        results = [f"{prefix}{number}_{i}" for i in range(len(eqn.outvars))]
        names.update(zip(eqn.outvars, results, strict=True))
        called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if called is not None:
            inner = dict(zip(called.jaxpr.invars, operands, strict=True))
            yield from _lines(called.jaxpr, inner, f"{results[0]}_")
            for result, atom in zip(results, called.jaxpr.outvars, strict=True):
                yield f"{result} = {inner[atom]}"
            continue
        aval = eqn.outvars[0].aval
        yield f"{results[0]} = {_expression(eqn, operands, aval)}"


def _expression(eqn: Any, operands: Sequence[str], aval: Any) -> str:
    (first, *_), primitive = operands, eqn.primitive
    if (function := Replaceable.of(primitive)) is not None:
        return _REPLACED[function].format(*operands)
    if primitive is lax.broadcast_in_dim_p:
        if eqn.invars[0].aval.ndim == 1:
            return f"{first}[:, None]"
        return f"tl.broadcast_to({first}, {aval.shape})"
    if primitive is lax.convert_element_type_p:
        return f"{first}.to({_TYPES[str(aval.dtype)]})"
    if primitive is lax.bitcast_convert_type_p:
        return f"{first}.to({_TYPES[str(aval.dtype)]}, bitcast=True)"
    return _OPERATIONS[primitive].format(*operands)


def _source(problem: Problem) -> str:
    """A module with a kernel of the scalars, the arrays, and the new arrays."""
    traced = traced_tile(problem, _GROUPS)
    arrays = [problem.grad, *problem.arrays]
    olds = [f"p{i}" for i in range(len(arrays))]
    news = [f"q{i}" for i in range(1, len(arrays))]
    body = [
        f"groups = tl.program_id(0) * {_GROUPS} + tl.arange(0, {_GROUPS})",
        f"elements = groups[:, None] * {GROUP} + tl.arange(0, {GROUP})[None, :]",
    ]
    loads = [f"tl.load(floats + {i})" for i in range(problem.floats.size)]
    loads += [f"tl.load(integers + {i})" for i in range(problem.integers.size)]
    places = ["elements" if x.ndim == 2 else "groups" for x in arrays]
    loads += [f"tl.load({x} + {at})" for x, at in zip(olds, places, strict=True)]
    body += [f"x{i} = {load}" for i, load in enumerate(loads)]
    names = {x: f"x{i}" for i, x in enumerate(traced.jaxpr.invars)}
    body += _lines(traced.jaxpr, names, "y")
    for new, at, atom in zip(news, places[1:], traced.jaxpr.outvars, strict=True):
        body.append(f"tl.store({new} + {at}, {names[atom]})")
    pointers = ", ".join(["floats", "integers", *olds, *news])
    head = f"\n@triton.jit\ndef {NAME}({pointers}):\n"
    return _HEAD + head + "".join(f"    {line}\n" for line in body)


@functools.cache
def _function(source: str) -> Any:
    """The kernel of a module, which Triton reads from its file."""
    path = pathlib.Path(tempfile.mkdtemp()) / f"{NAME}_kernel.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, NAME)


def update(problem: Problem) -> list[Array]:
    # Where there is no GPU, for an H100.
    on_gpu = jax.default_backend() == "gpu"
    return jax_triton.triton_call(
        problem.floats,
        problem.integers,
        problem.grad,
        *problem.arrays,
        kernel=_function(_source(problem)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem.arrays],
        grid=problem.groups // _GROUPS,
        num_warps=1,
        name=NAME,
        compute_capability=None if on_gpu else 90,
        input_output_aliases={3 + i: i for i in range(len(problem.arrays))},
    )
