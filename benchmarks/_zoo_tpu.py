"""What the compiler for TPUs makes of the step of a model."""

import math
import re
from typing import Any

import _tpu
from _contenders import JaxStep


HEADER = (
    f"{'':38}{'accessed':>9}{'temp':>7}{'in kernels':>20}{'fusions':>9}{'copies':>8}"
    f"{'compile':>9}"
)

_KERNEL = re.compile(r"= (.*?) custom-call\(.*tpu_custom_call")
_MOVED = re.compile(r"= \w+\[([\d,]*)\]\S* (?:copy|transpose)\(")
# Of copies and transpositions, those of smaller arrays are not counted.
_LEAST_MOVED = 2**14


def compile_step(step: JaxStep, chip: str) -> dict[str, Any]:
    """Of AdamW of this library, or of an optimizer without kernels."""
    structs = step.params, step.state, step.grads
    program = _tpu.compile_for(chip, step.step, *structs, donate=(0, 1))
    memory: Any = program.compiled.memory_analysis()
    text: str = program.compiled.as_text()
    # A kernel has one array of such integers for each leaf: its second moments.
    in_kernels = [
        _elements(x)
        for x in _KERNEL.findall(text)
        for x in re.findall(r"u8\[(.*?)\]", x)
    ]
    entry = text[text.index("\nENTRY ") :]
    return {
        "accessed bytes": program.compiled.cost_analysis()["bytes accessed"],
        "argument bytes": memory.argument_size_in_bytes,
        "temporary bytes": memory.temp_size_in_bytes,
        "aliased bytes": memory.alias_size_in_bytes,
        "leaves in kernels": len(in_kernels),
        "parameters in kernels": sum(in_kernels),
        "fusions": len(re.findall(r" fusion\(", entry)),
        "copies": sum(_elements(x) >= _LEAST_MOVED for x in _MOVED.findall(text)),
        "compile seconds": program.seconds,
    }


def _elements(shape: str) -> int:
    return math.prod(int(x) for x in shape.split(",") if x)


def line(row: dict[str, Any]) -> str:
    start = f"{row['model']:>15}  {row['chip']:6} {row['contender']:14}"
    if "error" in row:
        return start + row["error"]
    parameters = row["parameters"]
    kernels = f"{row['leaves in kernels']} of {row['leaves']}"
    return (
        f"{start}{row['accessed bytes'] / parameters:9.2f}"
        f"{row['temporary bytes'] / parameters:7.2f}{kernels:>12}"
        f"{row['parameters in kernels'] / parameters:8.2%}{row['fusions']:9}"
        f"{row['copies']:8}{row['compile seconds']:9.1f}"
    )
