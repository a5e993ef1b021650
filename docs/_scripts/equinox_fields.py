"""A Griffe extension: Equinox modules are dataclasses, so show their fields as the
signature of their constructor."""

from typing import Any

import griffe


class EquinoxFields(griffe.Extension):
    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        del kwargs
        fields = [
            attribute
            for attribute in cls.attributes.values()
            if attribute.annotation is not None and "property" not in attribute.labels
        ]
        if "__init__" in cls.members or not fields:
            return
        parameters = [
            griffe.Parameter(
                attribute.name,
                annotation=attribute.annotation,
                kind=griffe.ParameterKind.positional_or_keyword,
                default=_default(attribute.value),
            )
            for attribute in fields
        ]
        cls.set_member(
            "__init__",
            griffe.Function(
                "__init__",
                parameters=griffe.Parameters(griffe.Parameter("self"), *parameters),
            ),
        )


def _default(value: Any) -> Any:
    """The default of a field: of `x: int = 1`, or of `eqx.field(default=1)`."""
    if not isinstance(value, griffe.ExprCall):
        return value
    for argument in value.arguments:
        if isinstance(argument, griffe.ExprKeyword) and argument.name == "default":
            return argument.value
    return None
