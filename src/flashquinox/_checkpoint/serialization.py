"""Support for `flax.serialization`: states as dictionaries of arrays.

Flax keeps a table of types, and treats a type that is not in it as a leaf. This module
registers the states of this library in that table. It never imports Flax: if Flax is
not imported yet, the states are registered when it is.
"""

import dataclasses
import importlib.abc
import sys
import zlib
from typing import Any

import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._model.trees import is_array
from .._optimizer.accumulation_state import AccumulationState
from .._optimizer.ema import EMAState
from .._optimizer.state import OptimizerState, with_fields
from .._storage.moment_bases import base_name, bases_first
from .._storage.quant_moment import QuantMoment
from .._storage.regroup import Groups, regroup
from .earlier import earlier_axes, earlier_codec
from .manifests import earlier_form, form_of


#
# To dictionaries
#


# What has no moments of its own.
_Around = AccumulationState | EMAState


def _state_to_dict(state: OptimizerState | _Around) -> dict[str, Any]:
    return {name: _flax().to_state_dict(x) for name, x in _fields(state).items()}


def _moment_to_dict(moment: QuantMoment) -> dict[str, Any]:
    return _fields(moment) | {_FORMAT: _format(moment)}


# The key of an array in the dictionary of a moment, beside its codes and scales: the
# first of the axes of its groups, the number of these axes, the size of its groups, and
# a number for its codec and for what it is relative to. It is an array, so that
# functions can be mapped over the whole dictionary.
_FORMAT = "QuantMoment"


def _format(moment: QuantMoment) -> np.ndarray:
    form = _number(*form_of(moment))
    first = moment.axes[0] if moment.axes else 0
    return np.asarray([first, len(moment.axes), moment.group_size, form], np.int32)


def _groups_and_number(stored: dict[str, Any]) -> tuple[Groups, int]:
    """The groups of a moment, and what `_number` gave, from its dictionary."""
    *axes, group_size, form = np.asarray(stored[_FORMAT]).tolist()
    if len(axes) == 1:
        ndims = (np.ndim(stored[name]) for name in ("codes", "scales"))
        return (earlier_axes(axes[0] or None, *ndims), group_size), form
    first, count = axes
    return (tuple(range(first, first + count)), group_size), form


def _number(codec: str, relative_to: str | None) -> int:
    text = codec if relative_to is None else f"{codec} / {relative_to}"
    return zlib.crc32(text.encode()) >> 1


def _fields(module: OptimizerState | QuantMoment | _Around) -> dict[str, Any]:
    """The fields that are not static and not `None`."""
    values = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if not field.metadata.get("static", False)
    }
    return {name: value for name, value in values.items() if value is not None}


#
# From dictionaries
#


def _around_from_dict(state: _Around, stored: Any) -> _Around:
    _check(state, _state_to_dict(state), stored)
    return _with(state, _fields_from_dict(state, stored))


def _fields_from_dict(state: OptimizerState | _Around, stored: Any) -> dict[str, Any]:
    return {
        name: _flax().from_state_dict(value, stored[name], name)
        for name, value in _fields(state).items()
    }


def _state_from_dict(state: OptimizerState, stored: Any) -> OptimizerState:
    _check(state, _state_to_dict(state), stored)
    restored = _fields_from_dict(state, stored)
    restored["moments"] = _as_now(restored["moments"], state.moments)
    return _with(state, restored)


def _moment_from_dict(moment: QuantMoment, stored: Any) -> QuantMoment:
    _check(moment, _moment_to_dict(moment), stored)
    arrays = {name: stored[name] for name in _fields(moment)}
    groups, form = _groups_and_number(stored)
    if form != _number(*form_of(moment)):
        # As an earlier version stored it.
        codec = earlier_codec(moment)
        return QuantMoment(
            arrays["codes"], arrays["scales"], *groups, codec, arrays.get("parameter")
        )
    if groups != (moment.axes, moment.group_size):
        regrouped = regroup(
            stored["codes"], stored["scales"], groups, moment, stored.get("parameter")
        )
        arrays["codes"], arrays["scales"] = map(np.asarray, regrouped)
    return _with(moment, arrays)


