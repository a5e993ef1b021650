"""Operations of traced functions as expressions of C++."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from ..._common.arithmetic import (
    accurate_quotient,
    byte_times,
    canonical_pattern,
    nearest_int8,
    nearest_uint8,
    Replaceable,
    rounded_quotient,
    rounded_root,
)
from ..base import Unsupported
from .types import (
    converted,
    is_float,
    narrowed,
    Operand,
    type_of,
    widened,
)


class Call(NamedTuple):
    """An operation with its parameters, and the dtype of its result."""

    name: str
    params: Mapping[str, Any]
    operands: Sequence[Operand]
    dtype: Any

    @property
    def texts(self) -> list[str]:
        return [x.text for x in self.operands]

    @property
    def is_uniform(self) -> bool:
        return all(x.is_uniform for x in self.operands)


# What gives the expression of an operation.
Rule: TypeAlias = Callable[[Call], str]


def expression(primitive: Any, call: Call) -> str:
    """The result of an operation on single elements."""
    function = Replaceable.of(primitive)
    rule = _REPLACED.get(function) if function else _RULES.get(call.name)
    if rule is None:
        raise Unsupported(f"the operation `{call.name}`")
    return rule(call)


def _of_floats(template: str) -> Rule:
    """Of floats alone, computed in float."""

    def rule(call: Call) -> str:
        if not is_float(call.operands[0].dtype):
            raise Unsupported(f"`{call.name}` of {call.operands[0].dtype}")
        texts = [widened(x) for x in call.operands]
        return narrowed(template.format(*texts), call.dtype)

    return rule


def _of_numbers(of_floats: str, of_integers: str | None = None) -> Rule:
    """Of floats, in float; of integers, which wrap around, in their own type."""
    compute = _of_floats(of_floats)

    def rule(call: Call) -> str:
        if is_float(call.operands[0].dtype):
            return compute(call)
        to = type_of(call.dtype)
        # Signed ones must not overflow.
        texts = [f"(unsigned){x}" if to == "int" else x for x in call.texts]
        return f"({to})({(of_integers or of_floats).format(*texts)})"

    return rule


def _comparison(operator: str) -> Rule:
    def rule(call: Call) -> str:
        x, y = map(widened, call.operands)
        return f"({x} {operator} {y})"

    return rule


def _bitwise(operator: str) -> Rule:
    return lambda call: f"({type_of(call.dtype)})({f' {operator} '.join(call.texts)})"


def _extreme(name: str) -> Rule:
    def rule(call: Call) -> str:
        x, y = map(widened, call.operands)
        if call.dtype == jnp.bool_:
            return f"({x} {'|' if name == 'maximum' else '&'} {y})"
        return narrowed(f"{name}({x}, {y})", call.dtype)

    return rule


def _shift(name: str, unsigned: bool = True) -> Rule:
    def rule(call: Call) -> str:
        x, y = call.operands
        to, bits = type_of(x.dtype), 8 * jnp.dtype(x.dtype).itemsize
        wide = "unsigned" if unsigned else "int"
        value = x.text
        if unsigned and bits < 32:
            # Without copies of the sign above it.
            value = f"({value} & {2**bits - 1:#x})"
        return f"({to}){name}(({wide})({value}), (unsigned){y.text})"

    return rule


def _divide(call: Call) -> str:
    x, y = call.operands
    if not is_float(x.dtype):
        return f"integer_quotient({x.text}, {y.text})"
    # Of numbers that all elements share, for the cost of nothing.
    function = "rounded_quotient" if call.is_uniform else "quotient"
    return narrowed(f"{function}({widened(x)}, {widened(y)})", call.dtype)


def _take_root(call: Call) -> str:
    (x,) = map(widened, call.operands)
    function = "rounded_root" if call.is_uniform else "square_root"
    return narrowed(f"{function}({x})", call.dtype)


def _absolute(call: Call) -> str:
    (x,) = call.operands
    if is_float(x.dtype):
        return narrowed(f"fabsf({widened(x)})", call.dtype)
    return f"({type_of(call.dtype)})({x.text} < 0 ? 0u - {x.text} : {x.text})"


def _sign(call: Call) -> str:
    (x,) = call.operands
    if is_float(x.dtype):
        return narrowed(f"sign({widened(x)})", call.dtype)
    return f"({type_of(call.dtype)})(({x.text} > 0) - ({x.text} < 0))"


def _not(call: Call) -> str:
    (x,) = call.operands
    return f"!{x.text}" if x.dtype == jnp.bool_ else f"({type_of(x.dtype)})~{x.text}"


def _select(call: Call) -> str:
    which, *cases = call.operands
    if which.dtype == jnp.bool_:
        return f"({which.text} ? {cases[1].text} : {cases[0].text})"
    text = cases[-1].text
    for i in reversed(range(len(cases) - 1)):
        text = f"({which.text} <= {i} ? {cases[i].text} : {text})"
    return text


def _clamp(call: Call) -> str:
    low, x, high = map(widened, call.operands)
    return narrowed(f"minimum(maximum({x}, {low}), {high})", call.dtype)


def _integer_power(call: Call) -> str:
    (x,) = map(widened, call.operands)
    return narrowed(f"power<{call.params['y']}>({x})", call.dtype)


def _round(call: Call) -> str:
    (x,) = map(widened, call.operands)
    # 0 is away from zero, 1 to even.
    function = "rintf" if int(call.params["rounding_method"]) == 1 else "roundf"
    return narrowed(f"{function}({x})", call.dtype)


def _nearest(call: Call) -> str:
    (x,) = call.operands
    rounded = Operand(f"rintf({widened(x)})", jnp.dtype(jnp.float32), x.is_uniform)
    return converted(rounded, call.dtype)


def _remainder(call: Call) -> str:
    x, y = call.operands
    if is_float(x.dtype):
        return narrowed(f"fmodf({widened(x)}, {widened(y)})", call.dtype)
    return f"integer_remainder({x.text}, {y.text})"


def _polynomial(call: Call) -> str:
    """By Horner's rule. The coefficient of the highest power is the last one."""
    x, *coefficients = map(widened, call.operands)
    text = coefficients.pop()
    for coefficient in reversed(coefficients):
        text = f"({text} * {x} + {coefficient})"
    return narrowed(text, call.dtype)


