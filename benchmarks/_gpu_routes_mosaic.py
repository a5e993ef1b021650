"""AdamW by Mosaic GPU: `update_tile`, traced outside of the kernel and evaluated in it,
each operation as Pallas has it.

Pallas' default there, warpgroup semantics, finds no layouts for reductions over groups
of 32. With lane semantics, a `TiledLayout` may say which elements each thread has, and
a reduction is shuffles between the threads that share a group. Two things have to be
done for it: numbers of groups are arrays of one axis, `(groups,)`, never `(groups, 1)`;
and every broadcast of one to elements names its layout.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from _gpu_routes import GROUP, NAME, Problem, structs_of_tile
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from flashquinox._common.arithmetic import canonical_pattern, Replaceable
from flashquinox._tile.tile import update_tile


@dataclasses.dataclass(frozen=True)
class Layouts:
    """Which elements each of 128 threads has: `of_thread` consecutive ones of a group,
    as vectors of `vector`. Several rounds of as many groups as fill the threads make a
    tile of `groups`."""

    of_thread: int
    vector: int
    groups: int

    @property
    def _tiled(self) -> Any:
        lanes = GROUP // self.of_thread
        of_warp = 32 // lanes
        tiling = ((4 * of_warp, GROUP), (of_warp, GROUP), (1, self.of_thread))
        # Of (warps, 1, groups of a warp, lanes of a group, 1, elements).
        warps, lanes_of, vector = (-6,), (-4, -3), -1
        if self.vector < self.of_thread:
            # Then also (.., 1, vectors, 1, elements of a vector), of which 1s count.
            tiling = (*tiling, (1, self.vector))
            warps, lanes_of = (-8,), (-6, -5)
        layout = fragmented_array.TiledLayout(
            fragmented_array.Tiling(tiling),
            warps,
            lanes_of,
            vector,
            _check_canonical=False,
        )
        return layout.canonicalize()

    @property
    def of_elements(self) -> Any:
        return _as_pallas(self._tiled)

    @property
    def of_groups(self) -> Any:
        return _as_pallas(self._tiled.reduce((1,)))


def _as_pallas(layout: Any) -> Any:
    fields = layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
    return plgpu.Layout.TILED(*fields)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A traced function of a tile, in a kernel."""

    layouts: Layouts
    # Whether quotients and roots are one instruction.
    approximate: bool

    def __call__(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> Any:
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= dict(zip(jaxpr.invars, args, strict=True))
        read = lambda atom: atom.val if hasattr(atom, "val") else values[atom]
        for eqn in jaxpr.eqns:
            found = self._results(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, found, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _results(self, eqn: Any, operands: list[Any]) -> list[Any]:
        primitive, params = eqn.primitive, eqn.params
        shape = eqn.outvars[0].aval.shape
        function = Replaceable.of(primitive)
        if function is canonical_pattern:
            pattern = lax.bitcast_convert_type(operands[0], jnp.int32)
            # Arithmetic gives no other NaN than 0x7fffffff.
            pattern = jnp.minimum(pattern, jnp.int32(0x7FC0_0000))
            return [lax.bitcast_convert_type(pattern, jnp.uint32)]
        if function is not None:
            structs = [jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in operands]
            traced = jax.make_jaxpr(function.function)(*structs)
            return self(traced.jaxpr, traced.consts, operands)
        called = params.get("jaxpr", params.get("call_jaxpr"))
        if called is not None:
            return self(called.jaxpr, called.consts, operands)
        if primitive in (lax.reshape_p, lax.squeeze_p):
            return operands[:1]
        if primitive is lax.broadcast_in_dim_p:
            return [self._broadcast(operands[0], shape)]
        if len(shape) == 2 and shape[1] == GROUP:
            operands = [
                self._broadcast(x, shape) if jnp.ndim(x) == 1 else x for x in operands
            ]
        if self.approximate and primitive is lax.div_p and len(shape) > 0:
            x, y = operands
            inverse = 1 / y if jnp.ndim(y) == 0 else self._reciprocal(y)
            return [x * inverse]
        found = primitive.bind(*operands, **params)
        return found if primitive.multiple_results else [found]

    def _broadcast(self, x: Any, shape: tuple[int, ...]) -> Any:
        if jnp.ndim(x) == 1:
            if shape[1:] == (1,):
                return x
            elements = lax.broadcast_in_dim(x, shape, (0,))
            return plgpu.layout_cast(elements, self.layouts.of_elements)
        return jnp.broadcast_to(x, shape[:1] if shape[1:] == (1,) else shape)

    def _reciprocal(self, x: Any) -> Any:
        is_elements = jnp.ndim(x) == 2
        layout = self.layouts.of_elements if is_elements else self.layouts.of_groups

        @plgpu.inline_mgpu(
            arg_types=(layout,),
            return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout),
        )
        def apply(_: Any, y: Any) -> Any:
            return y._pointwise(y._lift_fast_instr("rcp.approx.ftz.f32"))

        return apply(x)


def update(layouts: Layouts, problem: Problem, approximate: bool = True) -> list[Array]:
    """Loads and stores straight from and to global memory, a tile for each block of 128
    threads."""
    evaluate = Evaluation(layouts, approximate)
    size = layouts.groups
    scalars = problem.scalars(problem.floats.__getitem__, problem.integers.__getitem__)
    structs, treedef = jtu.tree_flatten(jax.eval_shape(lambda: scalars))

    def tile(scalars: Any, grad: Any, *state: Any) -> Any:
        new = update_tile(
            problem.structure,
            treedef.unflatten(scalars),
            -1,
            grad,
            problem.state(state),
            keep_unmoved=False,
        )
        return jtu.tree_leaves(new)

    traced = jax.make_jaxpr(tile)(structs, *structs_of_tile(problem, size))

    def kernel(floats: Any, integers: Any, *refs: Any) -> None:
        start = lax.axis_index("tile") * size
        at = lambda ref: ref.at[(pl.ds(start, size), *[slice(None)] * (ref.ndim - 1))]
        layout = lambda ref: layouts.of_elements if ref.ndim == 2 else layouts.of_groups
        here = problem.scalars(lambda i: floats[i], lambda i: integers[i])
        loaded = [plgpu.load(at(x), layout=layout(x), optimized=False) for x in refs]
        new = evaluate(traced.jaxpr, traced.consts, [*jtu.tree_leaves(here), *loaded])
        for ref, value in zip(refs[1:], new, strict=True):
            at(ref)[...] = value

    kernel.__name__ = NAME
    states = [jax.new_ref(x) for x in problem.arrays]
    plgpu.kernel(
        kernel,
        grid=(problem.groups // size,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(
            approx_math=approximate,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(problem.floats, problem.integers, problem.grad, *states)
    return [jax.freeze(x) for x in states]


VARIANTS = {
    "16 elements a thread": partial(update, Layouts(16, 16, 64)),
    "16 elements a thread, by 8": partial(update, Layouts(16, 8, 64)),
    "8 elements a thread": partial(update, Layouts(8, 8, 32)),
    "8 elements a thread, twice": partial(update, Layouts(8, 8, 64)),
    "32 elements a thread": partial(update, Layouts(32, 16, 128)),
}
