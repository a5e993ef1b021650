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

from .._model.trees import is_array
from .._optimizer.state import OptimizerState
from .._storage.quant_moment import QuantMoment
from .._storage.regroup import regroup
from .manifests import codec_name


#
# To dictionaries
#


def _state_to_dict(state: OptimizerState) -> dict[str, Any]:
    return {name: _flax().to_state_dict(x) for name, x in _fields(state).items()}


def _moment_to_dict(moment: QuantMoment) -> dict[str, Any]:
    return _fields(moment) | {_FORMAT: _format(moment)}


# The key of an array in the dictionary of a moment, beside its codes and scales: the
# axis and the size of its groups, and a number for its codec. It is an array, so that
# functions can be mapped over the whole dictionary.
_FORMAT = "QuantMoment"


def _format(moment: QuantMoment) -> np.ndarray:
    codec = zlib.crc32(codec_name(moment.codec).encode()) >> 1
    return np.asarray([moment.axis or 0, moment.group_size, codec], np.int32)


def _fields(module: OptimizerState | QuantMoment) -> dict[str, Any]:
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


def _state_from_dict(state: OptimizerState, stored: Any) -> OptimizerState:
    _check(_state_to_dict(state), stored)
    restored = {
        name: _flax().from_state_dict(value, stored[name], name)
        for name, value in _fields(state).items()
    }
    return _with(state, restored)


def _moment_from_dict(moment: QuantMoment, stored: Any) -> QuantMoment:
    _check(_moment_to_dict(moment), stored)
    arrays = {name: stored[name] for name in _fields(moment)}
    axis, group_size, _ = np.asarray(stored[_FORMAT]).tolist()
    groups = (axis or None, group_size)
    if groups != (moment.axis, moment.group_size):
        regrouped = regroup(
            stored["codes"], stored["scales"], groups, moment, stored.get("parameter")
        )
        arrays["codes"], arrays["scales"] = map(np.asarray, regrouped)
    return _with(moment, arrays)


def _with(module: Any, values: dict[str, Any]) -> Any:
    """A module with these values of fields, which may be NumPy arrays."""
    parts, rebuild = jtu.tree_flatten_with_path(
        module, is_leaf=lambda x: x is not module
    )
    return rebuild.unflatten(values.get(path[0].name, x) for path, x in parts)


def _check(wanted: dict[str, Any], stored: Any) -> None:
    """What was stored must fit the state to restore to, whose dictionary is
    `wanted`."""
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
        if ours.shape == theirs.shape == (3,):
            if ours[2] != theirs[2]:
                texts = ["a moment of its codec", "a moment of another codec"]
                path = path[:-1]
            elif path[-1] == "scales" and any(ours != theirs):
                # The groups differ: the moment will be encoded again.
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
