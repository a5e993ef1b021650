"""The TPU kernels: interpreted and simulated, against plain XLA; and compiled, by the
real compiler, for every generation. No TPU is needed."""

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

import flashquinox as fq
from flashquinox._backends import dispatch, learning
from flashquinox._backends.interpreter.arithmetic import Arithmetic
from flashquinox._backends.tpu import kernel as tpu_kernel, view as tpu_view
from flashquinox._backends.tpu.chip import Chip
from flashquinox._backends.tpu.planes import PlanesBlock
from flashquinox._backends.tpu.reordering import reordered
from flashquinox._backends.tpu.rows import RowsBlock
from flashquinox._storage.layout import Layout
from flashquinox._storage.tpu_memory import groups_in_memory
from flashquinox._tile.step import TileState

from ..helpers import Case, CASES, OURS, pairwise, parametrize_cases, slow, Storage
from ..kernels import arrays, compiling_for, run, run_ensemble, tpu_devices


_ours = OURS
_needs_views = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="stores to views of other dtypes fail there"
)

# Lanes that fill a register and some that do not, and leading axes.
_STACK = {"stack": (2, 64, 200)}
# One group in each lane: the smallest program.
_GROUP = {"leaf": (32, 128)}
# Few lanes, rows that are no whole chunks, many lanes below several leading axes, and
# groups along columns.
_ODD_SHAPES = {
    "narrow": (32, 5),
    "high": (1056, 130),
    "wide": (2, 1, 32, 700),
    "transposed": (64, 96),
}
# How groups lie in memory, with and without a partial one in each run.
_KINDS = {
    # Several matrices in a chunk, of which the last one is not full.
    "rows": {"permuted": (130, 3, 64), "partial": (3, 50, 160)},
    "matrices": {"whole": (3, 24, 256), "partial": (1, 130, 80, 3)},
    "planes": {"whole": (384, 1, 7, 7), "partial": (2, 40, 4, 128)},
    # Weights and gradients in another order than bytes.
    "pairs": {"whole": (64, 2, 128), "partial": (33, 128, 2, 2)},
}
# Weights and gradients, scales or all of them in orders of their own, by the sort of
# groups.
_REORDERED = {
    "rows": (2, 33, 1, 40),
    "columns": (2, 40, 33, 1),
    "columns of scales": (16, 40, 33),
    "columns of all": (65, 2, 130),
    "planes": (3, 2, 9, 2, 5),
    "a block of scales for two": (4, 1, 2, 33, 40),
}
# With moments in float32, and in groups with a partial one at the end; and with axes of
# length 1.
_VECTORS = {
    "a": (100,),
    "b": (768,),
    "c": (4096,),
    "d": (10000,),
    "e": (4100,),
    "f": (96, 1, 1),
    "g": (1, 1, 768),
}


_QUICK_REORDERED = {"columns of scales", "a block of scales for two"}
_RULES = ("adam", "lion", "sgd")


def _supported(case: Case) -> bool:
    return case.storage.dtype != jnp.float16 and case.storage.moments != "flashoptim"


# Pairs of a rule, a dtype and a codec, and of a width and a codec.
_QUICK = pairwise(
    [case for case in CASES if _supported(case) and case.rule in _RULES],
    ("rule", "dtype"),
    ("rule", "moments"),
    ("width", "moments"),
    known=[Case("adan", _ours)],
)


@pytest.mark.product
@parametrize_cases(_supported, quick=_QUICK.__contains__)
def test_interpreted_kernel_is_plain_xla(case):
    dtype = case.storage.dtype
    shapes = _GROUP if case in _QUICK else _STACK
    grads = [arrays(shapes, dtype, seed) for seed in (1, 2, 3)]
    make = ft.partial(case.optimizer, 1e-2)
    run("tpu", make, arrays(shapes, dtype, 0), grads)


