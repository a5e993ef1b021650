"""Instructions of NVIDIA's GPUs, in PTX, where Triton has none or several for them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32, Shaped

from ..interpreter.arithmetic import Arithmetic


def _per_element(
    name: str, *args: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """An instruction on float32."""
    operands = ", ".join([f"${i}" for i in range(len(args) + 1)])
    return _assembly(f"{name} {operands};", args, jnp.float32, 1)


def _assembly(
    code: str, args: Sequence[Shaped[Array, "*shape"]], dtype: DTypeLike, pack: int
) -> Shaped[Array, "*shape"]:
    """PTX that makes `pack` neighbouring results of as many arguments. As many of them
    share a register as fit into one."""
    out = jax.ShapeDtypeStruct(args[0].shape, dtype)
    registers = [
        prefix + ("f" if x.dtype == jnp.float32 else "r")
        for prefix, x in [("=", out), *[("", x) for x in args]]
        for _ in range(pack * x.dtype.itemsize // 4)
    ]
    (result,) = plt.elementwise_inline_asm(
        code,
        args=args,
        constraints=",".join(registers),
        pack=pack,
        result_shape_dtypes=[out],
    )
    return result


def _reciprocal(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    # Its error is at most one unit in the last place (PTX ISA, "rcp").
    return _per_element("rcp.approx.ftz.f32", x)


def _square_root(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    # Its relative error is at most 2^-23 (PTX ISA, "sqrt").
    return _per_element("sqrt.approx.ftz.f32", x)


def _rounded_quotient(
    x: Float32[Array, "*shape"], y: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    return _per_element("div.rn.f32", x, y)


def _rounded_root(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return _per_element("sqrt.rn.f32", x)


def _round(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return _per_element("cvt.rni.f32.f32", x)


def _multiply_add(
    x: Float32[Array, "*shape"],
    y: Float32[Array, "*shape"],
    z: Float32[Array, "*shape"],
) -> Float32[Array, "*shape"]:
    return _per_element("fma.rn.f32", x, y, z)


def _widen(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"] | None:
    """One instruction for an element, of those that share a register."""
    name = str(x.dtype)
    if name not in _WIDENING:
        return None
    dtype, code = _WIDENING[name]
    return _assembly(code, [x], dtype, 4 // x.dtype.itemsize)


def _byte_of(
    x: Int32[Array, "*shape"], index: int, dtype: DTypeLike
) -> Shaped[Array, "*shape"]:
    both = 0x40 + 0x11 * index
    code = (
        "{.reg .b32 low, high; "
        f"prmt.b32 low, $1, $2, {both:#x}; prmt.b32 high, $3, $4, {both:#x}; "
        "prmt.b32 $0, low, high, 0x5410;}"
    )
    return _assembly(code, [x], dtype, 4)


def _canonical_pattern(x: Float32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    # Arithmetic gives no other NaN than 0x7fffffff.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.minimum(bits, jnp.int32(0x7FC0_0000))


def _permute(selectors: Sequence[int], second: str = "0") -> str:
    """Every result is of four bytes out of those of the register (0 to 3) and of a
    constant (4 to 7); or, 8 more, of their signs."""
    source = f"${len(selectors)}"
    return " ".join(
        f"prmt.b32 ${i}, {source}, {second}, {selector:#x};"
        for i, selector in enumerate(selectors)
    )


_WIDENING = {
    "int8": (jnp.int32, _permute([0x8880, 0x9991, 0xAAA2, 0xBBB3])),
    "uint8": (jnp.int32, _permute([0x4440, 0x4441, 0x4442, 0x4443])),
    "int16": (jnp.int32, _permute([0x9910, 0xBB32])),
    "uint16": (jnp.int32, _permute([0x4410, 0x4432])),
    "bfloat16": (jnp.float32, "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"),
}


ARITHMETIC = Arithmetic(
    reciprocal=_reciprocal,
    square_root=_square_root,
    rounded_quotient=_rounded_quotient,
    rounded_root=_rounded_root,
    round=_round,
    multiply_add=_multiply_add,
    widen=_widen,
    byte_of=_byte_of,
    canonical_pattern=_canonical_pattern,
)
