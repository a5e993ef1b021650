"""Plain XLA on CPUs: leaves in chunks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashquinox as fq
from flashquinox._backends import chunks, xla
from flashquinox._backends.chunk_plan import best_size, Piece, plan_chunks, Window
from flashquinox._backends.groups import Groups, joined
from flashquinox._storage.layout import flattened

from ..helpers import slow, tree_identical
from ..kernels import arrays, assert_same


# Windows of which the last is moved back; partial groups; what shares chunks; groups
# that do not lie in order, as those of a state for TPUs.
_SHAPES = {"long": (90, 64), "partial": (33, 5, 31), "rows": (64, 5), "scalar": ()}
_SHAPES |= {"short": (7, 32), "other": (9, 64), "vector": (40,)}
# With more cases than are in one choice.
_SHAPES |= {f"many{i}": (33 + i, 32) for i in range(8)}


def test_plan():
    leaves = ((10, 10), (3, 3), (9, 8), (2, 1), (4, 0))
    plan = plan_chunks(leaves, 4)
    assert plan.size == 4
    assert plan.windows == (
        Window(0, 0),
        Window(0, 4),
        Window(0, 6),
        Window(2, 0),
        Window(2, 4),
    )
    assert plan.shared == (
        (Piece(4, 0, 4),),
        (Piece(1, 0, 3), Piece(2, 8, 1)),
        (Piece(3, 0, 2),),
    )
    one = plan_chunks(leaves, 28)
    assert one.size == 28 and not one.windows and len(one.shared) == 1


def test_chunks_fill_leaves():
    """Of three windows where two and a bit would be taken whole, each is a third."""

    def found(*numbers, least=1, most=8192):
        every = tuple([(number, number) for number in numbers])
        return best_size(every, least, most, 512)

    assert found(18432, 18432, 73728) == 6144
    assert found(18432, least=6145) == 6656
    assert found(1 << 20) == found(8192, 32768) == 8192
    # A hundredth less time is not worth more chunks that leaves share.
    assert found(*[8192 * 25 - 512] * 3) == 8192
    # One that leaves need is taken, round or not.
    assert found(9, least=8191, most=8191) == 8191
    assert found(40, least=3, most=3) == 3
    every = [found(n, most=most) for n in range(1, 5000, 37) for most in (1, 7, 805)]
    assert min(every) >= 1 and max(every) <= 805


def test_temporaries_are_few_beside_leaves():
    """Of fewer elements, chunks are smaller; but one chunk is never divided."""
    most = chunks._ELEMENTS // 32

    def found(*numbers, in_order=True):
        layouts = [flattened((32 * n,), 32) for n in numbers]
        leaves = [Groups(x, 32, x.shape[0] // 32, in_order, True) for x in layouts]
        return chunks._chunk_groups(leaves)

    assert found(most - 1, 1) == found(31 * most, most) == most
    assert found(most, 1) == most // 32
    assert found(15 * most, most) == most // 2
    assert found(most - 1, 9, in_order=False) == most - 1
    # Leaves share few chunks.
    assert found(most, *[100] * 20) == 4 * 304
    assert found(*[24] * 1000) == most // 2


@pytest.fixture
def small_chunks(monkeypatch):
    """In loops also where XLA copies."""
    monkeypatch.setattr(chunks, "_ELEMENTS", 1024)
    monkeypatch.setattr(chunks, "_CHUNKS", 2)
    monkeypatch.setattr(chunks, "_LOOPS_COPY", False)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "make, dtype",
    [
        pytest.param(fq.adamw, jnp.bfloat16, id="adamw"),
        slow(
            lambda *x, **k: fq.lion(*x, skip_nonfinite=True, **k),
            jnp.float16,
            id="lion",
        ),
        slow(
            lambda *x, **k: fq.sgdw(
                *x,
                momentum=0.9,
                storage=fq.Storage(master_weight_bits=None, dither_weights=True),
                **k,
            ),
            jnp.bfloat16,
            id="sgdw",
        ),
        pytest.param(
            lambda *x, **k: fq.adamw(*x, storage=fq.Storage(moments="float32"), **k),
            jnp.float32,
            id="float32",
        ),
    ],
)
def test_chunks_are_whole_leaves(monkeypatch, make, dtype):
    params = arrays(_SHAPES, dtype, 0)
    grads = arrays(_SHAPES, jnp.float32, 1)
    optim = make(1e-2, backend="xla")
    old = make(1e-2, backend="tpu").init(params)

    def take_two_steps():
        jax.clear_caches()
        step = jax.jit(optim.step)
        return step(*step(params, old, grads), grads)

    in_chunks = take_two_steps()
    monkeypatch.setattr(xla, "takes", lambda leaf: False)
    assert_same(in_chunks, take_two_steps(), params, old, grads)


@pytest.mark.once
@pytest.mark.usefixtures("small_chunks")
def test_models_of_an_ensemble():
    params = arrays({"long": (2, 90, 64), "short": (2, 40)}, jnp.bfloat16, 0)
    optim = fq.lion(1e-2, backend="xla")
    jax.clear_caches()
    state = jax.vmap(optim.init)(params)
    found, _ = jax.jit(jax.vmap(optim.step))(params, state, params)
    for i in (0, 1):
        own = jax.tree.map(lambda x, i=i: x[i], params)
        expected, _ = jax.jit(optim.step)(own, optim.init(own), own)
        assert tree_identical(jax.tree.map(lambda x, i=i: x[i], found), expected)


def test_equal_moves_are_one_kernel():
    """However many leaves there are: XLA compiles moves anew for each known place."""
    params = {str(i): jnp.zeros(40) for i in range(30)}
    optim = fq.adamw(1e-2, backend="xla")
    step = jax.jit(optim.step).lower(params, optim.init(params), params)
    places = set(re.findall(r" slice\(.*slice=\{(.*?)\}", step.compile().as_text()))
    assert len(places) < 10


def test_leaves_of_one_chunk_are_joined_without_kernels():
    # Vectors, of which one has no whole group, and matrices in groups.
    shapes = ((96,), (10,), (64, 64), (128, 64))
    params = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    optim = fq.adamw(1e-3, backend="xla")
    state = jax.eval_shape(optim.init, params)
    text = jax.jit(optim.step).lower(params, state, params).compile().as_text()
    # Gradients, weights and corrections of both kinds, moments, and scales of two. What
    # is computed for each group is joined as s32.
    joins = re.findall(r"= (\w+)\[\S* concatenate\(", text)
    assert len([x for x in joins if x != "s32"]) == 12
    fusions = re.findall(r"concatenate\S* = (\w+)\[.* fusion\(", text)
    fused = len([x for x in fusions if x != "s32"])
    # XLA of JAX 0.10 fuses some of them with what reads them.
    assert fused == 0 or (fused < 12 and jax.__version_info__ < (0, 11))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="an older XLA makes other kernels"
)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "shapes, most", [([(64, 64)], 37), ([(64, 64), (40, 32), (50,)], 61)]
)
def test_few_kernels(shapes, most):
    """XLA compiles each for 10 ms and more, whatever it does; equal ones once."""
    params = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    optim = fq.adamw(1e-3, backend="xla")
    state = jax.eval_shape(optim.init, params)
    jax.clear_caches()
    text = jax.jit(optim.step).lower(params, state, params).compile().as_text()
    assert text is not None and "while(" in text
    assert len(_kernels(text)) <= most


def _kernels(text: str) -> set[str]:
    """The fused computations of a compiled program, with numbers for all names."""
    found = set()
    for name in set(re.findall(r" fusion\(.*calls=(%[\w.-]+)", text)):
        body = re.search(rf"^{re.escape(name)} (\(.*?^}})", text, re.M | re.S)
        assert body is not None
        body = re.sub(r", (metadata|backend_config)=.*", "", body[1])
        names: dict[str, str] = {}
        number = lambda name, names=names: names.setdefault(
            name[0].lstrip("%"), str(len(names))
        )
        found.add(re.sub(r"%[\w.-]+|param_[\w.]+", number, body))
    return found


def test_many_parts_are_joined_in_order():
    parts = [np.full(1 + i % 3, i, np.int32) for i in range(200)]
    program = jax.jit(joined).lower(parts)
    operands = re.findall(r"concatenate (.*?) :", program.as_text())
    assert max(x.count("%") for x in operands) <= 64
    assert np.array_equal(program.compile()(parts), np.concatenate(parts))


def test_a_step_is_in_place():
    """Whatever the size of a leaf, its temporaries are those of a chunk, where loops do
    not copy."""
    params = {"w": jnp.ones((2048, 1536), jnp.bfloat16), "b": jnp.ones(100)}
    optim = fq.adamw(1e-2, backend="xla")
    state = optim.init(params)
    step = jax.jit(optim.step, donate_argnums=(0, 1))
    memory = step.lower(params, state, params).compile().memory_analysis()
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes >= size
    of_chunk = 32 * chunks._ELEMENTS
    # With JAX 0.10, it is one tile: up to five float32 for each parameter.
    whole = 20 * params["w"].size if jax.__version_info__ < (0, 11) else 0
    assert memory.temp_size_in_bytes <= of_chunk + whole
