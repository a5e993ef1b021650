"""Which leaves are matrices, and which of their axes are rows and columns."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax.tree_util as jtu
import optax.contrib
from jaxtyping import PyTree

from .._common.text import shown
from .._model.decay_mask import decay_mask
from .._model.trained import is_float_array, is_trainable
from .._model.trees import Leaf, match
from .._rules.muon import Muon
from .groups import AbstractChoice, Group, LeafRule
from .mask import decayed


DimensionNumbers: TypeAlias = PyTree[optax.contrib.MuonDimensionNumbers | None]
_ARGUMENT = "weight_dimension_numbers"

# Names of embeddings and of the layer that makes logits, or parts of them.
_NO_MATRICES = frozenset(
    "emb embed embedder embedding embeddings embeds head lm_head logits pos position "
    "positional positions unembed unembedding wpe wte".split()
)


# Names of which a part is one of these, and which are of other layers.
_OF_MATRICES = re.compile("multi_?head(ed)?|pos_ffn|position_wise")

# Names of the classes of layers that are embeddings end so, in Equinox and Haliax.
_EMBEDDINGS = ("Embed", "Embedding")

# Layers whose weights have outputs before inputs.
_OUTPUTS_FIRST = eqx.nn.Linear | eqx.nn.LSTMCell | eqx.nn.GRUCell


@dataclasses.dataclass(frozen=True)
class _Axes:
    """`MuonDimensionNumbers` as a leaf of a tree, counted from the end."""

    reduction: tuple[int, ...]
    output: tuple[int, ...]


class ByDimensionNumbers(AbstractChoice):
    """The first group trains matrices, the second one all else."""

    weight_dimension_numbers: DimensionNumbers | Callable | None

    def __call__(
        self,
        call: str,
        params: PyTree,
        leaves: Sequence[Leaf],
        groups: tuple[Group, ...],
    ) -> list[LeafRule]:
        given = self.weight_dimension_numbers
        if given is None:
            axes = _matrices(call, params, [*leaves])
        else:
            if callable(given):
                given = given(eqx.filter(params, is_float_array))
            is_one = lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)
            boxed = jtu.tree_map(
                lambda x: _Box(x) if is_one(x) else x, given, is_leaf=is_one
            )
            found = match(call, _ARGUMENT, boxed, [*leaves], prefix=True)
            axes = [
                _axes(call, leaf, x) if is_trainable(leaf.value) else None
                for leaf, x in zip(leaves, found, strict=True)
            ]
        matrices, others = groups
        assert isinstance(matrices.rule, Muon)
        return [
            LeafRule(1, others.rule)
            if x is None
            else LeafRule(
                0,
                dataclasses.replace(
                    matrices.rule, reduction_axis=x.reduction, output_axis=x.output
                ),
            )
            for x in axes
        ]


@dataclasses.dataclass(frozen=True)
class _Box:
    numbers: optax.contrib.MuonDimensionNumbers


def _axes(call: str, leaf: Leaf, found: Any) -> _Axes | None:
    if found is None:
        return None
    if not isinstance(found, _Box):
        raise TypeError(
            f"`{call}`: `{_ARGUMENT}` at `{leaf.name}` must be an "
            "`optax.contrib.MuonDimensionNumbers`, or None to train this weight by "
            f"AdamW; got {shown(found)}."
        )
    shape = leaf.value.shape
    numbers = [found.numbers.reduction_axis, found.numbers.output_axis]
    each = [(x,) if isinstance(x, int) else tuple(x) for x in numbers]
    ndim = len(shape)
    wrong = any(not -ndim <= i < ndim for x in each for i in x)
    normal = [tuple(i % ndim - ndim for i in x) for x in each] if not wrong else []
    flat = [i for x in normal for i in x]
    if wrong or not all(each) or len(set(flat)) < len(flat):
        raise ValueError(
            f"`{call}`: `{_ARGUMENT}` at `{leaf.name}` is {found.numbers}; the weight "
            f"has the shape {shape}. Name different axes of it, at least one as "
            "reduction axis and one as output axis, or None to train it by AdamW."
        )
    return _Axes(*normal)


def _matrices(call: str, params: PyTree, leaves: list[Leaf]) -> list[_Axes | None]:
    """The axes of what is a matrix by default."""
    layers = dict(_classes(params, ()))
    # Not the vectors of norms and biases, which have two axes if layers are stacked.
    is_candidate = decayed(call, decay_mask(), params, leaves)
    found: list[_Axes | None] = []
    for leaf, candidate in zip(leaves, is_candidate, strict=True):
        path = leaf.path
        owner = path
        # A box of one array, as Haliax has, names no fields.
        while owner and isinstance(owner[-1], jtu.FlattenedIndexKey):
            owner = owner[:-1]
        layer = layers.get(owner[:-1], object)
        names = _names(path)
        if not candidate or not _NO_MATRICES.isdisjoint(names):
            found.append(None)
        elif layer.__name__.endswith(_EMBEDDINGS):
            found.append(None)
        elif issubclass(layer, _OUTPUTS_FIRST):
            # Axes of a stack come first.
            found.append(_Axes((-1,), (-2,)) if leaf.value.ndim >= 2 else None)
        else:
            found.append(_Axes((-2,), (-1,)) if leaf.value.ndim == 2 else None)
    return found


def _classes(
    node: Any, path: tuple[Any, ...]
) -> Iterator[tuple[tuple[Any, ...], type]]:
    """The classes of all nodes, by their paths."""
    below, _ = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if [key for key, _ in below] != [()]:
        yield path, type(node)
        for key, child in below:
            yield from _classes(child, (*path, *key))


def _names(path: tuple[Any, ...]) -> list[str]:
    """All names on a path, and their words, in lower case; the last name comes last."""
    names = [str(getattr(key, "name", getattr(key, "key", ""))).lower() for key in path]
    parts = [_OF_MATRICES.sub("", name) for name in names]
    words = [word for part in parts for word in re.findall("[a-z]+", part)]
    return words + names
