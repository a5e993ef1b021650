"""What the compiler for TPUs makes of the step of a model."""

import re
from typing import Any

import _tpu
from _contenders import JaxStep


HEADER = (
    f"{'':38}{'accessed':>9}{'temp':>7}{'in kernels':>20}{'fusions':>9}{'copies':>8}"
    f"{'compile':>9}"
)

_INTEGERS = re.compile(r"u8\[([\d,]*)\]")
# Of copies and transpositions, those of smaller arrays are not counted.
_LEAST_MOVED = 2**14


def compile_step(step: JaxStep, chip: str) -> dict[str, Any]:
    """Of AdamW of this library, or of an optimizer without kernels."""
    structs = step.params, step.state, step.grads
    program = _tpu.compile_for(chip, step.step, *structs, donate=(0, 1))
    memory: Any = program.compiled.memory_analysis()
    text: str = program.compiled.as_text()
    lines = text.splitlines()
    # A kernel has one array of such integers for each leaf: its second moments.
    in_kernels = [
        _tpu.elements(shape)
        for line in lines
        if 'custom_call_target="tpu_custom_call"' in line
        for shape in _INTEGERS.findall(line.partition(" custom-call(")[0])
    ]
    entry = text[text.index("\nENTRY ") :]
    return {
        "accessed bytes": program.compiled.cost_analysis()["bytes accessed"],
        "argument bytes": memory.argument_size_in_bytes,
        "temporary bytes": memory.temp_size_in_bytes,
        "aliased bytes": memory.alias_size_in_bytes,
        "leaves in kernels": len(in_kernels),
        "parameters in kernels": sum(in_kernels),
        "fusions": entry.count(" fusion("),
        "copies": len(_tpu.moved(text, _LEAST_MOVED)),
        "compile seconds": program.seconds,
    }


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
