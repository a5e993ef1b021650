"""Checkpoints of FlashOptim, the paper's PyTorch library, and of `torch.optim`, as
arrays of NumPy."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Shaped

from .._common.dtypes import compute_dtype, NARROW_DTYPES
from .._model.trained import with_state
from .._model.trees import dotted_name, flatten, Leaf, match, Model, State
from .._optimizer.master_weights import from_master_weights
from .._optimizer.state import OptimizerState, StepCount
from .._optimizer.states import only
from .._rules.rule import MomentKind
from .._storage import moment_values as exchanged
from .._storage.codec import QuantMoment, StoredMoment
from .._storage.flashoptim import FlashOptimCodec
from .._storage.layout import Layout
from .of_optax import as_count


Convert = Callable[[str, np.ndarray], np.ndarray]


class _TorchMoment(NamedTuple):
    name: str
    kind: MomentKind


_MOMENTS = {
    "mu": _TorchMoment("exp_avg", "signed"),
    "nu": _TorchMoment("exp_avg_sq", "nonnegative"),
    "trace": _TorchMoment("momentum_buffer", "signed"),
}
_GROUP_SIZE = 32


def from_flashoptim(
    optimizer_state: Mapping[str, Any],
    parameters: Mapping[str, Any],
    model: Model,
    state: State,
    *,
    paths: Mapping[str, str] | None = None,
    convert: Convert | None = None,
) -> tuple[Model, State]:
    r"""Weights, corrections, moments and count from a checkpoint of FlashOptim, the
    PyTorch library: to go on with a run of `FlashAdamW`, `FlashAdam`, `FlashLion`,
    `FlashSGD` or `FlashSGDW`. The states of `torch.optim` have the same form. PyTorch
    is not needed.

    | moments of `state` | come from |
    | --- | --- |
    | `mu` | `exp_avg` |
    | `nu` | `exp_avg_sq` |
    | `trace` | `momentum_buffer` |

    Compressed moments go over bit by bit if `state` was made with
    `moments="flashoptim"`; otherwise they are decoded, and stored as `state` stores
    them, rounded to nearest.

    `error_bits` $e$, of $b = 8$ or 16 bits, stand for

    $$\text{master} = \text{weight} + \frac{e}{2^{b-1} - 1} \cdot \frac12
    \operatorname{ulp}(\text{weight})$$

    which is rounded to float32, and goes to weights and corrections as in
    [`flashquinox.from_master_weights`][]: into `int16` corrections without loss, into
    `int8` ones rounded to 24 bits.

    **Arguments:**

    - `optimizer_state`: the `state_dict()` of the optimizer, with an array of NumPy, or
        a number, in place of every tensor: `{"state": {0: {"exp_avg::quantized": ...,
        "exp_avg::scales": ..., "error_bits": ..., ...}, ...}, "param_groups": [...]}`.
        A bfloat16 tensor may come as `ml_dtypes.bfloat16` or as its bits in `uint16`.
    - `parameters`: `dict(model.named_parameters())` of the PyTorch model, likewise, in
        the order in which the optimizer has them. If the groups of `optimizer_state`
        have `param_names`, any order, and others too.
    - `model`: a model to fill. It says in which dtypes weights are stored, and where.
    - `state`: its state, as `init` made it, or a state of Optax's with one inside. It
        says how moments are stored, and where.
    - `paths`: for each name in `parameters`, the dotted path of a leaf of `model`, such
        as `layers.0.weight`. By default, they are matched in order.
    - `convert`: called as `convert(name, array)` with the float32 master weight and the
        moments of each parameter; returns an array with its elements elsewhere, such as
        `array.T`, or the array itself. By default, all stay where they are: the
        matrices of `torch.nn.Linear` and of `equinox.nn.Linear` are both (out, in).

    **Returns:**

    A 2-tuple of the new model and the new state. Its count is the `step` of the
    checkpoint; if that has none, as for Lion and SGD, it stays (set it with
    `optax.tree.set(state, count=...)`).

    **Raises:**

    `ValueError` or `TypeError` for what is missing, too much, or of another shape or
    dtype. The message names the parameter and the leaf.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).
    """
    call = "from_flashoptim"
    own, replace = only(call, state)
    unknown = set(own.moments) - set(_MOMENTS)
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
    read = _parameters(call, optimizer_state, parameters)
    masters: list[Any] = [None for _ in leaves]
    new_moments = {name: list(moments) for name, moments in stored.items()}
    for path, name in _pairs(call, list(indices), list(read), paths).items():
        index = indices[path]
        leaf, parameter = leaves[index], read[name]
        master = _master(call, parameter)
        converted = master if convert is None else np.asarray(convert(name, master))
        if converted.shape != leaf.value.shape:
            raise ValueError(
                f"`{call}`: {parameter.text} has shape {converted.shape}, the weight "
                f"at `{leaf.name}` {leaf.value.shape}. Match them with `paths=...`, or "
                "give it that shape with `convert=...`."
            )
        masters[index] = converted.astype(compute_dtype(leaf.value.dtype))
        _check_entries(call, parameter, own)
        for key in own.moments:
            new_moments[key][index] = _moment(
                call,
                parameter,
                key,
                leaf,
                stored[key][index],
                None if converted is master else convert,
            )
    filled = dataclasses.replace(
        own,
        steps=StepCount(as_count(call, _count(call, read, own), own.count)),
        moments={key: rebuild(moments) for key, moments in new_moments.items()},
    )
    return from_master_weights(rebuild(masters), model, replace(filled))


#
# Parameters
#


class _Parameter(NamedTuple):
    name: str
    weight: Shaped[np.ndarray, "..."]
    entries: Mapping[str, Any]
    # Of its group.
    master_bytes: int | None

    @property
    def text(self) -> str:
        return f"the parameter {self.name!r}"


def _parameters(
    call: str, optimizer_state: Any, parameters: Any
) -> dict[str, _Parameter]:
    """All that a checkpoint has of each parameter."""
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
        weight = _floats(call, f"the parameter {name!r}", parameters[name])
        width = of_number[number].get("master_bytewidth")
        read[name] = _Parameter(
            name, weight, entries[number], None if width is None else int(width)
        )
    return read


def _pairs(
    call: str, leaves: list[str], names: list[str], paths: Mapping[str, str] | None
) -> dict[str, str]:
    """For each leaf, by its dotted path, the name of its parameter."""
    if paths is None:
        if len(leaves) != len(names):
            raise ValueError(
                f"`{call}`: the model has {len(leaves)} weights ({_some(leaves)}), the "
                f"checkpoint {len(names)} parameters ({_some(names)}). Pass a model of "
                "the same weights."
            )
        return dict(zip(leaves, names, strict=True))
    for what, given, known in (
        ("name", paths.keys(), names),
        ("path", paths.values(), leaves),
    ):
        given, wrong = list(given), set(given).symmetric_difference(known)
        if wrong or len(given) > len(known):
            raise ValueError(
                f"`{call}(paths=...)` must have every {what} once, of "
                f"{_some(known)}; missing, unknown or twice: "
                f"{_some(sorted(wrong) or [x for x in given if given.count(x) > 1])}."
            )
    return {path: name for name, path in paths.items()}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")


def _check_entries(call: str, parameter: _Parameter, state: OptimizerState) -> None:
    wanted = [_MOMENTS[key].name for key in state.moments]
    known = {"step", "error_bits", *wanted}
    # A PyTorch optimizer may have `None` for a moment that it does not keep.
    found = {k.split("::")[0] for k, x in parameter.entries.items() if x is not None}
    for name in [*(found - known), *(set(wanted) - found)]:
        has, lacks = "the checkpoint", "the state"
        if name in wanted:
            has, lacks = lacks, has
        raise ValueError(
            f"`{call}`: for {parameter.text}, {has} has {name!r}, and {lacks} does not "
            f"({_some(sorted(found))} and {_some(wanted)}). Pass a state of the same "
            "optimizer."
        )


def _count(call: str, read: dict[str, _Parameter], state: OptimizerState) -> Any:
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


#
# Arrays
#


def _master(call: str, parameter: _Parameter) -> Float32[np.ndarray, "..."]:
    weight = parameter.weight
    errors = parameter.entries.get("error_bits")
    if errors is None:
        return weight.astype(np.float32)
    errors = _error_bits(call, parameter, np.asarray(errors))
    wide = weight.astype(np.float64)
    info = jnp.finfo(weight.dtype)
    _, exponent = np.frexp(wide)
    # Zero and the numbers below the normal ones are spaced as the smallest of those.
    exponent = np.where(wide == 0, info.minexp, np.maximum(exponent - 1, info.minexp))
    half_unit = np.ldexp(1.0, exponent - info.nmant - 1)
    fraction = errors / float(np.iinfo(errors.dtype).max)
    return (wide + fraction * half_unit).astype(np.float32)


def _error_bits(
    call: str, parameter: _Parameter, errors: Shaped[np.ndarray, "..."]
) -> Shaped[np.ndarray, "..."]:
    """Error bits in `int8` or `int16`. PyTorch casts what an optimizer keeps to the
    dtype of its parameter; so FlashOptim saves `int8` as numbers of that dtype, and
    `int16` as its bits."""
    weight = parameter.weight
    where = f"'error_bits' of {parameter.text}"
    if jnp.dtype(weight.dtype) not in NARROW_DTYPES or errors.shape != weight.shape:
        raise ValueError(
            f"`{call}`: {where}, {errors.dtype} of shape {errors.shape}, are not those "
            f"of a weight that is {weight.dtype} of shape {weight.shape}. Pass weights "
            "and state of one checkpoint, in the dtypes that they have there."
        )
    width = parameter.master_bytes
    if width is None and errors.dtype in (np.int8, np.int16):
        width = 2 + errors.dtype.itemsize
    if width == 3:
        if errors.dtype == np.uint16:
            errors = errors.view(jnp.bfloat16)
        return _exactly(call, where, errors, np.int8)
    if width == 4 and errors.dtype.itemsize == 2:
        return np.ascontiguousarray(errors).reshape(errors.shape).view(np.int16)
    raise ValueError(
        f"`{call}`: {where} are {errors.dtype}, and 'master_bytewidth' of their group "
        f"is {parameter.master_bytes}; it must be 3 or 4. Pass 'param_groups' as they "
        "were saved."
    )


def _moment(
    call: str,
    parameter: _Parameter,
    key: str,
    leaf: Leaf,
    like: StoredMoment | None,
    convert: Convert | None,
) -> StoredMoment:
    name, kind = _MOMENTS[key]
    where = f"{name!r} of {parameter.text}"
    if like is None:
        raise ValueError(
            f"`{call}`: the state has no moment {key!r} at `{leaf.name}`. Make it with "
            "`init`, for this model."
        )
    entries, shape = parameter.entries, parameter.weight.shape
    if name in entries:
        moment = _floats(call, where, entries[name])
        _check_shape(call, where, moment, shape)
    else:
        codec = FlashOptimCodec(kind)
        codes, scales = (
            _part(call, where, entries, f"{name}::{part}", dtype)
            for part, dtype in (
                ("quantized", np.int8 if kind == "signed" else np.uint8),
                ("scales", np.float16),
            )
        )
        layout = Layout(shape, None, _GROUP_SIZE)
        _check_shape(call, where, codes, shape)
        _check_shape(call, f"the scales of {where}", scales, layout.scale_shape)
        if (
            convert is None
            and isinstance(like, QuantMoment)
            and like.codec == codec
            and like.layout == layout
            and exchanged.is_of_one_leaf(like)
        ):
            return exchanged.with_bits(call, where, codes, scales, like)
        quantized = QuantMoment(
            jnp.asarray(codes), jnp.asarray(scales), None, _GROUP_SIZE, codec
        )
        moment = exchanged.to_numpy(call, where, quantized)
    if convert is not None:
        moment = np.asarray(convert(parameter.name, moment))
    return exchanged.store(call, where, moment, like)


def _floats(call: str, where: str, x: Any) -> Float[np.ndarray, "..."]:
    x = np.asarray(x)
    if x.dtype == np.uint16:
        x = x.view(jnp.bfloat16)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{call}`: {where} is {x.dtype}. Pass an array of bfloat16 (or its bits "
            "as uint16), float16 or float32."
        )
    return x


def _exactly(
    call: str, where: str, x: Shaped[np.ndarray, "..."], dtype: Any
) -> Shaped[np.ndarray, "..."]:
    """An array in another dtype that can hold its numbers."""
    if x.dtype == dtype:
        return x
    with np.errstate(all="ignore"):
        new = x.astype(dtype)
    if not np.array_equal(new.astype(np.float64), x.astype(np.float64), equal_nan=True):
        raise ValueError(
            f"`{call}`: {where}, which came as {x.dtype}, has numbers that are none of "
            f"{np.dtype(dtype)}. Pass the arrays of the checkpoint as they were saved."
        )
    return new


def _part(
    call: str, where: str, entries: Mapping[str, Any], key: str, dtype: Any
) -> Shaped[np.ndarray, "..."]:
    if key not in entries:
        raise ValueError(
            f"`{call}`: {where} has no {key!r}. Pass all that was saved of it."
        )
    return _exactly(call, f"{key!r} of {where}", np.asarray(entries[key]), dtype)


def _check_shape(
    call: str, where: str, x: Shaped[np.ndarray, "..."], shape: tuple[int, ...]
) -> None:
    if x.shape != shape:
        raise ValueError(
            f"`{call}`: {where} has shape {x.shape}, where its weight needs {shape}. "
            "Pass weights and state of one checkpoint."
        )
