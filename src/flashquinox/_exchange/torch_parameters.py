"""What a checkpoint of PyTorch holds of each parameter."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from .._optimizer.state import OptimizerState
from .._rules.rule import MomentKind


class _TorchMoment(NamedTuple):
    name: str
    kind: MomentKind


# What PyTorch calls the moments.
TORCH_MOMENTS = {
    "mu": _TorchMoment("exp_avg", "signed"),
    "nu": _TorchMoment("exp_avg_sq", "nonnegative"),
    "trace": _TorchMoment("momentum_buffer", "signed"),
}


class TorchParameter(NamedTuple):
    """A parameter, and what the optimizer keeps for it.

    `entries` are its moments, error bits and `step`, by their names there.
    `master_bytes` is the `master_bytewidth` of its parameter group.
    """

    name: str
    weight: Shaped[np.ndarray, "..."]
    entries: Mapping[str, Any]
    master_bytes: int | None

    @property
    def text(self) -> str:
        return f"the parameter {self.name!r}"


def read_parameters(
    call: str, optimizer_state: Any, parameters: Any
) -> dict[str, TorchParameter]:
    """The parameters of a checkpoint, by their names."""
    try:
        entries = {int(number): x for number, x in optimizer_state["state"].items()}
        groups = list(optimizer_state["param_groups"])
        numbers = [int(number) for group in groups for number in group["params"]]
        names = [name for group in groups for name in group.get("param_names", ())]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TypeError(
            f"`{call}`: `optimizer_state` is not the `state_dict()` of an optimizer: a "
            "dictionary with 'state', by the numbers of parameters, and 'param_groups',"
            " each with 'params', a list of numbers."
        ) from error
    names = names or list(parameters)
    if len(names) != len(numbers):
        raise ValueError(
            f"`{call}`: the optimizer has {len(numbers)} parameters, but `parameters` "
            f"{len(names)}. Pass those of `model.named_parameters()`, without buffers, "
            "in the order that the optimizer has them."
        )
    read = {}
    of_number = {int(number): group for group in groups for number in group["params"]}
    for number, name in zip(numbers, names, strict=True):
        if name not in parameters or number not in entries:
            where = "parameters" if name not in parameters else "optimizer_state"
            raise ValueError(
                f"`{call}`: `{where}` has nothing for the parameter {name!r}, number "
                f"{number} of the optimizer. Pass all of a checkpoint in which every "
                "parameter has been trained."
            )
        weight = float_array(call, f"the parameter {name!r}", parameters[name])
        width = of_number[number].get("master_bytewidth")
        read[name] = TorchParameter(
            name, weight, entries[number], None if width is None else int(width)
        )
    return read


def some_names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")


def check_entries(call: str, parameter: TorchParameter, state: OptimizerState) -> None:
    wanted = [TORCH_MOMENTS[key].name for key in state.moments]
    known = {"step", "error_bits", *wanted}
    # A PyTorch optimizer may have `None` for a moment that it does not keep.
    found = {k.split("::")[0] for k, x in parameter.entries.items() if x is not None}
    for name in [*(found - known), *(set(wanted) - found)]:
        has, lacks = "the checkpoint", "the state"
        if name in wanted:
            has, lacks = lacks, has
        raise ValueError(
            f"`{call}`: for {parameter.text}, {has} has {name!r}, and {lacks} does not "
            f"({some_names(sorted(found))} and {some_names(wanted)}). Pass a state of "
            "the same optimizer."
        )


def step_count(
    call: str, read: dict[str, TorchParameter], state: OptimizerState
) -> Any:
    steps = {
        int(np.asarray(x.entries["step"]).item())
        for x in read.values()
        if "step" in x.entries
    }
    if len(steps) > 1:
        raise ValueError(
            f"`{call}`: parameters have taken different numbers of steps, "
            f"{sorted(steps)}, of which a state here can keep one. Set every 'step' of "
            "`optimizer_state` to the same."
        )
    return steps.pop() if steps else state.count


def float_array(call: str, where: str, x: Any) -> Float[np.ndarray, "..."]:
    x = np.asarray(x)
    if x.dtype == np.uint16:
        x = x.view(jnp.bfloat16)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{call}`: {where} is {x.dtype}. Pass an array of bfloat16 (or its bits "
            "as uint16), float16 or float32."
        )
    return x