@pytest.mark.product
@pytest.mark.parametrize(
    "name, blocks",
    [
        ("adamw-flashquinox", 1),
        ("adam-float32", 1),
        ("lion-flashquinox", 1),
        ("sgdw-float32", 1),
        ("sgd-momentum-flashquinox", 2),
        *(slow(f"{name}-flashquinox", 2) for name in ("adamw", "adam", "lion", "sgdw")),
    ],
)
def test_simulated_kernel_is_plain_xla(name, blocks, capfd, monkeypatch):
    """With memory as it is on a TPU: NaN before it is written, and copied while another
    block is computed; and no two accesses race."""

    class Direct:
        """The simulator has effects, which no own primitive can have."""

        serve = staticmethod(lambda platform: None)

        def __call__(self, batch, *operands):
            return dispatch._update_on(batch, "default", False)(*operands)

    monkeypatch.setattr(dispatch, "by_platform", Direct())
    # The two have two chunks each.
    shapes = _GROUP if blocks == 1 else {"stack": (2, 64, 256)}
    seen = set()

    def record(token, block, core):
        seen.add(tuple(map(int, block)))
        return token

    simulator = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        grid_point_recorder=record,
    )
    with pltpu.force_tpu_interpret_mode(simulator):
        rule, _, moments = name.rpartition("-")
        case = Case(rule, _ours._replace(moments=moments))
        make = ft.partial(case.optimizer, 1e-2)
        grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2)]
        # From moments that are not zero.
        run("tpu", make, arrays(shapes, jnp.bfloat16, 0), grads, first=1)
    assert len(seen) == blocks
    # Where JAX does not raise, it prints.
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_groups_run_along_rows():
    params = arrays(_GROUP | _STACK, jnp.bfloat16, 0)
    state = jax.eval_shape(fq.adamw(1e-3, backend="tpu").init, params)
    moments = jtu.tree_leaves(
        state.moments, is_leaf=lambda x: isinstance(x, fq.QuantMoment)
    )
    assert len(moments) == 4 and all(moment.axes == (-2,) for moment in moments)


@pytest.mark.product
@pytest.mark.parametrize(
    "name, shape",
    [
        *(("lion", shape) for shape in _ODD_SHAPES if shape != "high"),
        slow("lion", "high"),
        *(slow("adamw", x) for x in _ODD_SHAPES),
    ],
)
def test_odd_shapes(name, shape):
    _assert_odd_shape(name, _ODD_SHAPES[shape])


@pytest.mark.product
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("name", ["lion", slow("adamw")])
def test_groups_in_memory(name, kind):
    """Wherever they lie, they are plain XLA's."""
    shapes = _KINDS[kind]
    params = arrays(shapes, jnp.bfloat16, 0)
    make = ft.partial(Case(name, _ours).optimizer, 1e-2)
    state = jax.eval_shape(make(backend="tpu").init, params)
    layouts = {name: state.moments["mu"][name].layout for name in shapes}
    found = [groups_in_memory(x.shape, *x.axes, x.group_size) for x in layouts.values()]
    assert ["pairs" if x.pairs else x.kind for x in found] == [kind, kind]
    grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2)]
    run("tpu", make, params, grads)


@pytest.mark.once
@pytest.mark.parametrize(
    "shape, name, dtype",
    [
        *(slow(shape, "adamw", jnp.bfloat16) for shape in _REORDERED),
        *(
            slow(
                shape,
                "lion",
                dtype,
                unless=dtype == jnp.bfloat16 and shape in _QUICK_REORDERED,
            )
            for shape in _REORDERED
            for dtype in (jnp.bfloat16, jnp.float32)
        ),
    ],
)
def test_arrays_in_several_orders(shape, name, dtype, monkeypatch):
    monkeypatch.setattr(tpu_view, "LARGE", 2**9)
    chosen, leaf = [], {"leaf": _REORDERED[shape]}
    record = lambda *args: chosen.append(reordered(*args)) or chosen[-1]
    monkeypatch.setattr(tpu_kernel, "reordered", record)
    width = 24 if dtype == jnp.bfloat16 else None
    case = Case(name, _ours._replace(dtype=dtype, master_weight_bits=width))
    grads = [arrays(leaf, dtype, seed) for seed in (1, 2)]
    run("tpu", ft.partial(case.optimizer, 1e-2), arrays(leaf, dtype, 0), grads)
    block = chosen[0].block
    assert isinstance(block.inside, PlanesBlock if len(block.shape) == 5 else RowsBlock)
    assert block.sharing == (2 if shape == "a block of scales for two" else 1)


@pytest.mark.once
@pytest.mark.parametrize("name", ["lion", slow("adamw")])
def test_vectors(name):
    grads = [arrays(_VECTORS, jnp.bfloat16, seed) for seed in (1, 2)]
    make = ft.partial(Case(name, _ours).optimizer, 1e-2)
    run("tpu", make, arrays(_VECTORS, jnp.bfloat16, 0), grads)


