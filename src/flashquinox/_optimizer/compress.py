"""Any transformation of Optax with compressed state."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int32, PyTree

from .._backends import dispatch
from .._common import meshes
from .._common.text import shown
from .._model.trained import is_float_array
from .._model.trees import path_name
from .._rules.rule import Moment
from .._storage.codec import Dither
from .._storage.full_precision import FullPrecision
from .._storage.layout import Layout
from .._storage.quant_moment import QuantMoment
from .._storage.storage import check_storage, Storage
from .._storage.whole_arrays import encode_array
from .optax_kinds import StateKind
from .state import OptimizerState
from .state_kinds import check_kinds, kinds_of


# Whether something is wrong, and what an error says of it.
Check: TypeAlias = tuple[Bool[Array, ""], str]


class CompressedState(NamedTuple):
    """The state of [`flashquinox.compress`][].

    - `compressed_count`: the number of updates, by which codes are rounded.
    - `inner_state`: that of the transformation, with `QuantMoment`s in it.
    """

    compressed_count: Int32[Array, ""]
    inner_state: PyTree


def compress(
    transformation: optax.GradientTransformation,
    *,
    kinds: Mapping[str, StateKind] | None = None,
    storage: Storage = Storage(),
) -> optax.GradientTransformationExtraArgs:
    r"""Any Optax transformation, with its state in 8 bits between updates.

    Each update decodes the state, calls the transformation, and encodes the new state.
    The transformation sees float32: weights, gradients and states. Compressed are
    float32 arrays with at least two axes, or with 4096 elements; everything else stays
    as it is, as do counts.

    ??? Example

        With weights in bfloat16 and their corrections, in 24 bits:

        ```python
        optim = optax.chain(fq.compress(optax.contrib.ademamix(1e-3)), fq.add_updates())
        model, state = fq.prepare(float32_model, optim)
        ```

    **Arguments:**

    - `transformation`: any `optax.GradientTransformation`.
    - `kinds`: how arrays of its state are stored: a dictionary to `"signed"`,
        `"nonnegative"` for averages of squares, or `"exact"` for what must not be
        rounded. Its keys are names of fields or of keys of dictionaries, such as
        `"mu"`, of classes, of a class and a field, `"ScaleByAdamState.mu"`, or paths
        as errors print them, `"[0].mu"`. What is around others decides, but for paths.
        The kinds of all transformations in `optax` and `optax.contrib` are known: pass
        those of your own, or others than these.
    - `storage`: `moments` and `group_size` of a [`flashquinox.Storage`][]: which codecs
        store arrays of either kind.

    **Returns:**

    An `optax.GradientTransformationExtraArgs`, whose updates are float32.

    **Raises:**

    `TypeError` or `ValueError` for other arguments; `ValueError` from `init` for an
    array of an unknown kind, and for a name in `kinds` that has no effect. An error
    from an update if an array that is `"nonnegative"` has a negative element.
    """
    call = "compress"
    if not hasattr(transformation, "init") or not hasattr(transformation, "update"):
        raise TypeError(
            f"`{call}` takes an `optax.GradientTransformation`; got "
            f"{shown(transformation)}."
        )
    given = check_kinds(call, kinds)
    storage = check_storage(call, storage)
    inner = optax.with_extra_args_support(transformation)

    def init(params: PyTree) -> CompressedState:
        count = jnp.zeros((), jnp.int32)
        state = inner.init(_wide(params))
        _check_not_compressed(call, state)
        checks, new = _encoded(call, given, storage, state, count)
        return CompressedState(_checked(count, checks), new)

    def update(
        updates: PyTree,
        state: CompressedState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, CompressedState]:
        count, grads = state.compressed_count, updates
        updates, new = inner.update(
            _wide(grads), _decoded(state.inner_state), _wide(params), **extra_args
        )
        checks, new = _encoded(call, given, storage, new, count, state.inner_state)
        _check_shapes(call, grads, updates)
        count = _checked(jnp.asarray(optax.safe_increment(count)), checks)
        return updates, CompressedState(count, new)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


def _check_not_compressed(call: str, state: PyTree) -> None:
    """Weights that an optimizer of this library gets here would be float32, without
    the corrections that make its steps exact."""
    kinds = (OptimizerState, QuantMoment)
    for path, x in jtu.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, kinds)
    ):
        if isinstance(x, kinds):
            where = f" at `{jtu.keystr(path)}`" if path else ""
            raise TypeError(
                f"`{call}`: the state of the transformation has a "
                f"`flashquinox.{type(x).__name__}`{where}, which is compressed "
                "already. Take optimizers of this library without `compress`, and wrap "
                "the transformations of Optax beside them one by one."
            )


def _check_shapes(call: str, grads: PyTree, updates: PyTree) -> None:
    """A state of other shapes may have been broadcast."""
    if jtu.tree_structure(grads) != jtu.tree_structure(updates):
        return
    pairs = jtu.tree_leaves_with_path(grads), jtu.tree_leaves(updates)
    for (path, grad), update in zip(*pairs, strict=True):
        if jnp.shape(grad) != jnp.shape(update):
            raise ValueError(
                f"`{call}`: the gradient at `{path_name(path)}` has shape "
                f"{jnp.shape(grad)}, and its update {jnp.shape(update)}. Pass "
                "gradients, state and weights of the same model."
            )


def _wide(tree: PyTree) -> PyTree:
    """A tree with its narrow floating-point arrays as float32."""
    is_narrow = lambda x: is_float_array(x) and x.dtype.itemsize < 4
    return jtu.tree_map(lambda x: x.astype(jnp.float32) if is_narrow(x) else x, tree)


def _is_stored(x: Any) -> bool:
    return isinstance(x, QuantMoment)


def _decoded(state: PyTree) -> PyTree:
    decode = lambda x: x.decode() if _is_stored(x) else x
    return jtu.tree_map(decode, state, is_leaf=_is_stored)


def _encoded(
    call: str,
    given: Mapping[str, StateKind],
    storage: Storage,
    state: PyTree,
    count: Array,
    like: PyTree | None = None,
) -> tuple[list[Check], PyTree]:
    """A state with its arrays encoded: as in `like`, or for the first time. And what
    must not be true of it."""
    leaves, structure = jtu.tree_flatten(state)
    old: list[Any] = [None] * len(leaves)
    if like is not None:
        old = structure.flatten_up_to(like)
    kinds = kinds_of(call, given, state)
    assert len(kinds) == len(leaves)
    new, checks = [], []
    for number, (x, (path, kind), before) in enumerate(
        zip(leaves, kinds, old, strict=True)
    ):
        if _is_stored(before):
            layout, codec = before.layout, before.codec
            if x.shape != layout.shape:
                raise ValueError(
                    f"`{call}`: the array of the state at `{jtu.keystr(path)}` had the "
                    f"shape {layout.shape}, and an update made one of {x.shape}. Pass "
                    "gradients, state and weights of the same model."
                )
        elif like is not None:
            new.append(x)
            continue
        else:
            layout, codec = _storage_of(call, storage, path, kind, x)
        if codec is None:
            new.append(x)
            continue
        moment_kind = "nonnegative" if kind == "nonnegative" else "signed"
        if kind == "nonnegative":
            checks.append(_is_negative(call, path, x))
        new.append(_encode(layout, codec, x, Dither.at(count, number, moment_kind)))
    return checks, structure.unflatten(new)


@partial(jax.jit, static_argnums=(0, 1))
def _encode(layout: Layout, codec: Any, x: Array, dither: Dither) -> QuantMoment:
    codes, scales = encode_array(codec, layout, x, dither)
    assert scales is not None
    return QuantMoment(codes, scales, layout.axes, layout.group_size, codec)


def _storage_of(
    call: str, storage: Storage, path: tuple[Any, ...], kind: StateKind | None, x: Any
) -> tuple[Any, Any]:
    """The layout and the codec of an array of a new state. `None` if it stays."""
    if not is_float_array(x) or x.dtype != jnp.float32 or kind == "exact":
        return None, None
    codecs = storage.codecs
    moment = Moment("nonnegative" if kind == "nonnegative" else "signed")
    codec = codecs.of(moment, x.shape)
    if x.size == 0 or isinstance(codec, FullPrecision):
        return None, None
    if kind is None:
        raise ValueError(
            f"`{call}`: nothing is known of the array of the state at "
            f"`{jtu.keystr(path)}`, of shape {x.shape}. Pass its kind by the name of "
            "its field, or by its path: "
            f"`kinds={{{jtu.keystr(path)!r}: 'signed'}}`; 'nonnegative' is for "
            "averages of squares, 'exact' leaves it as it is."
        )
    there = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    parts = None
    if isinstance(there, NamedSharding):
        spec = meshes.restrict(there.spec, there.mesh.axis_names, x.ndim)
        parts = meshes.divisions(NamedSharding(there.mesh, spec))
    rows = dispatch.prefers_rows("auto")
    layout = codecs.layout(x.shape, storage.group_size, prefer_rows=rows, parts=parts)
    return layout, codec


def _is_negative(call: str, path: tuple[Any, ...], x: Array) -> Check:
    return jnp.any(x < 0), (
        f"`{call}`: the array of the state at `{jtu.keystr(path)}` is stored as "
        "'nonnegative', and has negative elements. Pass its kind by the name of its "
        f"field, or by its path: `kinds={{{jtu.keystr(path)!r}: 'signed'}}`."
    )


def _checked(count: Array, checks: list[Check]) -> Array:
    """An error where one of these is true. An array that went through it would be
    copied, and be whole on every device of a mesh."""
    if not checks:
        return count
    wrong, messages = zip(*checks, strict=True)
    wrong = jnp.stack(wrong)
    first = jnp.argmax(wrong)
    return eqx.branched_error_if(count, jnp.any(wrong), first, messages)
