"""What a checkpoint says about itself, and whether that fits what is asked of it.

It is read, and every leaf compared, before any array is.
"""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from ._codec import AbstractMomentCodec, QuantMoment


FORMAT = "flashquinox checkpoint"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that does not exist, is damaged, is none of this library, or does
    not fit what it should be restored to. The message says which, and what to do."""


def make(
    library_version: str,
    arrays: dict[str, Any],
    digests: dict[str, int],
    moments: dict[str, QuantMoment],
) -> dict[str, Any]:
    """The manifest of these arrays, by their names: for JSON."""
    contents = {
        "arrays": {
            name: {
                "shape": list(x.shape),
                "dtype": str(x.dtype),
                "digest": digests[name],
            }
            for name, x in arrays.items()
        },
        "moments": {
            name: {
                "codec": _codec_name(moment.codec),
                "axis": moment.axis,
                "group_size": moment.group_size,
            }
            for name, moment in moments.items()
        },
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "flashquinox_version": library_version,
        "sha256": _sha256(contents),
        "contents": contents,
    }


def contents(
    call: str, where: str, manifest: Any, library_version: str, remedy: str
) -> Any:
    """The contents of a manifest that was read. `remedy` says what to do if it is
    damaged.

    **Raises:**

    `CheckpointError` if it is of another format or version, or damaged.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"`{call}`: {where} is not a checkpoint of flashquinox, or is damaged: its "
            "manifest is of another format. Pass the directory that was given to "
            f"`Checkpoints` when it was saved. {remedy}"
        )
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"`{call}`: {where} has format version {version!r}, written by flashquinox "
            f"{manifest.get('flashquinox_version')}; this is flashquinox "
            f"{library_version}, which reads format version {FORMAT_VERSION}. Install "
            "the version of flashquinox that wrote it."
        )
    found = manifest.get("contents")
    if manifest.get("sha256") != _sha256(found):
        raise CheckpointError(
            f"`{call}`: {where} is damaged: its manifest is altered. {remedy}"
        )
    return found


def check(
    call: str,
    where: str,
    contents: dict[str, Any],
    arrays: dict[str, Any],
    moments: dict[str, QuantMoment],
) -> set[str]:
    """Compares the contents of a manifest with the arrays that it should be restored
    to.

    **Returns:**

    The names of the moments that must be encoded again: their groups lie elsewhere.

    **Raises:**

    `CheckpointError` for the first leaf that does not fit.
    """
    stored, stored_moments = contents["arrays"], contents["moments"]
    regrouped = set()
    for name in [*moments, *stored_moments]:
        has = name in moments or name in arrays
        if not has or not (name in stored_moments or name in stored):
            # One of those whose arrays are missing on one side.
            continue
        wanted = _codec_of(moments.get(name))
        found = stored_moments.get(name, {"codec": "FullPrecision()"})
        if found["codec"] != wanted:
            raise CheckpointError(
                f"`{call}`: in {where}, `{name}` was stored by {found['codec']}; the "
                f"state to restore to uses {wanted}. Make that state with the "
                "`moments=...` of the checkpoint."
            )
        if name in moments:
            moment = moments[name]
            layout = (found["axis"], found["group_size"])
            if layout != (moment.axis, moment.group_size):
                regrouped.add(name)

    for name in (name for name in arrays if name not in stored):
        raise CheckpointError(
            f"`{call}`: {where} has nothing at `{name}`, where the trees to restore to "
            f"have {_text(_description(arrays[name]))}.{_hint(name)}"
        )
    for name in (name for name in stored if name not in arrays):
        raise CheckpointError(
            f"`{call}`: {where} has {_text(stored[name])} at `{name}`, where the trees "
            f"to restore to have no array.{_hint(name)}"
        )
    scales = {f"{name}.scales" for name in regrouped}
    for name, x in arrays.items():
        found, wanted = stored[name], _description(x)
        if found["dtype"] != wanted["dtype"] or (
            found["shape"] != wanted["shape"] and name not in scales
        ):
            raise CheckpointError(
                f"`{call}`: {where} has {_text(found)} at `{name}`, where the trees to "
                f"restore to have {_text(wanted)}.{_hint(name)}"
            )
    return regrouped


def _description(x: Any) -> dict[str, Any]:
    return {"shape": list(np.shape(x)), "dtype": str(x.dtype)}


def _text(description: dict[str, Any]) -> str:
    return f"{description['dtype']} of shape {tuple(description['shape'])}"


def _hint(name: str) -> str:
    if ".corrections" in name:
        return (
            " Make the state with the `master_weight_bits=...` of the checkpoint, for "
            "a model of its dtypes."
        )
    if ".moments[" in name:
        return (
            " Make the state with the optimizer, and the `moments=...`, of the "
            "checkpoint, for the same model."
        )
    return " Pass a model and a state like those that were saved."


def _codec_of(moment: QuantMoment | None) -> str:
    return "FullPrecision()" if moment is None else _codec_name(moment.codec)


def _codec_name(codec: AbstractMomentCodec) -> str:
    fields = (f"{f.name}={getattr(codec, f.name)!r}" for f in dataclasses.fields(codec))
    return f"{type(codec).__qualname__}({', '.join(fields)})"


def _sha256(contents: Any) -> str:
    text = json.dumps(contents, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