def _same(call: Call) -> str:
    return call.texts[0]


_RULES: dict[str, Rule] = {
    "add": _of_numbers("({} + {})"),
    "add_any": _of_numbers("({} + {})"),
    "sub": _of_numbers("({} - {})"),
    "mul": _of_numbers("({} * {})"),
    "neg": _of_numbers("(-{})", "0u - {}"),
    "square": _of_numbers("({0} * {0})"),
    "div": _divide,
    "rem": _remainder,
    "sqrt": _take_root,
    "abs": _absolute,
    "sign": _sign,
    "not": _not,
    "and": _bitwise("&"),
    "or": _bitwise("|"),
    "xor": _bitwise("^"),
    "shift_left": _shift("shifted_left"),
    "shift_right_logical": _shift("shifted_right"),
    "shift_right_arithmetic": _shift("shifted_right_signed", unsigned=False),
    "eq": _comparison("=="),
    "ne": _comparison("!="),
    "lt": _comparison("<"),
    "le": _comparison("<="),
    "gt": _comparison(">"),
    "ge": _comparison(">="),
    "max": _extreme("maximum"),
    "min": _extreme("minimum"),
    "clamp": _clamp,
    "select_n": _select,
    "integer_pow": _integer_power,
    "round": _round,
    "is_finite": lambda call: f"(fabsf({widened(call.operands[0])}) <= FLT_MAX)",
    "convert_element_type": lambda call: converted(call.operands[0], call.dtype),
    "bitcast_convert_type": lambda call: (
        f"bit_cast<{type_of(call.dtype)}>({call.texts[0]})"
    ),
    "copy": _same,
    "copy_p": _same,
    "stop_gradient": _same,
    "polynomial": _polynomial,
    "one_minus_square": _of_floats("((1.0f + {0}) * (1.0f - {0}))"),
    "pow": _of_floats("powf({}, {})"),
    "atan2": _of_floats("atan2f({}, {})"),
    "nextafter": _of_floats("nextafterf({}, {})"),
    "logistic": _of_floats("(1.0f / (1.0f + expf(-{})))"),
    **{
        name: _of_floats(f"{function}({{}})")
        for name, function in {
            "ceil": "ceilf",
            "floor": "floorf",
            "exp": "expf",
            "exp2": "exp2f",
            "expm1": "expm1f",
            "log": "logf",
            "log1p": "log1pf",
            "log2": "log2f",
            "rsqrt": "rsqrtf",
            "cbrt": "cbrtf",
            "sin": "sinf",
            "cos": "cosf",
            "tan": "tanf",
            "asin": "asinf",
            "acos": "acosf",
            "atan": "atanf",
            "sinh": "sinhf",
            "cosh": "coshf",
            "tanh": "tanhf",
            "asinh": "asinhf",
            "acosh": "acoshf",
            "atanh": "atanhf",
            "erf": "erff",
            "erfc": "erfcf",
            "erf_inv": "erfinvf",
            "lgamma": "lgammaf",
        }.items()
    },
}

_REPLACED: dict[Replaceable, Rule] = {
    byte_times: lambda call: f"((int){call.texts[0]} * {call.texts[1]})",
    canonical_pattern: _of_floats("canonical_pattern({})"),
    nearest_int8: _nearest,
    nearest_uint8: _nearest,
    rounded_quotient: _of_floats("rounded_quotient({}, {})"),
    accurate_quotient: _of_floats("accurate_quotient({}, {})"),
    rounded_root: _of_floats("rounded_root({})"),
}
