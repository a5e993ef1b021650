"""A mask for weight decay, by the types of layers and the names of arrays.

The number of axes does not tell a bias from a matrix: in stacked layers, a bias has two
axes. The type of the layer tells, and where there are no types, the names.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._common.text import shown
from .float32_layer import Float32Layer
from .selection import children, Selection, Selectors
from .trees import is_array
from .variables import is_variable


_CALL = "decay_mask"

# Words for norms: the last in the name of a class, or any in the name of an attribute.
_NORMS = frozenset(
    "norm layernorm rmsnorm batchnorm groupnorm instancenorm normalization "
    "normalisation ln bn gn".split()
)
# Words in the names of arrays that shift or scale each feature.
_SHIFTS_AND_SCALES = frozenset(
    "bias biases scale scales gain gamma beta slope offset shift".split()
)
# Layers of Equinox and Haliax whose arrays, except biases, are matrices and kernels.
_LAYERS_OF_MATRICES = frozenset(
    "Linear Conv ConvTranspose Embedding GRUCell LSTMCell".split()
)


def decay_mask(
    *, exclude: Selectors = None, include: Selectors = None
) -> Callable[[PyTree], PyTree[bool]]:
    """A mask for weight decay: matrices, kernels of convolutions and embeddings decay;
    biases, and the weights and biases of norms, do not. Stacked layers, as made by
    `eqx.filter_vmap`, `flax.linen.scan` or `haliax.nn.Stacked`, are treated like single
    ones.

    The first of these rules that applies to an array decides:

    1. The arguments: an array that `exclude` selects does not decay, and one that
        `include` selects does.
    2. The type of its layer. Arrays of norms do not decay. A norm is any class whose
        name ends with `Norm`, such as `eqx.nn.LayerNorm`, or a subclass of one. In
        `Linear`, `Conv`, `ConvTranspose`, `Embedding`, `GRUCell` and `LSTMCell`, all
        arrays except biases decay. This holds for the layers of Equinox and Haliax,
        their subclasses, and other classes of these names.
    3. Its name, as in Flax or in dictionaries. A `kernel` decays. Arrays named `bias`,
        `scale`, `gamma`, `beta` or the like, or `b`, do not. Nor do arrays that are
        named like a norm (`norm`, `ln`, `bn`, ...), or lie in a subtree that is
        (`ln_1.weight`, `final_norm.w`).
    4. Its number of axes: an array with two or more decays. This is wrong for stacked
        vectors of a class of your own, if neither the class nor the name fits the rules
        above: rename them, or exclude them.

    ??? Example

        ```python
        optim = fq.adamw(1e-3, weight_decay=0.1, mask=fq.decay_mask())

        mask = fq.decay_mask(exclude=[eqx.nn.Embedding, "*.position"])
        ```

    **Arguments:**

    - `exclude`: the parts that do not decay. A pattern for dotted paths of leaves or
        subtrees (`"layers.0"`, `"*.norm.weight"`; `*` also stands for dots), a type
        (`eqx.nn.Embedding`), a function of an array (`lambda x: x.ndim < 2`), or a list
        of these.
    - `include`: the parts that decay, unless they are excluded.

    **Returns:**

    A function from a pytree of parameters to a pytree of booleans: the `mask` of
    optimizers of this library and of Optax. Leaves that are not floating-point arrays
    are `False`.

    **Raises:**

    `TypeError` if `exclude` or `include` has none of these forms. A module is an error
    too, because inside `jit` it is another object. The returned function raises
    `ValueError` if a selector selects nothing.
    """
    return _DecayMask(_as_tuple("exclude", exclude), _as_tuple("include", include))


def _as_tuple(argument: str, selectors: Selectors) -> tuple[Any, ...]:
    several = selectors if isinstance(selectors, (tuple, list)) else (selectors,)
    several = tuple(x for x in several if x is not None)
    Selection(_CALL, argument, several)
    for x in several:
        if isinstance(x, eqx.Module):
            raise TypeError(
                f"`{_CALL}({argument}=...)` got {shown(x)}, a module. Inside `jit` it "
                "is another object: pass its name or its type."
            )
    return several


class _Names(tuple[str, ...]):
    """The names on the path to a node. Indices in lists are left out."""

    @property
    def last(self) -> str:
        return self[-1] if self else ""

    @property
    def parent(self) -> str:
        return self[-2] if len(self) > 1 else ""


@dataclasses.dataclass(frozen=True)
class _DecayMask:
    exclude: tuple[Any, ...]
    include: tuple[Any, ...]

    def __repr__(self) -> str:
        given = {"exclude": self.exclude, "include": self.include}
        shown = (f"{name}={list(x)!r}" for name, x in given.items() if x)
        return f"{_CALL}({', '.join(shown)})"

    def __call__(self, params: PyTree) -> PyTree[bool]:
        exclude = Selection(_CALL, "exclude", self.exclude)
        include = Selection(_CALL, "include", self.include)

        def visit(
            path: tuple[Any, ...],
            node: Any,
            names: _Names,
            layer: type | None,
            chosen: bool | None,
        ) -> Any:
            if include.selects(path, node) and chosen is None:
                chosen = True
            if exclude.selects(path, node):
                chosen = False
            parts = children(node)
            if parts is None:
                if not is_array(node) or not jnp.issubdtype(node.dtype, jnp.inexact):
                    return False
                return _decays(layer, names, node) if chosen is None else chosen
            named, put_together = parts
            if _is_layer(node, named):
                layer = type(node)
            return put_together(
                [
                    visit(
                        (*path, key),
                        child,
                        names if _is_wrap(node) else _Names((*names, *_name(key))),
                        layer,
                        chosen,
                    )
                    for key, child in named
                ]
            )

        mask = visit((), params, _Names(), None, None)
        exclude.check_used(params)
        include.check_used(params)
        return mask


def _is_layer(node: Any, named: list[tuple[Any, Any]]) -> bool:
    """Whether a node has named attributes, unlike a container."""
    has_attributes = any(isinstance(key, jtu.GetAttrKey) for key, _ in named)
    return has_attributes and not _is_wrap(node)


def _is_wrap(node: Any) -> bool:
    """Whether a node only wraps its content: a `Float32Layer`, or a `Variable` or other
    box of Flax around an array."""
    return isinstance(node, Float32Layer) or is_variable(node) or hasattr(node, "unbox")


def _name(key: Any) -> tuple[str, ...]:
    name = key.name if isinstance(key, jtu.GetAttrKey) else getattr(key, "key", None)
    return (name,) if isinstance(name, str) else ()


def _decays(layer: type | None, names: _Names, array: Any) -> bool:
    classes = [] if layer is None else [x.__name__ for x in layer.__mro__]
    if any(_is_norm_class(name) for name in classes):
        return False
    if _shifts_or_scales(names.last):
        return False
    if not _LAYERS_OF_MATRICES.isdisjoint(classes) or names.last == "kernel":
        return True
    if not _NORMS.isdisjoint(_words(names.last) + _words(names.parent)):
        return False
    return array.ndim >= 2


def _is_norm_class(name: str) -> bool:
    # Single letters are suffixes, as in `BatchNorm2d`.
    words = [word for word in _words(name) if len(word) > 1]
    return bool(words) and words[-1] in _NORMS


def _shifts_or_scales(name: str) -> bool:
    words = _words(name)
    if not words:
        return False
    # `b` is a bias, but `B` is a matrix, as in low-rank adapters with `A` and `B`.
    return (
        (words[0] == "b" and name != "B")
        or words == ["g"]
        or any(x in _SHIFTS_AND_SCALES or x.endswith("bias") for x in words)
    )


def _words(name: str) -> list[str]:
    """The words in a name, in lower case: rms and norm in `RMSNorm_0`."""
    return [x.lower() for x in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