@pytest.mark.product
@pytest.mark.parametrize("shape", [(12, 64), (144, 1, 3, 3), (70, 160)])
@pytest.mark.parametrize("name", ["lion", slow("adamw")])
def test_small_leaves_of_one_shape(name, shape):
    """They share a kernel, and no leaf has the other's thresholds."""
    shapes = {"a": shape, "b": shape}
    grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2)]
    make = ft.partial(Case(name, _ours).optimizer, 1e-2)
    run("tpu", make, arrays(shapes, jnp.bfloat16, 0), grads)


@pytest.mark.once
@pytest.mark.parametrize(
    "shape",
    [(40_050,), slow((1, 40_050)), slow((40_050, 1)), slow((1, 40_050, 1))],
)
def test_a_long_vector(shape):
    """One that is a row or a column lies in memory in another way."""
    _assert_odd_shape("lion", shape)


@pytest.mark.once
def test_several_chunks_in_a_block(monkeypatch):
    """Along both axes, of few groups each: three times two, of which the last are not
    full. Of many matrices, for it to be worth it."""
    monkeypatch.setattr(tpu_kernel, "groups_of_chunk", lambda structure: 2)
    _assert_odd_shape("lion", (8, 160, 130))


def _assert_odd_shape(name: str, shape: tuple[int, ...]) -> None:
    grads = [arrays({"leaf": shape}, jnp.bfloat16, seed) for seed in (1, 2)]
    make = ft.partial(Case(name, _ours).optimizer, 1e-2)
    run("tpu", make, arrays({"leaf": shape}, jnp.bfloat16, 0), grads)


@pytest.mark.product
@_needs_views
@parametrize_cases(
    lambda case: _supported(case) and case.name in ("adamw", "lion", "sgd"),
    # Corrections of each width.
    quick=lambda case: (
        case
        in (Case("adamw", _ours), Case("sgd", _ours._replace(master_weight_bits=32)))
    ),
)
def test_only_words(case):
    """Of TPUs that have no instructions for bytes, such as v4."""
    _assert_only_words(case, {"narrow": _ODD_SHAPES["narrow"]})


@pytest.mark.slow
@_needs_views
@pytest.mark.parametrize("shape", _ODD_SHAPES)
def test_only_words_of_odd_shapes(shape):
    _assert_only_words(Case("lion", _ours), {"leaf": _ODD_SHAPES[shape]})


@pytest.mark.once
@_needs_views
@pytest.mark.parametrize(
    "name, storage, shape",
    [
        ("lion", _ours, (32, 2, 128)),
        slow("adamw", _ours, (32, 2, 128)),
        slow("adamw", _ours, (2, 2, 32, 40)),
        slow("adamw", _ours, (32, 3, 65)),
        slow("adamw", _ours, (40, 32, 33)),
        slow("lion", _ours._replace(master_weight_bits=32), (32, 2, 128)),
        slow("lion", Storage(jnp.float32, None, "flashquinox"), (32, 1, 100)),
        slow("adamw", Storage(jnp.bfloat16, 24, "float32"), (32, 2, 128)),
    ],
)
def test_only_words_in_several_orders(name, storage, shape, monkeypatch):
    monkeypatch.setattr(tpu_view, "LARGE", 2**9)
    chosen = []
    record = lambda *args: chosen.append(reordered(*args)) or chosen[-1]
    monkeypatch.setattr(tpu_kernel, "reordered", record)
    _assert_only_words(Case(name, storage), {"leaf": shape})
    assert chosen and None not in chosen


def _assert_only_words(case: Case, shapes) -> None:
    grads = [arrays(shapes, case.storage.dtype, seed) for seed in (1, 2)]
    make = ft.partial(case.optimizer, 1e-2)
    with compiling_for("TPU v4", "tpu"):
        assert Chip.current().arithmetic.only_words
        run("tpu", make, arrays(shapes, case.storage.dtype, 0), grads)


@pytest.mark.product
@pytest.mark.parametrize("name, group_size", [("adamw", 64), ("lion", 128)])
def test_other_groups(name, group_size):
    shapes = {"leaf": (128, 64)}
    grads = [arrays(shapes, jnp.float32, seed) for seed in (1, 2)]
    make = ft.partial(Case(name, _ours).optimizer, 1e-2, {"group_size": group_size})
    run("tpu", make, arrays(shapes, jnp.bfloat16, 0), grads)


