"""How the arrays of a state may be stored: what the caller says of them, and what is
known of Optax's."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args

import jax.tree_util as jtu
from jaxtyping import PyTree

from .._common.text import shown
from .optax_kinds import KINDS, StateKind


def check_kinds(call: str, kinds: Any) -> Mapping[str, StateKind]:
    if not isinstance(kinds, Mapping | None):
        raise TypeError(
            f"`{call}(kinds=...)` takes a dictionary from the name of a field of the "
            f"state to its kind, such as {{'mu': 'signed'}}; got {shown(kinds)}."
        )
    for name, kind in (kinds or {}).items():
        if kind not in get_args(StateKind):
            raise ValueError(
                f"`{call}(kinds=...)` must be 'signed', 'nonnegative' or 'exact'; got "
                f"{shown(kind)} for {name!r}."
            )
    return dict(kinds or {})


def kinds_of(
    call: str, given: Mapping[str, StateKind], state: PyTree
) -> list[tuple[tuple[Any, ...], StateKind | None]]:
    """The path and the kind of each leaf of a state, in order."""
    used: set[str] = set()

    def told(names: Iterable[str]) -> StateKind | None:
        found = [name for name in names if name in given]
        used.update(found[:1])
        return given[found[0]] if found else None

    found = [*_kinds(told, state, (), None)]
    unused = [name for name in given if name not in used]
    if unused:
        parts = list(dict.fromkeys(jtu.keystr(path[:2]) for path, _ in found))
        raise ValueError(
            f"`{call}(kinds=...)`: {', '.join(map(repr, unused))} has no effect: "
            "nothing in the state is called so, or what is around it has a kind "
            f"already. The state has {shown(parts)}. Pass names of fields or keys, a "
            "class and a field such as 'ScaleByAdamState.mu', or paths."
        )
    return found


def _kinds(
    told: Callable[[Iterable[str]], StateKind | None],
    node: Any,
    path: tuple[Any, ...],
    kind: StateKind | None,
) -> Iterator[tuple[tuple[Any, ...], StateKind | None]]:
    """Of the leaves below a node. `kind`: that of all around it. Within, it is only
    changed by paths: the weights below a field may have the names of other fields."""
    of_class = type(node).__name__
    below, _ = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    is_leaf = [key for key, _ in below] == [()]
    # What the caller tells comes before what is known of Optax.
    kind = told([jtu.keystr(path)]) or kind
    if not is_leaf:
        kind = kind or told([of_class]) or KINDS.get(of_class)
    for key, child in below:
        if is_leaf:
            yield path, kind
            continue
        of_child, name = kind, getattr(key[0], "name", getattr(key[0], "key", None))
        if kind is None and isinstance(name, str):
            full = f"{of_class}.{name}"
            of_child = told([full, name]) or KINDS.get(full)
        yield from _kinds(told, child, (*path, *key), of_child)
