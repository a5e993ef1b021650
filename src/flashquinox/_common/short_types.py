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


def short_type(annotation: Any, names: Mapping[str, Any]) -> ShortType:
    """`names` are those of the module in which the annotation was written."""
    return ShortType(annotation, _text(annotation, _names_of(names)))


def show_short_types(public: Iterable[Any]) -> None:
    """Gives functions, and classes, signatures with short types, for `help`.
    `typing.get_type_hints` has the whole ones.

    Methods stay as they are. `functools.wraps` copies what a function has, so that
    around a method of an instance it would bring along a signature with `self`: of
    `jax.vmap(optim.step)`, say.
    """
    names: dict[str, dict[Any, str]] = {}
    for item in public:
        module = getattr(item, "__module__", None) or ""
        if module.partition(".")[0] != __name__.partition(".")[0]:
            continue
        if module not in names:
            names[module] = _names_of(vars(sys.modules[module]))
        function = vars(item).get("__init__") if isinstance(item, type) else item
        if inspect.isfunction(function):
            _shorten(function, names[module])


def _shorten(function: Any, names: Mapping[Any, str]) -> None:
    if hasattr(function, "__signature__"):
        return
    try:
        declared = inspect.signature(function)
    except (TypeError, ValueError):
        return
    parameters = [
        x.replace(annotation=_shown(x.annotation, names))
        for x in declared.parameters.values()
    ]
    result = _shown(declared.return_annotation, names)
    function.__signature__ = declared.replace(
        parameters=parameters, return_annotation=result
    )


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