@pytest.mark.product
@pytest.mark.parametrize(
    "name, bits",
    [
        ("adamw", 24),
        ("sgd", 32),
        ("sgd", None),
        slow("adamw", 32),
        slow("adamw", None),
        *(slow("lion", bits) for bits in (24, 32, None)),
    ],
)
def test_updates(name, bits):
    grads = [arrays(_GROUP, jnp.bfloat16, seed) for seed in (1, 2)]
    storage = Storage(jnp.bfloat16, bits, "flashquinox")
    make = ft.partial(Case(name, storage).optimizer, 1e-2)
    run("tpu", make, arrays(_GROUP, jnp.bfloat16, 0), grads, method="update")


def test_a_rule_of_the_user():
    class Normalized(fq.AbstractRule):
        """Of everything that kernels replace: a quotient, a root, a sign."""

        @property
        def moments(self):
            return {
                "second": fq.Moment("nonnegative"),
                "first": fq.Moment("signed"),
            }

        def scalars(self, count, learning_rate):
            return {"step": -learning_rate, "half": 0.5}

        def update(self, grad, weight, moments, scalars):
            half = scalars["half"]
            first = half * moments["first"] + half * grad
            second = half * moments["second"] + half * grad * grad
            size = jnp.sqrt(second) + 1e-3 * jnp.abs(weight) + 1e-30
            update = scalars["step"] * (first / size + 0.1 * jnp.sign(grad))
            return update, {"second": second, "first": first}

    grads = [arrays(_GROUP, jnp.float32, seed) for seed in (1, 2)]
    storage = fq.Storage(moments="float32")
    make = ft.partial(fq.optimizer, Normalized(), 1e-2, storage=storage)
    run("tpu", make, arrays(_GROUP, jnp.bfloat16, 0), grads)


@pytest.mark.product
@pytest.mark.parametrize("name, method", [("adamw", "step"), ("sgd", "update")])
def test_nonfinite_steps_are_skipped(name, method):
    """Also if what is not finite is in another leaf."""
    shapes = _GROUP | {"vector": (40,)}
    good, bad, again = (arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2, 3))
    bad["vector"] = bad["vector"].at[3].set(jnp.nan)
    make = ft.partial(Case(name, _ours).optimizer, 1e-2, skip_nonfinite=True)
    params = arrays(shapes, jnp.bfloat16, 0)
    run("tpu", make, params, [good, bad, again], method=method)


def test_damage_shows():
    params, grads = (arrays(_GROUP, jnp.bfloat16, seed) for seed in (0, 1))
    grads["leaf"] = grads["leaf"].at[20, 4].set(jnp.nan)
    optim = fq.adamw(1e-2, backend="tpu")
    step = jax.jit(optim.step)
    new, state = step(params, optim.init(params), grads)
    found = np.isnan(np.asarray(new["leaf"], np.float32))
    assert found[20, 4] and found.sum() == 1
    # And stays.
    new, _ = step(new, state, arrays(_GROUP, jnp.bfloat16, 2))
    assert np.isnan(np.asarray(new["leaf"], np.float32))[20, 4]


@pytest.mark.once
def test_ensembles():
    run_ensemble("tpu", {"leaf": (2, 32, 128)})


_NOT_FOR_KERNELS = {
    "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    "half": jax.ShapeDtypeStruct((64, 64), jnp.float16),
    "empty": jax.ShapeDtypeStruct((0, 32), jnp.bfloat16),
}


def test_what_the_kernel_cannot_take_goes_through_xla():
    """Nothing raises with `backend="tpu"` that works without it: it is the same
    program."""
    kernel, plain = (
        fq.adamw(1e-2, weight_decay=0.1, backend=backend) for backend in ("tpu", "xla")
    )
    state = jax.eval_shape(kernel.init, _NOT_FOR_KERNELS)
    ours, reference = (
        jax.jit(optim.step).lower(_NOT_FOR_KERNELS, state, _NOT_FOR_KERNELS).as_text()
        for optim in (kernel, plain)
    )
    assert ours == reference


def test_support():
    def supports(shape, axis=-2, group_size=32, dtype=jnp.bfloat16):
        leaf: Any = jnp.asarray(np.zeros(shape, dtype))
        old = TileState(leaf, None, {}, {"moment": leaf})
        return (
            tpu_view.view_of(Layout(shape, (axis,), group_size), old, leaf) is not None
        )

    assert supports((32, 1)) and supports((5, 64, 100))
    assert supports((5, 256, 96), axis=-1) and supports((256, 90), axis=-1)
    assert supports((33, 128)) and not supports((32, 128), axis=-1)
    assert supports((64, 8, 128), axis=-3)
    assert not supports((32, 128), group_size=16)
    assert not supports((32, 128), dtype=jnp.float16)


