"""AdamW by Pallas' Triton route: `update_tile`, traced in a Pallas kernel. One warp
takes 16 groups, as in version 0.2 of this library."""

from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from _gpu_routes import GROUP, NAME, Problem
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from flashquinox._backends.interpreter.arithmetic import Arithmetic
from flashquinox._tile.tile import update_tile


_GROUPS = 16


def _instruction(name: str, x: Array) -> Array:
    (result,) = plt.elementwise_inline_asm(
        f"{name} $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result


def _canonical_pattern(x: Array) -> Array:
    # Arithmetic gives no other NaN than 0x7fffffff.
    return jnp.minimum(lax.bitcast_convert_type(x, jnp.int32), jnp.int32(0x7FC0_0000))


_ARITHMETIC = Arithmetic(
    reciprocal=lambda x: _instruction("rcp.approx.ftz.f32", x),
    square_root=lambda x: _instruction("sqrt.approx.ftz.f32", x),
    canonical_pattern=_canonical_pattern,
)


def update(problem: Problem) -> list[Array]:
    width = 1 + len(problem.arrays)

    def kernel(floats: Any, integers: Any, *refs: Any) -> None:
        groups = pl.program_id(0) * _GROUPS + jnp.arange(_GROUPS)
        elements = groups[:, None] * GROUP + jnp.arange(GROUP)[None, :]
        at = lambda ref, like: ref.at[elements if like.ndim == 2 else groups]
        arrays = [problem.grad, *problem.arrays]
        loaded = [
            plt.load(at(ref, x)) for ref, x in zip(refs[:width], arrays, strict=True)
        ]
        operands = {
            "scalars": problem.scalars(lambda i: floats[i], lambda i: integers[i]),
            "grad": loaded[0],
            "old": problem.state(loaded[1:]),
        }
        static = {"structure": problem.structure, "axis": -1, "keep_unmoved": False}
        program = _ARITHMETIC.trace(update_tile, **operands, static=static)
        new = jtu.tree_leaves(program(**operands))
        for ref, value, x in zip(refs[width:], new, arrays[1:], strict=True):
            plt.store(at(ref, x), value)

    flat = [x.ravel() for x in (problem.grad, *problem.arrays)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[1:]],
        grid=(problem.groups // _GROUPS,),
        in_specs=[anywhere] * (2 + len(flat)),
        out_specs=[anywhere] * (len(flat) - 1),
        input_output_aliases={3 + i: i for i in range(len(flat) - 1)},
        compiler_params=plt.CompilerParams(num_warps=1),
        name=NAME,
    )(problem.floats, problem.integers, *flat)