def _as_now(restored: dict[str, Any], likes: dict[str, Any]) -> dict[str, Any]:
    """The moments of a state. Those that an earlier version stored are encoded
    again."""
    is_moment = lambda x: isinstance(x, QuantMoment)
    flat = {name: jtu.tree_flatten(x, is_moment) for name, x in restored.items()}
    new = dict(restored)
    for name in bases_first(likes):
        leaves, treedef = flat[name]
        base, of_base = base_name(likes[name]), None
        if base is not None:
            of_base = jtu.tree_leaves(new[base], is_leaf=is_moment)
        likes_here = jtu.tree_leaves(likes[name], is_leaf=is_moment)
        new[name] = treedef.unflatten(
            [
                _encoded_again(x, like, None if of_base is None else of_base[i])
                for i, (x, like) in enumerate(zip(leaves, likes_here, strict=True))
            ]
        )
    return new


def _encoded_again(x: Any, like: Any, base: Any) -> Any:
    if not isinstance(x, QuantMoment) or (x.codec, x.relative_to) == (
        like.codec,
        like.relative_to,
    ):
        return x
    groups = (x.axes, x.group_size)
    again = regroup(x.codes, x.scales, groups, like, x.parameter, x.codec, base)
    codes, scales = map(np.asarray, again)
    return _with(like, _fields(x) | {"codes": codes, "scales": scales})


def _with(module: Any, values: dict[str, Any]) -> Any:
    """A module with these values of fields, which may be NumPy arrays."""
    if isinstance(module, OptimizerState):
        return with_fields(module, module.packing, **values)
    parts, rebuild = jtu.tree_flatten_with_path(
        module, is_leaf=lambda x: x is not module
    )
    return rebuild.unflatten(values.get(path[0].name, x) for path, x in parts)


def _check(like: PyTree, wanted: Any, stored: Any) -> None:
    """What was stored must fit what to restore to, whose dictionary is `wanted`."""
    is_moment = lambda x: isinstance(x, QuantMoment)
    earlier = {
        _number(*form_of(x)): _number(*earlier_form(x))
        for x in jtu.tree_leaves(like, is_leaf=is_moment)
        if is_moment(x)
    }
    wants, has = (
        {
            tuple(jtu.keystr((key,), simple=True) for key in path): x
            for path, x in jtu.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
        }
        for tree in (wanted, stored)
    )
    for path in [*wants, *has]:
        texts = [_text(x[path]) if path in x else "nothing" for x in (wants, has)]
        ours, theirs = (np.asarray(x.get((*path[:-1], _FORMAT))) for x in (wants, has))
        if ours.shape == (4,) and theirs.shape in ((3,), (4,)):
            is_earlier = theirs[-1] == earlier.get(int(ours[-1]))
            if ours[-1] != theirs[-1] and not is_earlier:
                texts = ["a moment of its codec", "a moment of another codec"]
                path = path[:-1]
            elif path[-1] in ("scales", _FORMAT) and not np.array_equal(ours, theirs):
                # The moment will be encoded again.
                continue
        if texts[0] != texts[1]:
            where = "/".join([_flax().current_path(), *path])
            raise ValueError(
                f"`flax.serialization.from_state_dict`: at `{where}`, {texts[1]} was "
                f"stored, where the state to restore to has {texts[0]}. Restore to a "
                "state of the same model and of the same optimizer, with the same "
                "arguments, `storage=` among them."
            )


def _text(x: Any) -> str:
    return f"{x.dtype} of shape {x.shape}" if is_array(x) else repr(x)


def _flax() -> Any:
    return sys.modules.get("flax.serialization")


#
# Registration
#


def _register() -> bool:
    """Registers the states if Flax is imported. Returns whether it is."""
    register = getattr(_flax(), "register_serialization_state", None)
    if register is None:
        return False
    for kind, to_dict, from_dict in (
        (OptimizerState, _state_to_dict, _state_from_dict),
        (QuantMoment, _moment_to_dict, _moment_from_dict),
        (AccumulationState, _state_to_dict, _around_from_dict),
        (EMAState, _state_to_dict, _around_from_dict),
    ):
        register(kind, to_dict, from_dict, override=True)
    return True


class _WhenFlaxComes(importlib.abc.MetaPathFinder):
    """Finds no module, but notices when Flax imports its own. Its modules that use
    `flax.serialization` are imported after that one."""

    is_done = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        del path, target
        if not self.is_done and fullname.startswith("flax."):
            self.is_done = _register()


if not _register():
    sys.meta_path.insert(0, _WhenFlaxComes())
