"""`repr` of an optimizer: one readable line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashquinox as fq

from ..helpers import HeavyBall


def _polynomial(power, count):
    return 1e-3 * count**power


_CASES = {
    "adamw(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0001)": (
        lambda: fq.adamw(1e-3)
    ),
    "adamw(learning_rate=0.001, b1=0.9, b2=0.999, eps=0.0, nesterov=True, "
    "weight_decay=0.1, mask={'a': True}, decay='independent', "
    "peak_learning_rate=0.001, storage=Storage(moments=('learned', 'log')))": (
        lambda: fq.adamw(
            1e-3,
            eps=0.0,
            nesterov=True,
            weight_decay=0.1,
            decay="independent",
            mask={"a": True},
            storage=fq.Storage(moments=("learned", "log")),
        )
    ),
    "lion(learning_rate=cosine_decay_schedule.schedule, b1=0.9, b2=0.99, "
    "weight_decay=partial(_polynomial, ...), storage=Storage(group_size=64), "
    "backend='xla')": (
        lambda: fq.lion(
            optax.cosine_decay_schedule(1e-3, 10),
            weight_decay=functools.partial(_polynomial, 2),
            storage=fq.Storage(group_size=64),
            backend="xla",
        )
    ),
    "sgd(learning_rate=0.5, weight_decay=0.0)": lambda: fq.sgd(jnp.float32(0.5)),
    "sgdw(learning_rate=0.5, momentum=0.75, weight_decay=0.0001, "
    "storage=Storage(master_weight_bits=None, dither_weights=False))": (
        lambda: fq.sgdw(
            0.5,
            np.float32(0.75),
            storage=fq.Storage(master_weight_bits=None, dither_weights=False),
        )
    ),
    "optimizer(HeavyBall(momentum=0.5), learning_rate=0.01, weight_decay=0.0, "
    "decay='l2')": lambda: fq.optimizer(HeavyBall(0.5), 1e-2, decay="l2"),
}


@pytest.mark.parametrize("text", _CASES)
def test_repr(text):
    assert repr(_CASES[text]()) == text


def test_repr_of_a_traced_learning_rate():
    texts = []
    jax.eval_shape(lambda x: texts.append(repr(fq.adam(x))), jnp.float32(1.0))
    assert texts[0].startswith("adam(learning_rate=<traced float32[]>, b1=0.9,")


def test_repr_of_a_large_mask_is_short():
    mask = {f"layer {i}": True for i in range(1000)}
    assert len(repr(fq.adamw(1e-3, mask=mask))) < 200
