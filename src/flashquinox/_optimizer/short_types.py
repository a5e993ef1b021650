"""Annotations as `help` shows them: by the names that they have in the source. Aliases
such as `ScalarLike` are unions, which Python writes out, several lines for each."""

import types
import typing
from collections.abc import Mapping
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
    return ShortType(annotation, _text(annotation, names))


def _text(annotation: Any, names: Mapping[str, Any]) -> str:
    # What a literal may be says more than the name of its alias.
    if typing.get_origin(annotation) is Literal:
        return repr(annotation).removeprefix("typing.")
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else ()
    if type(None) in members:
        rest = tuple(x for x in members if x is not type(None))
        return f"{_text(Union[rest], names)} | None"  # noqa: UP007
    if name := _name(annotation, names):
        return name
    if is_union:
        return " | ".join(_text(x, names) for x in members)
    return getattr(annotation, "__name__", repr(annotation))


def _name(annotation: Any, names: Mapping[str, Any]) -> str | None:
    """Types and their aliases have capitals."""
    for name, value in names.items():
        if name[:1].isupper() and value == annotation:
            return name
    return None