#
# Arithmetic
#


def test_arithmetic_evaluates_any_function():
    @jax.jit
    def inner(x, y):
        return jnp.where(x > 0, x / y, jnp.sqrt(y)), {"sum": jnp.sum(x)}

    def function(x, y):
        z, rest = inner(x, y)
        codes = jnp.round(256 * x).astype(jnp.int8)
        low = (jax.lax.bitcast_convert_type(x, jnp.uint32) >> 8) & np.uint32(255)
        return z, rest, codes, (low.astype(jnp.int32) - 128).astype(jnp.int8)

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-0.49, 0.49, (8, 128)), jnp.float32)
    y = jnp.asarray(rng.uniform(0.5, 2, (8, 128)), jnp.float32)
    found = jax.jit(ft.partial(Arithmetic().evaluate, function))(x, y)
    expected = jax.jit(function)(x, y)
    assert jtu.tree_structure(found) == jtu.tree_structure(expected)
    for ours, reference in zip(
        jtu.tree_leaves(found), jtu.tree_leaves(expected), strict=True
    ):
        assert ours.dtype == reference.dtype
        assert np.array_equal(ours, reference)


#
# Compiled
#


_TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


@ft.cache
def _device(chip: str):
    return tpu_devices(_TOPOLOGIES[chip])[0]


def _compile(chip: str, optim: fq.Optimizer, params, grads, method: str = "step"):
    """The compiled step, for shapes, with everything donated but the gradients."""
    state = jax.eval_shape(optim.init, params)
    if method == "step":
        return _compile_function(chip, optim.step, params, state, grads)
    return _compile_function(chip, optim.update, grads, state, params)


def _compile_function(chip: str, function, *shapes):
    """With the first two arguments donated."""
    device = _device(chip)
    sharding = SingleDeviceSharding(device)
    shapes = jtu.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    with compiling_for(device.device_kind, "tpu", device.num_cores):
        return jax.jit(function, donate_argnums=(0, 1)).lower(*shapes).compile()


def _text(compiled) -> str:
    return compiled.as_text() or ""


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(tree))


_VARIANTS = {
    "adamw": fq.adamw(1e-3, backend="tpu"),
    "adamw-nesterov-32": fq.adamw(
        1e-3, nesterov=True, storage=fq.Storage(master_weight_bits=32), backend="tpu"
    ),
    "adam-float32-moments": fq.adam(
        1e-3, weight_decay=0.1, storage=fq.Storage(moments="float32"), backend="tpu"
    ),
    "lion": fq.lion(1e-3, backend="tpu"),
    "sgd": fq.sgd(1e-3, backend="tpu"),
    "sgdw": fq.sgdw(1e-3, momentum=0.9, skip_nonfinite=True, backend="tpu"),
    "adamw-dithered-weights": fq.adamw(
        1e-3,
        storage=fq.Storage(master_weight_bits=None, dither_weights=True),
        backend="tpu",
    ),
    "adamw-learned": fq.adamw(
        1e-3, storage=fq.Storage(moments="learned"), backend="tpu"
    ),
    "sgdw-learned": fq.sgdw(
        1e-3, momentum=0.9, storage=fq.Storage(moments="learned"), backend="tpu"
    ),
    "adamw-log": fq.adamw(1e-3, storage=fq.Storage(moments="log"), backend="tpu"),
    "adamw-groups-of-64": fq.adamw(
        1e-3, storage=fq.Storage(group_size=64), backend="tpu"
    ),
    "adamw-log-dithered-weights-groups-of-64": fq.adamw(
        1e-3,
        storage=fq.Storage(
            master_weight_bits=None, dither_weights=True, moments="log", group_size=64
        ),
        backend="tpu",
    ),
}


