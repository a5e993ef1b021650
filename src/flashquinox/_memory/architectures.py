"""The shapes of common language models, with stacked layers.

A model is a dictionary of shapes: the weights outside of the layers by their names, and
`blocks`, a dictionary of shapes that begin with the number of layers.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.tree_util as jtu
from jax.typing import DTypeLike
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers


Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = dict[str, Any]


def gpt2(
    layers: int,
    width: int,
    *,
    hidden: int | None = None,
    vocabulary: int = 50257,
    positions: int = 1024,
    tied_head: bool = True,
) -> Shapes:
    """Learned positions, norms with biases, and an MLP of two matrices with biases."""
    hidden = hidden or 4 * width
    blocks: dict[str, Shape] = {}
    for name, out, into in (
        ("query_key_value", 3 * width, width),
        ("attention_out", width, width),
        ("mlp_up", hidden, width),
        ("mlp_down", width, hidden),
    ):
        blocks |= {name: (out, into), f"{name}.bias": (out,)}
    for name in ("attention_norm", "mlp_norm"):
        blocks |= {name: (width,), f"{name}.bias": (width,)}
    shapes = {"token": (vocabulary, width), "position": (positions, width)}
    norm = {"norm": (width,), "norm.bias": (width,)}
    return _model(shapes, layers, blocks, norm, tied_head)


def llama(
    layers: int,
    width: int,
    *,
    hidden: int,
    heads: int,
    key_heads: int,
    head_width: int | None = None,
    vocabulary: int = 128256,
    tied_head: bool = False,
    query_key_value_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    query_key_norm: bool = False,
) -> Shapes:
    """Rotary positions, norms without biases, queries that share keys and values, and
    an MLP of three matrices."""
    head_width = head_width or width // heads
    queries, keys = heads * head_width, key_heads * head_width
    blocks: dict[str, Shape] = {}
    for name, out, into, bias in (
        ("query", queries, width, query_key_value_bias),
        ("key", keys, width, query_key_value_bias),
        ("value", keys, width, query_key_value_bias),
        ("out", width, queries, out_bias),
        ("gate", hidden, width, mlp_bias),
        ("up", hidden, width, mlp_bias),
        ("down", width, hidden, mlp_bias),
    ):
        blocks |= {name: (out, into)} | ({f"{name}.bias": (out,)} if bias else {})
    blocks |= {"attention_norm": (width,), "mlp_norm": (width,)}
    if query_key_norm:
        blocks |= {"query_norm": (head_width,), "key_norm": (head_width,)}
    token = {"token": (vocabulary, width)}
    return _model(token, layers, blocks, {"norm": (width,)}, tied_head)


def _model(
    before: dict[str, Shape],
    layers: int,
    block: dict[str, Shape],
    after: dict[str, Shape],
    tied_head: bool,
) -> Shapes:
    blocks = {name: (layers, *shape) for name, shape in block.items()}
    head = {} if tied_head else {"head": before["token"]}
    return {**before, "blocks": blocks, **after, **head}


def dimension_numbers(model: dict[str, Any]) -> Any:
    """What of a model Muon trains: the matrices of its blocks, (layers, out, in)."""

    def of(path: tuple[Any, ...], x: Any) -> MuonDimensionNumbers | None:
        is_matrix = path[0].key == "blocks" and x.ndim == 3
        return MuonDimensionNumbers(2, 1) if is_matrix else None

    return jtu.tree_map_with_path(of, model)


def blocks(model: dict[str, Any]) -> Any:
    return model["blocks"]


def prologue(model: dict[str, Any]) -> Any:
    """The weights that are read before the blocks."""
    return [model[name] for name in ("token", "position") if name in model]


def epilogue(model: dict[str, Any]) -> Any:
    """The weights that are read after the blocks."""
    names = ("norm", "norm.bias", "head" if "head" in model else "token")
    return [model[name] for name in names if name in model]


def structs(shapes: Shapes, dtype: DTypeLike) -> PyTree[jax.ShapeDtypeStruct]:
    return jtu.tree_map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _llama2(layers: int, width: int, hidden: int, heads: int, keys: int) -> Shapes:
    return llama(
        layers, width, hidden=hidden, heads=heads, key_heads=keys, vocabulary=32000
    )


def _llama3(
    layers: int, width: int, hidden: int, heads: int, tied_head: bool = False
) -> Shapes:
    return llama(
        layers, width, hidden=hidden, heads=heads, key_heads=8, tied_head=tied_head
    )


PRESETS: dict[str, Shapes] = {
    "gpt2-124m": gpt2(12, 768),
    "gpt2-355m": gpt2(24, 1024),
    "gpt2-774m": gpt2(36, 1280),
    "gpt2-1.5b": gpt2(48, 1600),
    "llama-2-7b": _llama2(32, 4096, 11008, 32, 32),
    "llama-2-13b": _llama2(40, 5120, 13824, 40, 40),
    "llama-2-70b": _llama2(80, 8192, 28672, 64, 8),
    "llama-3.1-8b": _llama3(32, 4096, 14336, 32),
    "llama-3.1-70b": _llama3(80, 8192, 28672, 64),
    "llama-3.1-405b": _llama3(126, 16384, 53248, 128),
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, tied_head=True),
    "llama-3.2-3b": _llama3(28, 3072, 8192, 24, tied_head=True),
}


#
# Hugging Face
#


class _Config:
    """A `config.json`, whose values are checked when they are read."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values

    def size(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not is_whole or not 1 <= value < 2**31:
                raise ValueError(
                    f"{name!r} must be a whole number from 1 to {2**31 - 1}; got "
                    f"{value!r}"
                )
            return value
        if default is not None:
            return default
        kind = self._values["model_type"]
        raise ValueError(f"there is no {names[0]!r}, which a {kind!r} has")

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{name!r} must be true or false; got {value!r}")
        return value


def _of_gpt2(config: _Config) -> Shapes:
    return gpt2(
        config.size("n_layer"),
        width := config.size("n_embd"),
        hidden=config.size("n_inner", default=4 * width),
        vocabulary=config.size("vocab_size"),
        positions=config.size("n_positions", "n_ctx"),
        tied_head=config.flag("tie_word_embeddings", True),
    )


def _like_llama(
    *,
    tied_head: bool = False,
    query_key_value_bias: bool | None = None,
    query_key_norm: bool = False,
    head_width: int | None = None,
    own_keys: bool = False,
) -> Callable[[_Config], Shapes]:
    """How to read the config of a model like Llama, given the defaults of its type. A
    bias of `None` means that the config decides. With `own_keys`, every head has its
    own keys and values, unless the config gives their number."""

    def read(config: _Config) -> Shapes:
        width, heads = config.size("hidden_size"), config.size("num_attention_heads")
        if head_width is None and width % heads != 0:
            # The width of a head must then be in the config.
            config.size("head_dim")
        bias = config.flag("attention_bias", False)
        ours = query_key_value_bias
        return llama(
            config.size("num_hidden_layers"),
            width,
            hidden=config.size("intermediate_size"),
            heads=heads,
            key_heads=config.size(
                "num_key_value_heads", default=heads if own_keys else None
            ),
            head_width=config.size("head_dim", default=head_width or width // heads),
            vocabulary=config.size("vocab_size"),
            tied_head=config.flag("tie_word_embeddings", tied_head),
            query_key_value_bias=bias if ours is None else ours,
            out_bias=bias and ours is None,
            mlp_bias=config.flag("mlp_bias", False),
            query_key_norm=query_key_norm,
        )

    return read


# The defaults are those of the configuration classes of Transformers.
_TYPES: dict[str, Callable[[_Config], Shapes]] = {
    "gpt2": _of_gpt2,
    "llama": _like_llama(own_keys=True),
    "mistral": _like_llama(query_key_value_bias=False),
    "qwen2": _like_llama(query_key_value_bias=True),
    "qwen3": _like_llama(query_key_norm=True, head_width=128),
    # Its query, key and value matrices are one array, which changes no size.
    "phi3": _like_llama(query_key_value_bias=False, own_keys=True),
    "gemma": _like_llama(tied_head=True, head_width=256),
}


def from_config(config: Any) -> Shapes:
    """The shapes of a model, from the `config.json` that Hugging Face's Transformers
    writes.

    **Raises:**

    `ValueError` if the type of the model is not known here, or a size is missing.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind is None:
        raise ValueError("there is no 'model_type': it is no config of Transformers")
    if not isinstance(kind, str):
        raise ValueError(f"'model_type' must be a name; got {kind!r}")
    if kind not in _TYPES:
        raise ValueError(
            f"the shapes of a {kind!r} are not known here, only those of "
            f"{', '.join(_TYPES)}; pass --params instead"
        )
    return _TYPES[kind](_Config(config))
