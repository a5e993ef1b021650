"""Annotations as `help` shows them: by the names that they have in the source. Aliases
such as `ScalarLike` are unions, which Python writes out, several lines for each."""

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, final, Literal, Union


@final
class ShortType:
    """An annotation in a signature that is only shown."""

    def __init__(self, annotation: Any, text: str):
        self.annotation = annotation
        self.text = text

    def __repr__(self) -> str:
        return self.text


def short_types(
    signature: inspect.Signature, names: Mapping[str, Any]
) -> inspect.Signature:
    """`names` are those of the module in which the annotations were written."""
    known = _names_of(names)
    return signature.replace(
        parameters=[
            x.replace(annotation=_shown(x.annotation, known))
            for x in signature.parameters.values()
        ],
        return_annotation=_shown(signature.return_annotation, known),
    )


def show_short_types(public: Iterable[Any]) -> None:
    """Gives functions, and classes, signatures with short types, for `help`.
    `typing.get_type_hints` has the whole ones.

    Methods stay as they are. `functools.wraps` copies what a function has, so that
    around a method of an instance it would bring along a signature with `self`: of
    `jax.vmap(optim.step)`, say.
    """
    for item in public:
        module = getattr(item, "__module__", None) or ""
        if module.partition(".")[0] != __name__.partition(".")[0]:
            continue
        function = vars(item).get("__init__") if isinstance(item, type) else item
        # Factories have theirs.
        if inspect.isfunction(function) and not hasattr(function, "__signature__"):
            names = vars(sys.modules[module])
            function.__signature__ = short_types(inspect.signature(function), names)


def _shown(annotation: Any, names: Mapping[Any, str]) -> Any:
    if annotation is inspect.Signature.empty:
        return annotation
    return ShortType(annotation, _text(annotation, names))


def _names_of(names: Mapping[str, Any]) -> dict[Any, str]:
    """Types and their aliases, which have capitals, and their names."""
    found: dict[Any, str] = {}
    for name, value in names.items():
        if name[:1].isupper() and isinstance(value, typing.Hashable):
            found.setdefault(value, name)
    return found


def _text(annotation: Any, names: Mapping[Any, str]) -> str:
    if annotation is ...:
        return "..."
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, list):
        return f"[{', '.join(_text(x, names) for x in annotation)}]"
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    # What a literal may be says more than the name of its alias.
    if origin is Literal:
        return repr(annotation).removeprefix("typing.")
    has_literals = any(typing.get_origin(x) is Literal for x in members)
    if annotation in names and not has_literals:
        return names[annotation]
    if origin in (Union, types.UnionType) and type(None) in members:
        rest = tuple(x for x in members if x is not type(None))
        return f"{_text(Union[rest], names)} | None"  # noqa: UP007
    if origin in (Union, types.UnionType):
        return " | ".join(_text(x, names) for x in members)
    if annotation is type(None):
        return "None"
    if origin is not None and members:
        return f"{_text(origin, names)}[{', '.join(_text(x, names) for x in members)}]"
    # Those of jaxtyping have modules in their names.
    return re.sub(r"\b(\w+\.)+", "", getattr(annotation, "__name__", repr(annotation)))
