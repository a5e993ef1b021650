"""What steps on TPUs move and need, by the real compiler. No TPU is needed."""

import math
import re

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest
from jax.sharding import SingleDeviceSharding

import flashquinox as fq

from ..helpers import slow
from ..kernels import compiling_for, tpu_devices


_TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
_QUICK = {
    # Rows that are no multiple of 32, and columns that are the rows.
    (50257, 768),
    # The axes are in another order in memory.
    (768, 12, 64),
    # Groups along an axis that is neither the rows nor the columns.
    (4096, 8, 128),
    # Scales lie in another order than the leaf; and weights and gradients too.
    (768, 80, 3),
    (384, 192, 2, 2),
    (1_000_000,),
    # Weights and gradients, scales, and all of these in orders of their own.
    (2, 100, 768),
    (24, 30522, 127),
    (4096, 2, 127),
}
_SHAPES = [
    *_QUICK,
    (768, 50257),
    (12, 64, 768),
    (12, 768, 64),
    (64, 12, 768),
    (768, 64, 12),
    (512, 512, 3, 3),
    (64, 64, 3, 3),
    (3, 3, 512, 512),
    (2048, 512, 1, 1),
    (1, 1, 512, 2048),
    (768, 3, 16, 16),
    (16, 16, 3, 768),
    (1000, 1001),
    (384, 384, 3),
    (2, 2, 384, 768),
    (4096, 2, 128),
    (33, 512, 2, 2),
    # Stacked.
    (2, 2600, 650),
    (12, 768, 12, 64),
    (8, 512, 256, 3, 3),
    (12, 768, 1, 7, 7),
    (12, 7, 7, 1, 768),
    (4, 4096, 8, 128),
    (48, 4096, 16),
    (48, 4096, 1, 4),
    # Arrays in several orders.
    (1152, 8015),
    (2, 256, 100, 1, 1),
    (16, 384, 2, 399, 3),
    (8, 384, 8191),
    (33, 256, 4, 127),
    (2048, 2, 508, 9),
    # Vectors that are rows or columns.
    (1, 40_960),
    (40_960, 1),
    (1, 1, 1_000_000),
]


# On chips without instructions for bytes: pairs, and one group or two in each matrix.
_OF_WORDS = [(4096, 2, 128), (384, 192, 2, 2), (768, 96, 3), (24, 64, 129, 1)]
_OF_FLOAT32 = [
    # An axis of length 1 or 2 fills tiles of float32.
    (1, 197, 768),
    (512, 1, 100),
    (2, 100, 768),
    (16, 384, 2, 399, 3),
    (64, 1, 1, 900),
    (48, 1152, 1, 1024),
]


def _compile(chip: str, params):
    device = tpu_devices(_TOPOLOGIES[chip])[0]
    sharding = SingleDeviceSharding(device)
    optim = fq.adamw(1e-3, weight_decay=0.01, backend="tpu")
    state = jax.eval_shape(optim.init, params)
    placed = jtu.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, state, params),
    )
    with compiling_for(device.device_kind, "tpu", device.num_cores):
        step = jax.jit(optim.step, donate_argnums=(0, 1))
        compiled = step.lower(*placed).compile()
    return compiled, state


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(tree))


def _count(text: str, operations: str) -> int:
    """How many operations on arrays there are in a compiled program."""
    return len(re.findall(rf"= \(?\w+\[\d[^\]]*\]\S* (?:{operations})\(", text))


@pytest.mark.parametrize(
    "chip, shape, dtype",
    [
        *(
            slow(chip, x, jnp.bfloat16, unless=chip == "v5e" and x in _QUICK)
            for chip in _TOPOLOGIES
            for x in (_SHAPES if chip != "v4" else _OF_WORDS)
        ),
        *(
            slow(chip, x, jnp.float32, unless=chip == "v5e" and x == (1, 197, 768))
            for chip in _TOPOLOGIES
            for x in (_OF_FLOAT32 if chip != "v4" else [])
        ),
    ],
)
def test_leaves_move_no_more_than_they_must(chip, shape, dtype):
    params = {"leaf": jax.ShapeDtypeStruct(shape, dtype)}
    compiled, state = _compile(chip, params)
    size = math.prod(shape)
    scales = state.moments["mu"]["leaf"].scales.size
    text = compiled.as_text() or ""
    assert "tpu_custom_call" in text
    # The gradient; and weight, correction, codes and scales twice. Besides that, there
    # are up to 70 numbers, for each of which the compiler counts 512 bytes: of the
    # smallest leaf here, that is 1 byte per parameter.
    moved = compiled.cost_analysis()["bytes accessed"] - 70 * 512
    each = 12 if dtype == jnp.bfloat16 else 16
    assert moved <= each * size + 8 * scales + 2**15
    if scales <= size / 16:
        assert moved <= (each + 0.6) * size
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= 2**20
    assert memory.alias_size_in_bytes >= _bytes((params, state.moments))
    assert _count(text, "copy|transpose|copy-start") == 0


def test_small_leaves_share_kernels():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    params = {
        "matrices": [shape(12, 64), shape(12, 64)],
        "vectors": [shape(100), shape(768), shape(96, 1, 1)],
        "long vectors": [shape(4096), shape(5000)],
    }
    compiled, _ = _compile("v5e", params)
    text = compiled.as_text() or ""
    # Vectors of fewer than 4096 elements have moments in float32, but not those with
    # axes of length 1.
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert len(re.findall(r"= [^=]* fusion\(", text)) <= 1
    assert _count(text, "copy|transpose") == 0


def test_leaves_of_one_group_compile():
    """Their scales are arrays of one element, to which the compiler for this generation
    gives another memory."""
    params = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((8, 1, 1), (1, 32), (8, 1, 1))
    ]
    compiled, _ = _compile("tpu7x", params)
    text = compiled.as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 1
