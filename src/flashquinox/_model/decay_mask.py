"""Which weights decay, by what they are and by their names.

Counting axes cannot tell: the bias of stacked layers has two, as has a matrix, and a
convolution's kernel has three or more. But a layer knows what its arrays are for, and
so do the names that layers without a type give to theirs.
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

# The last word in the name of a class, or one in the name of an attribute.
_NORMS = frozenset(
    "norm layernorm rmsnorm batchnorm groupnorm instancenorm normalization "
    "normalisation ln bn gn".split()
)
# Of arrays that shift or scale each feature.
_SHIFTS_AND_SCALES = frozenset(
    "bias biases scale scales gain gamma beta slope offset shift".split()
)
# Layers of Equinox and Haliax whose arrays are matrices and kernels, but for biases.
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

    An array is judged by the first of these that applies:

    1. What `exclude` chooses does not decay; what `include` chooses does.
    2. The layer that it is in. No array of a norm decays: of any class whose name ends
        with `Norm`, such as `eqx.nn.LayerNorm`, or a subclass of one. Of `Linear`,
        `Conv`, `ConvTranspose`, `Embedding`, `GRUCell` and `LSTMCell`, all but the
        biases decay. Layers are those of Equinox and Haliax, their subclasses, and
        others of the same name.
    3. Its name, as in Flax or in dictionaries. A `kernel` decays. What is called
        `bias`, `scale`, `gamma`, `beta` or the like, or `b`, does not; nor what is
        called a norm (`norm`, `ln`, `bn`, ...), or lies in something that is
        (`ln_1.weight`, `final_norm.w`).
    4. Its axes: with two or more it decays. This is a guess, which is wrong for a
        vector of a class of your own in a stack of them, if neither its class nor its
        name says what it is: give it a name that does, or exclude it.

    ??? Example

        ```python
        optim = fq.adamw(1e-3, weight_decay=0.1, mask=fq.decay_mask())

        mask = fq.decay_mask(exclude=[eqx.nn.Embedding, "*.position"])
        ```

    **Arguments:**

    - `exclude`: what does not decay. A pattern for dotted paths of leaves or subtrees
        (`"layers.0"`, `"*.norm.weight"`; `*` also stands for dots), a type
        (`eqx.nn.Embedding`), a function of an array (`lambda x: x.ndim < 2`), or a list
        of these.
    - `include`: what does, unless it is excluded.

    **Returns:**

    A function from a pytree of parameters to one of booleans, which optimizers of this
    library and of Optax take as their `mask`. Leaves that are not floating-point arrays
    are `False`.

    **Raises:**

    `TypeError` for other things in `exclude` or `include`, also for modules: inside
    `jit`, a module is another object. The function raises `ValueError` if one of them
    chooses nothing.
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
    """The names on the way to a node, without numbers."""

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
    """Whether a node has attributes of its own, as containers have none."""
    has_attributes = any(isinstance(key, jtu.GetAttrKey) for key, _ in named)
    return has_attributes and not _is_wrap(node)


def _is_wrap(node: Any) -> bool:
    """Whether a node stands for what is in it: a widened layer, or an array that Flax
    has put in a `Variable` or another box."""
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
    # Without what follows, as in `BatchNorm2d`.
    words = [word for word in _words(name) if len(word) > 1]
    return bool(words) and words[-1] in _NORMS


def _shifts_or_scales(name: str) -> bool:
    words = _words(name)
    if not words:
        return False
    # But for `B`, which is a matrix beside another one called `A`.
    return (
        (words[0] == "b" and name != "B")
        or words == ["g"]
        or any(x in _SHIFTS_AND_SCALES or x.endswith("bias") for x in words)
    )


def _words(name: str) -> list[str]:
    """Of `RMSNorm_0`: rms, norm."""
    return [x.lower() for x in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
