"""Checkpoints of FlashOptim, the paper's PyTorch library, and of `torch.optim`, as
arrays of NumPy."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._common.dtypes import compute_dtype
from .._model.trained import with_state
from .._model.trees import dotted_name, flatten, match, Model, State
from .._optimizer.master_weights import from_master_weights
from .._optimizer.state import StepCount
from .._optimizer.states import only
from .._storage.moment_bases import bases_first
from .optax_counts import as_count
from .torch_arrays import Convert, master_weight, stored_moment
from .torch_parameters import (
    check_entries,
    read_parameters,
    some_names,
    step_count,
    TORCH_MOMENTS,
)


def from_flashoptim(
    optimizer_state: Mapping[str, Any],
    parameters: Mapping[str, Any],
    model: Model,
    state: State,
    *,
    paths: Mapping[str, str] | None = None,
    convert: Convert | None = None,
) -> tuple[Model, State]:
    r"""Resumes a run of FlashOptim, the PyTorch library: fills weights, corrections,
    moments and count from a checkpoint of `FlashAdamW`, `FlashAdam`, `FlashLion`,
    `FlashSGD` or `FlashSGDW`. The states of `torch.optim` have the same form. PyTorch
    is not needed.

    | moments of `state` | come from |
    | --- | --- |
    | `mu` | `exp_avg` |
    | `nu` | `exp_avg_sq` |
    | `trace` | `momentum_buffer` |

    Compressed moments are copied bit for bit if `state` stores them in FlashOptim's
    format. Otherwise they are decoded, and stored as `state` stores them, rounded to
    nearest.

    With `error_bits` $e$ of $b = 8$ or 16 bits, the master weight is

    $$\text{master} = \text{weight} + \frac{e}{2^{b-1} - 1} \cdot \frac12
    \operatorname{ulp}(\text{weight})$$

    rounded to float32. It is split into weight and correction as by
    [`flashquinox.from_master_weights`][]: exactly with `int16` corrections, rounded to
    24 bits with `int8` corrections.

    **Arguments:**

    - `optimizer_state`: the `state_dict()` of the optimizer, with a NumPy array or a
        number in place of every tensor: `{"state": {0: {"exp_avg::quantized": ...,
        "exp_avg::scales": ..., "error_bits": ..., ...}, ...}, "param_groups": [...]}`.
        A bfloat16 tensor may come as `ml_dtypes.bfloat16` or as its bits in `uint16`.
    - `parameters`: `dict(model.named_parameters())` of the PyTorch model, with NumPy
        arrays likewise, in the order of the optimizer. If the groups of
        `optimizer_state` have `param_names`, the order does not matter, and there may
        be other parameters.
    - `model`: a model to fill. Its leaves decide the dtypes and devices of the weights.
    - `state`: its state, as `init` made it, or a state of an Optax wrapper with one
        inside. It decides how moments are stored, and on which devices.
    - `paths`: for each name in `parameters`, the dotted path of a leaf of `model`, such
        as `layers.0.weight`. By default, they are matched in order.
    - `convert`: called as `convert(name, array)` with the float32 master weight and the
        moments of each parameter. It returns the array in the layout of `model`, such
        as `array.T`, or the array itself. By default, layouts are the same: the
        matrices of `torch.nn.Linear` and of `equinox.nn.Linear` are both (out, in).

    **Returns:**

    A 2-tuple of the new model and the new state. The count is the `step` of the
    checkpoint. If that has none, as for Lion and SGD, the count of `state` stays (set
    it with `optax.tree.set(state, count=...)`).

    **Raises:**

    `ValueError` or `TypeError` if an array is missing, is not expected, or has another
    shape or dtype. The message names the parameter and the leaf.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).
    """
    call = "from_flashoptim"
    own, replace = only(call, state)
    unknown = set(own.moments) - set(TORCH_MOMENTS)
    if unknown:
        raise ValueError(
            f"`{call}`: the state has the moments {sorted(own.moments)}, of which "
            f"FlashOptim has no {sorted(unknown)}. Pass the state of `adamw`, `adam`, "
            "`lion`, `sgd` or `sgdw`."
        )
    leaves, rebuild = flatten(model)
    stored = {
        name: match(call, f"state.moments[{name!r}]", of_name, leaves)
        for name, of_name in own.moments.items()
    }
    corrections = match(call, "state.corrections", own.corrections, leaves)
    trained = with_state(leaves, stored, corrections)
    indices = {
        dotted_name(leaf.path): index
        for index, leaf in enumerate(leaves)
        if trained[index]
    }
    read = read_parameters(call, optimizer_state, parameters)
    masters: list[Any] = [None for _ in leaves]
    new_moments = {name: list(moments) for name, moments in stored.items()}
    for path, name in _pairs(call, list(indices), list(read), paths).items():
        index = indices[path]
        leaf, parameter = leaves[index], read[name]
        master = master_weight(call, parameter)
        converted = master if convert is None else np.asarray(convert(name, master))
        if converted.shape != leaf.value.shape:
            raise ValueError(
                f"`{call}`: {parameter.text} has shape {converted.shape}, the weight "
                f"at `{leaf.name}` {leaf.value.shape}. Match them with `paths=...`, or "
                "give it that shape with `convert=...`."
            )
        masters[index] = converted.astype(compute_dtype(leaf.value.dtype))
        check_entries(call, parameter, own)
        for key in bases_first(own.moments):
            like = stored[key][index]
            relative_to = getattr(like, "relative_to", None)
            base = None if relative_to is None else new_moments[relative_to]
            new_moments[key][index] = stored_moment(
                call,
                parameter,
                key,
                leaf,
                like,
                None if base is None else base[index],
                None if converted is master else convert,
            )
    filled = dataclasses.replace(
        own,
        steps=StepCount(as_count(call, step_count(call, read, own), own.count)),
        moments={key: rebuild(moments) for key, moments in new_moments.items()},
    )
    return from_master_weights(rebuild(masters), model, replace(filled))


def _pairs(
    call: str, leaves: list[str], names: list[str], paths: Mapping[str, str] | None
) -> dict[str, str]:
    """For each leaf, by its dotted path, the name of its parameter."""
    if paths is None:
        if len(leaves) != len(names):
            raise ValueError(
                f"`{call}`: the model has {len(leaves)} weights "
                f"({some_names(leaves)}), the checkpoint {len(names)} parameters "
                f"({some_names(names)}). Pass a model of the same weights."
            )
        return dict(zip(leaves, names, strict=True))
    for what, given, known in (
        ("name", paths.keys(), names),
        ("path", paths.values(), leaves),
    ):
        given, wrong = list(given), set(given).symmetric_difference(known)
        if wrong or len(given) > len(known):
            twice = [name for name in given if given.count(name) > 1]
            raise ValueError(
                f"`{call}(paths=...)` must have every {what} once, of "
                f"{some_names(known)}; missing, unknown or twice: "
                f"{some_names(sorted(wrong) or twice)}."
            )
    return {path: name for name, path in paths.items()}
