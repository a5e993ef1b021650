"""AdamW by Mosaic GPU: `update_tile`, traced outside of the kernel and evaluated in it,
each operation as Pallas has it.

Of itself, Pallas finds no layout there for a reduction over groups of 32. A
`TiledLayout` that is named says which elements each thread has, and a reduction is
shuffles between the threads that share a group. What else has to be done for it:
numbers of groups are arrays of one axis, `(groups,)`, never `(groups, 1)`; every
broadcast of one to elements names its layout; bitcasts between integers are
conversions; and, for warpgroup semantics, Pallas'
default, choices are of whole arrays, and the logic of booleans is that of integers.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from _gpu_routes import GROUP, NAME, Problem, traced_tile
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from flashquinox._common.arithmetic import canonical_pattern, Replaceable


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


# Of booleans, as integers.
_LOGIC = {
    lax.and_p: lambda x, y: x & y,
    lax.or_p: lambda x, y: x | y,
    lax.not_p: lambda x: 1 - x,
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A traced function of a tile, in a kernel."""

    layouts: Layouts

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
        shape, dtype = eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype
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
        if primitive is lax.bitcast_convert_type_p and all(
            [jnp.issubdtype(x, jnp.integer) for x in (dtype, eqn.invars[0].aval.dtype)]
        ):
            # With lane semantics, a bitcast from uint8 to int8 leaves it unsigned.
            return [operands[0].astype(dtype)]
        if primitive is lax.broadcast_in_dim_p:
            return [self._broadcast(operands[0], shape)]
        if len(shape) == 2 and shape[1] == GROUP:
            operands = [
                self._broadcast(x, shape) if jnp.ndim(x) == 1 else x for x in operands
            ]
        if primitive is lax.select_n_p and len(shape) > 0:
            operands = [self._broadcast(x, shape) for x in operands]
        if primitive in _LOGIC and dtype == jnp.bool_ and len(shape) > 0:
            integers = [x.astype(jnp.int32) for x in operands]
            return [_LOGIC[primitive](*integers) != 0]
        if primitive is lax.div_p and len(shape) > 0:
            x, y = operands
            inverse = 1 / y if jnp.ndim(y) == 0 else self._reciprocal(y)
            return [x * inverse]
        found = primitive.bind(*operands, **params)
        return found if primitive.multiple_results else [found]

    def _broadcast(self, x: Any, shape: tuple[int, ...]) -> Any:
        if jnp.ndim(x) == 2 or (jnp.ndim(x) == 1 and shape[1:] != (GROUP,)):
            return x
        if jnp.ndim(x) == 1:
            elements = lax.broadcast_in_dim(x, shape, (0,))
            return plgpu.layout_cast(elements, self.layouts.of_elements)
        return jnp.broadcast_to(x, shape[:1] if shape[1:] == (1,) else shape)

    def _reciprocal(self, x: Any) -> Any:
        is_elements = jnp.ndim(x) == 2
        layout = self.layouts.of_elements if is_elements else self.layouts.of_groups

        inline: Any = plgpu.inline_mgpu(
            arg_types=(layout,),
            return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout),
        )
        instruction = "rcp.approx.ftz.f32"
        return inline(lambda _, y: y._pointwise(y._lift_fast_instr(instruction)))(x)


def update(
    layouts: Layouts,
    problem: Problem,
    stages: int = 0,
    tiles_of_block: int = 1,
    semantics: Any = plgpu.LoweringSemantics.Lane,
) -> list[Array]:
    """Tiles of `layouts.groups` groups, so many for each block of 128 threads. Loads
    and stores go straight from and to global memory, or, with stages, by TMA through
    shared memory, which has room for so many tiles."""
    size = layouts.groups
    evaluate = Evaluation(layouts)
    traced = traced_tile(problem, size)
    layout = lambda ref: layouts.of_elements if ref.ndim == 2 else layouts.of_groups

    def step(scalars: Sequence[Any], olds: Sequence[Any], news: Sequence[Any]) -> None:
        loaded = [plgpu.load(x, layout=layout(x), optimized=False) for x in olds]
        new = evaluate(traced.jaxpr, traced.consts, [*scalars, *loaded])
        for ref, value in zip(news, new, strict=True):
            _store(ref, value)

    def kernel(floats: Any, integers: Any, *refs: Any) -> None:
        scalars = [words[i] for words in (floats, integers) for i in range(words.size)]
        first = lax.axis_index("block") * tiles_of_block
        if stages == 0:
            start = pl.ds(first * size, size)
            here = [x.at[start, :] if x.ndim == 2 else x.at[start] for x in refs]
            step(scalars, here, here[1:])
            return

        def spec(ref: Any) -> Any:
            block = (size, *ref.shape[1:])
            others = (0,) * (len(block) - 1)
            return plgpu.BlockSpec(block, lambda i: (first + i, *others))

        specs = [spec(x) for x in refs]
        plgpu.emit_pipeline(
            lambda _, *tiles: step(scalars, tiles[: len(refs)], tiles[len(refs) :]),
            grid=(tiles_of_block,),
            in_specs=specs,
            out_specs=specs[1:],
            max_concurrent_steps=stages,
        )(*refs, *refs[1:])

    kernel.__name__ = NAME
    states = [jax.new_ref(x) for x in problem.arrays]
    plgpu.kernel(
        kernel,
        grid=(problem.groups // (size * tiles_of_block),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # What a thread stores, no other one loads.
            unsafe_no_auto_barriers=stages == 0,
            lowering_semantics=semantics,
        ),
    )(problem.floats, problem.integers, problem.grad, *states)
    return [jax.freeze(x) for x in states]


def _store(ref: Any, value: Any) -> None:
    # JAX 0.12 refuses stores of less than a sector of memory, if not told otherwise.
    if (store := getattr(plgpu, "store", None)) is not None:
        store(ref, value, optimized=False)
    else:
        ref[...] = value


_WARPGROUP = plgpu.LoweringSemantics.Warpgroup
VARIANTS = {
    "16": partial(update, Layouts(16, 16, 64)),
    "16-by-8": partial(update, Layouts(16, 8, 64)),
    "8": partial(update, Layouts(8, 8, 32)),
    "8-twice": partial(update, Layouts(8, 8, 64)),
    "32": partial(update, Layouts(32, 16, 128)),
    "warpgroup": partial(update, Layouts(16, 16, 64), semantics=_WARPGROUP),
    "warpgroup-8": partial(update, Layouts(8, 8, 32), semantics=_WARPGROUP),
    "tma": partial(update, Layouts(16, 16, 64), stages=2, tiles_of_block=16),
    "tma-8": partial(update, Layouts(8, 8, 64), stages=2, tiles_of_block=16),
}