# A few groups, and chunks that are full: as of the matrices of Llama, below.
_SMALL, _FULL = (64, 128, 384), (2, 1024, 384)
# Every generation and every option.
_COMPILED = [
    ("v4", "adamw", _SMALL),
    ("v5e", "sgdw-learned", _SMALL),
    ("v5e", "adam-float32-moments", _SMALL),
    ("v5e", "sgd", _SMALL),
    ("v5p", "sgdw", _SMALL),
    ("v6e", "adamw-log-dithered-weights-groups-of-64", _SMALL),
    ("v6e", "lion", _SMALL),
    ("tpu7x", "adamw-nesterov-32", _SMALL),
]
_MORE_COMPILED = [
    ("tpu7x", "adamw", _SMALL),
    *(
        ("v5e", variant, _SMALL)
        for variant in _VARIANTS
        if ("v5e", variant, _SMALL) not in _COMPILED
    ),
]
_MORE_COMPILED += [
    (chip, variant, _FULL)
    for variant in _VARIANTS
    for chip in (_TOPOLOGIES if variant in ("adamw", "lion", "sgdw") else ("v5e",))
]


@pytest.mark.product
@pytest.mark.parametrize(
    "chip, variant, shape",
    [*_COMPILED, *(slow(*x) for x in _MORE_COMPILED)],
)
def test_compiles_without_temporaries(chip, variant, shape):
    optim = _VARIANTS[variant]
    params = {"stack": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    compiled = _compile(chip, optim, params, params)
    assert "tpu_custom_call" in _text(compiled)
    memory = compiled.memory_analysis()
    state = jax.eval_shape(optim.init, params)
    # Everything that goes in comes out in the same place, and nothing else is there but
    # the scalars; and what is learned from, whatever the size of a leaf: some arrays of
    # float32, of a sample of each moment.
    assert memory.alias_size_in_bytes >= _bytes((params, state.moments))
    sample = 8 * 4 * 2 * learning._SAMPLE if "learned" in variant else 0
    assert memory.temp_size_in_bytes <= 2**20 + sample


def test_updates_compile_without_temporaries():
    """They take the place of gradients; the weights, which were not donated, are not
    copied. Vectors share a kernel."""
    optim = _VARIANTS["adamw"]
    shapes = {"stack": (128, 128, 384), "v": (16384,), "w": (32768,)}
    params = {k: jax.ShapeDtypeStruct(x, jnp.bfloat16) for k, x in shapes.items()}
    compiled = _compile("v5e", optim, params, params, method="update")
    state = jax.eval_shape(optim.init, params)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= _bytes((params, state.moments))
    assert memory.temp_size_in_bytes <= 2**14


def test_clipping_compiles_without_temporaries():
    """Gradients are not scaled in memory."""
    params = {"stack": jax.ShapeDtypeStruct((128, 128, 384), jnp.bfloat16)}
    optim = _VARIANTS["sgd"]
    state = jax.eval_shape(optim.init, params)
    clipping = lambda params, state, grads, bound: optim.step(
        params, state, grads, max_norm=bound
    )
    bound = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = _compile_function("v5e", clipping, params, state, params, bound)
    assert "tpu_custom_call" in _text(compiled)
    # Of gradients of 12 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**20


@pytest.mark.parametrize(
    "shape, variant",
    [
        ((2, 4096, 64), "adamw"),
        ((8, 1024, 160), "sgdw"),
        slow((2, 4096, 64), "sgdw"),
        slow((2, 1024, 832), "adamw"),
        slow((2, 1024, 832), "sgdw"),
        slow((640, 576), "adamw"),
        slow((640, 576), "sgdw"),
    ],
)
def test_compiles_what_lies_transposed(shape, variant):
    """Columns that are no multiple of 128 are the rows in memory. Scales are copied,
    but no array with an entry for each element."""
    optim = _VARIANTS[variant]
    params = {"stack": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    compiled = _compile("v5e", optim, params, params)
    assert "tpu_custom_call" in _text(compiled)
    assert compiled.memory_analysis().temp_size_in_bytes < math.prod(shape)


@pytest.mark.product
@pytest.mark.parametrize(
    "chip, method",
    [
        slow(chip, method, unless=(chip, method) in (("v4", "update"), ("v5e", "step")))
        for chip in _TOPOLOGIES
        for method in ("step", "update")
    ],
)
def test_compiles_other_dtypes_and_updates(chip, method):
    """Gradients of float32, of weights of float32 or for updates of bfloat16."""
    grads = jax.ShapeDtypeStruct((32, 200), jnp.float32)
    params = grads
    storage = fq.Storage(master_weight_bits=None)
    if method == "update":
        params = jax.ShapeDtypeStruct(grads.shape, jnp.bfloat16)
        storage = fq.Storage()
    optim = fq.adamw(1e-3, storage=storage, backend="tpu")
    assert "tpu_custom_call" in _text(_compile(chip, optim, params, grads, method))


def test_compiles_what_the_kernel_cannot_take():
    optim = fq.lion(1e-3, backend="tpu")
    compiled = _compile("v5e", optim, _NOT_FOR_KERNELS, _NOT_FOR_KERNELS)
    assert "tpu_custom_call" not in _text(compiled)


def _llama(layers: int, width: int, hidden: int, keys: int, vocabulary: int):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    return {
        "embedding": shape(vocabulary, width),
        "head": shape(vocabulary, width),
        "norm": shape(width),
        "layers": {
            "query": shape(layers, width, width),
            "key": shape(layers, keys, width),
            "value": shape(layers, keys, width),
            "out": shape(layers, width, width),
            "gate": shape(layers, hidden, width),
            "up": shape(layers, hidden, width),
            "down": shape(layers, width, hidden),
            "attention_norm": shape(layers, width),
            "mlp_norm": shape(layers, width),
        },
    }


def test_the_largest_matrices_of_llama_3_1_8b_compile():
    whole = _llama(32, 4096, 14336, 1024, 128256)
    _assert_compiles_without_temporaries({"down": whole["layers"]["down"]})


@pytest.mark.slow
def test_llama_3_1_8b_compiles():
    params = _llama(32, 4096, 14336, 1024, 128256)
    assert sum(math.prod(x.shape) for x in jtu.tree_leaves(params)) == 8_030_261_248
    _assert_compiles_without_temporaries(params)


def _assert_compiles_without_temporaries(params) -> None:
    count = sum(math.prod(x.shape) for x in jtu.tree_leaves(params))
    compiled = _compile("v5p", fq.adamw(1e-3, backend="tpu"), params, params)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 10e6
    # 5.125 bytes of weights and state, and a gradient of 2.
    assert memory.argument_size_in_bytes < 7.13 * count
    assert memory.alias_size_in_bytes > 5.125 * count


#
# Gradients that are gone before the next ones come
#


@pytest.mark.once
def test_unrolled_layers_release_their_gradients():
    """XLA updates each as soon as its gradient is there."""
    width, layers = 2048, 3
    weights = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
    params = {str(i): weights for i in range(layers)}
    optim = _VARIANTS["sgd"]

    def loss(params, x):
        for i in range(layers):
            x = jax.nn.relu(x @ params[str(i)])
        return jnp.mean(x.astype(jnp.float32))

    def step(params, state, x):
        return optim.step(params, state, jax.grad(loss)(params, x))

    x = jax.ShapeDtypeStruct((8, width), jnp.bfloat16)
    state = jax.eval_shape(optim.init, params)
    memory = _compile_function("v5e", step, params, state, x).memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 2 * width**2


@pytest.mark.parametrize(
    "name, how",
    [
        ("sgd-momentum", "release"),
        slow("sgd-momentum", "ordinary"),
        slow("lion", "release"),
        slow("adamw", "release"),
    ],
)
def test_stacked_layers_release_their_gradients(name, how):
    """Where they are asked to, and only there."""
    # Few groups, of which kernels are compiled soon; and more than VMEM has room for.
    layers, width, hidden = 32, 96, 2**14
    layer = 2 * width * hidden
    shape = (layers, width, hidden)
    params = {"blocks": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    optim = Case(name, _ours).optimizer(1e-3, backend="tpu")
    state = jax.eval_shape(optim.init, params)
    loss = fq.LayeredLoss(
        blocks=lambda params: params["blocks"],
        prologue=lambda params, x, key: x,
        block=lambda block, x, batch, key: jax.nn.relu(x @ block) @ block.T,
        epilogue=lambda params, x, batch, key: jnp.mean(x.astype(jnp.float32)),
    )

    def step(params, state, x):
        if how == "release":
            return fq.release_step(optim, loss, params, state, x)[:2]
        return optim.step(params, state, jax.grad(loss)(params, x))

    x = jax.ShapeDtypeStruct((8, width), jnp.bfloat16)
    memory = _compile_function("v5e", step, params, state, x).memory_analysis()
    if how == "release":
        assert memory.temp_size_in_bytes < 2 * layer
        assert memory.alias_size_in_bytes >= _bytes((params, state)) - 4096
    else:
        assert memory.temp_size_in_bytes >= layers * layer
