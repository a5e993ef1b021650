"""`Storage`: one value for each way of storing, however it is spelled."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq

from ..helpers import assert_raises, tree_identical, weights


_CODECS = fq.MomentCodecs(fq.SoftsignCodec(dithered=False), fq.FittedLogCodec())

# What `repr` shows, and other ways to write the same.
_SPELLINGS = {
    "Storage()": [
        fq.Storage(master_weight_bits="auto", group_size=np.uint8(32)),
        fq.Storage(moments="flashquinox", dither_weights=True),
        fq.Storage(moments=("flashquinox", "flashquinox")),
        fq.Storage(
            moments=fq.MomentCodecs(
                fq.SoftsignCodec(), fq.FittedLogCodec(), relative=fq.LinearCodec()
            )
        ),
    ],
    "Storage(moments=('softsign', 'flashquinox'))": [
        fq.Storage(moments=fq.MomentCodecs(fq.SoftsignCodec(), fq.FittedLogCodec())),
        fq.Storage(moments=("softsign", "flashquinox")),
    ],
    "Storage(master_weight_bits=24)": [fq.Storage(master_weight_bits=24)],
    "Storage(master_weight_bits=None, dither_weights=False)": [
        fq.Storage(dither_weights=False, master_weight_bits=None)
    ],
    "Storage(moments='float32')": [
        fq.Storage(moments=("float32", "float32")),
        fq.Storage(moments=fq.MomentCodecs(fq.FullPrecision(), fq.FullPrecision())),
    ],
    "Storage(moments=('learned', 'log'), group_size=64)": [
        fq.Storage(group_size=np.int64(64), moments=("learned", "log")),
    ],
    # A pair of these has another `smallest_vector` than the paper's codec by its name.
    "Storage(moments='flashoptim')": [fq.Storage(moments="flashoptim")],
    "Storage(moments=('flashoptim', 'flashoptim'))": [
        fq.Storage(moments=("flashoptim", "flashoptim"))
    ],
}
_NAMES = {name: getattr(fq, name) for name in dir(fq) if name[0].isupper()}


@pytest.mark.parametrize("text", _SPELLINGS)
def test_one_value_for_all_spellings(text):
    shown = eval(text, _NAMES)
    for storage in _SPELLINGS[text]:
        assert repr(storage) == text
        assert storage == shown and hash(storage) == hash(shown)
        assert dataclasses.replace(storage) == storage
        assert jtu.tree_leaves(storage) == []
        assert type(storage.group_size) is int
        assert storage.codecs == shown.codecs


def test_all_fields_tell_storages_apart():
    all_different = [
        *(eval(text, _NAMES) for text in _SPELLINGS),
        fq.Storage(moments=_CODECS),
    ]
    for i, one in enumerate(all_different):
        assert [one == other for other in all_different] == [
            i == j for j in range(len(all_different))
        ]


def test_codecs_without_a_name():
    storage = fq.Storage(moments=_CODECS)
    assert storage.codecs is _CODECS and storage.moments is _CODECS
    assert repr(storage).startswith("Storage(moments=MomentCodecs(SoftsignCodec(")
    assert "\n" not in repr(storage)


def test_is_a_static_argument():
    traced = []
    # The first optimizer of a process imports kernels, which invalidates traces.
    fq.adamw(1e-3)

    @jax.jit(static_argnames="storage")
    def init(params, storage):
        traced.append(storage)
        return fq.adamw(1e-3, storage=storage).init(params)

    params = weights("matrix")
    one = init(params, storage=fq.Storage(group_size=64))
    other = init(params, storage=fq.Storage(group_size=np.int32(64)))
    assert len(traced) == 1 and tree_identical(one, other)
    assert one.moments["mu"]["matrix"].group_size == 64


def test_lists_are_pairs(without_typechecker):
    pair = fq.Storage(moments=["learned", "log"])
    assert pair == fq.Storage(moments=("learned", "log"))
    assert hash(pair) == hash(fq.Storage(moments=("learned", "log")))


def test_is_not_changed(without_typechecker):
    with pytest.raises(dataclasses.FrozenInstanceError):
        fq.Storage().group_size = 64
    with pytest.raises(TypeError, match="positional"):
        fq.Storage(24)
    for value in (jnp.asarray(32), np.asarray(32)):
        assert_raises(
            ValueError,
            lambda value=value: fq.Storage(group_size=value),
            "`Storage(group_size=...)`",
            "as an integer",
        )


#
# The options beside it
#


@pytest.mark.parametrize(
    "make", [fq.adamw, fq.adam, fq.lion, fq.sgd, fq.sgdw, fq.optimizer]
)
def test_signatures_name_all_options(make):
    parameters = inspect.signature(make).parameters
    options = {name: parameters[name] for name in fq.Options.__annotations__}
    assert all(x.kind is inspect.Parameter.KEYWORD_ONLY for x in options.values())
    assert {name: x.default for name, x in options.items()} == {
        "skip_nonfinite": False,
        "verify_weights": None,
        "backend": "auto",
        "shardings": None,
        "state_memory": "device",
    }
    assert parameters["storage"].default == fq.Storage()
    assert "options" not in parameters


def test_inject_hyperparams_passes_options():
    optim = optax.inject_hyperparams(fq.adamw, hyperparam_dtype=jnp.float32)(
        learning_rate=1e-3, verify_weights="error", skip_nonfinite=True, backend="xla"
    )
    params = weights("matrix")
    state = jax.jit(optim.init)(params)
    assert set(state.hyperparams) == {"learning_rate"}
    assert state.inner_state.checksums["matrix"] is not None
    bad = jtu.tree_map(lambda x: x * jnp.asarray(jnp.nan, x.dtype), params)
    _, new = jax.jit(optim.update)(bad, state, params)
    assert int(new.inner_state.count) == 0
