"""The manifest of a checkpoint: what its arrays and moments are.

It is read, and compared with every leaf to restore, before any array is read.
"""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from .._common.errors import CheckpointError
from .._storage.codec import AbstractMomentCodec
from .._storage.layout import Layout
from .._storage.quant_moment import QuantMoment
from .earlier import earlier_axes, earlier_codec


FORMAT = "flashquinox checkpoint"
# Of version 2 are moments that are relative to others; of version 3, groups along
# several axes.
FORMAT_VERSION, _READABLE = 3, (1, 2, 3)


def make(
    library_version: str,
    arrays: dict[str, Any],
    digests: dict[str, int],
    moments: dict[str, QuantMoment],
) -> dict[str, Any]:
    """The manifest of these arrays and moments, by their names, for JSON."""
    contents = {
        # Also outside of the contents, for versions that cannot read them. Here the
        # digest protects it.
        "flashquinox_version": library_version,
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
                "codec": codec_name(moment.codec),
                "axes": list(moment.axes),
                "group_size": moment.group_size,
                "relative_to": moment.relative_to,
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


def with_files(manifest: Any, files: dict[str, int | None]) -> dict[str, Any]:
    """A manifest with a list of the files of its checkpoint and their sizes; `None` for
    files that still change."""
    contents = manifest["contents"] | {"files": files}
    return manifest | {"sha256": _sha256(contents), "contents": contents}


def files(manifest: Any) -> dict[str, int | None] | None:
    """The files that a manifest lists; `None` for an early manifest without a list.
    Raises an exception if it is damaged."""
    contents = manifest["contents"]
    if manifest["sha256"] != _sha256(contents):
        raise ValueError
    listed = contents.get("files", {})
    sizes = [x for x in listed.values() if x is not None]
    if not all([type(x) is int for x in sizes]):
        raise ValueError
    return listed if "files" in contents else None


def has_elements(manifest: Any) -> bool:
    """Whether any array has elements. Raises an exception if the manifest is
    damaged."""
    return any(0 not in x["shape"] for x in manifest["contents"]["arrays"].values())


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
    if version not in _READABLE or isinstance(version, bool):
        raise CheckpointError(
            f"`{call}`: {where} has format version {version!r:.20}, written by "
            f"flashquinox {manifest.get('flashquinox_version')!s:.20}; this is "
            f"flashquinox {library_version}, which reads format versions "
            f"{', '.join(map(str, _READABLE[:-1]))} and {_READABLE[-1]}. Install "
            "the version of flashquinox that wrote it."
        )
    found = manifest.get("contents")
    writer = manifest.get("flashquinox_version")
    if manifest.get("sha256") != _sha256(found) or _written_by(found, writer) != writer:
        raise CheckpointError(
            f"`{call}`: {where} is damaged: its manifest is altered. {remedy}"
        )
    wrong = _wrong_in(found)
    if wrong is not None:
        raise CheckpointError(
            f"`{call}`: {where} is damaged: its manifest makes no sense at {wrong}. "
            f"{remedy}"
        )
    return found


def _written_by(contents: Any, otherwise: Any) -> Any:
    """The version of the library in the contents. Early ones do not have it."""
    known = isinstance(contents, dict)
    return contents.get("flashquinox_version", otherwise) if known else otherwise


def _wrong_in(contents: Any) -> str | None:
    """The first part of the contents that `make` cannot have written, if there is one.
    Nothing in a file is used before this check."""
    parts = ("arrays", "moments")
    if not isinstance(contents, dict):
        return "`contents`"
    for part in parts:
        if not isinstance(contents.get(part), dict):
            return f"`contents[{part!r}]`"
    arrays, moments = (contents[part] for part in parts)
    files = contents.get("files", {})
    if not isinstance(files, dict) or not all(
        size is None or _is_count(size) for size in files.values()
    ):
        return "`contents['files']`"
    for name, x in arrays.items():
        if not (
            isinstance(x, dict)
            and isinstance(x.get("shape"), list)
            and all(map(_is_count, x["shape"]))
            and isinstance(x.get("dtype"), str)
            and _is_count(x.get("digest"))
        ):
            return f"`{name}`"
    for name, moment in moments.items():
        if not (isinstance(moment, dict) and _is_moment(name, moment, arrays)):
            return f"`{name}`"
    return None


def _is_moment(name: str, moment: dict[str, Any], arrays: dict[str, Any]) -> bool:
    """Whether the codes and the scales of a moment have the shapes of its groups."""
    size: Any = moment.get("group_size")
    codes, scales = (arrays.get(f"{name}.{part}") for part in ("codes", "scales"))
    if not isinstance(moment.get("codec"), str) or codes is None or scales is None:
        return False
    base = moment.get("relative_to")
    if not _is_count(size) or size == 0 or not (base is None or isinstance(base, str)):
        return False
    found = tuple(scales["shape"])
    axes: Any = moment.get("axes", [moment.get("axis")])
    known = isinstance(axes, list) and all(x is None or type(x) is int for x in axes)
    try:
        return known and found == layout_of(arrays, name, moment).scale_shape
    except ValueError:
        return False


def layout_of(arrays: dict[str, Any], name: str, moment: dict[str, Any]) -> Layout:
    """The groups of a moment of a manifest, of which `arrays` are the arrays."""
    codes, scales = (arrays[f"{name}.{part}"]["shape"] for part in ("codes", "scales"))
    if "axes" in moment:
        axes = tuple(moment["axes"])
    else:
        axes = earlier_axes(moment.get("axis"), len(codes), len(scales))
    return Layout(tuple(codes), axes, moment["group_size"])


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def check(
    call: str,
    where: str,
    stored: dict[str, Any],
    stored_moments: dict[str, Any],
    arrays: dict[str, Any],
    moments: dict[str, QuantMoment],
) -> dict[str, AbstractMomentCodec]:
    """Compares the arrays and moments of a manifest with those to restore to.

    **Returns:**

    For each moment that must be encoded again, because its groups differ or an earlier
    version stored it otherwise, the codec that it was stored by.

    **Raises:**

    `CheckpointError` for the first leaf that does not fit.
    """
    regrouped: dict[str, AbstractMomentCodec] = {}
    for name in [*moments, *stored_moments]:
        has = name in moments or name in arrays
        if not has or not (name in stored_moments or name in stored):
            # Its arrays are missing on one side: see below.
            continue
        moment = moments.get(name)
        wanted = form_of(moment)
        found = stored_moments.get(name, {"codec": "FullPrecision()"})
        form = found["codec"], found.get("relative_to")
        if form != wanted and (moment is None or form != earlier_form(moment)):
            raise CheckpointError(
                f"`{call}`: in {where}, `{name}` was stored by {_form_text(form)}; the "
                f"state to restore to uses {_form_text(wanted)}. Make that state with "
                f"the `{_form_argument(name)}` of the checkpoint."
            )
        if moment is not None:
            layout = layout_of(stored, name, found)
            groups = layout.axes, layout.group_size
            if form != wanted or groups != (moment.axes, moment.group_size):
                is_now = form == wanted
                regrouped[name] = moment.codec if is_now else earlier_codec(moment)

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
    scales = {f"{name}.scales": _scale_dtype(x) for name, x in regrouped.items()}
    for name, x in arrays.items():
        found, wanted = stored[name], _description(x)
        if name in scales:
            wanted = {"shape": found["shape"], "dtype": scales[name]}
        if any(found[key] != wanted[key] for key in wanted):
            raise CheckpointError(
                f"`{call}`: {where} has {_text(found)} at `{name}`, where the trees to "
                f"restore to have {_text(wanted)}.{_hint(name)}"
            )
    return regrouped


def _scale_dtype(codec: AbstractMomentCodec) -> str:
    assert codec.dtypes is not None
    return str(np.dtype(codec.dtypes[1]))


def _description(x: Any) -> dict[str, Any]:
    return {"shape": list(np.shape(x)), "dtype": str(x.dtype)}


def _text(description: dict[str, Any]) -> str:
    return f"{description['dtype']} of shape {tuple(description['shape'])}"


def _hint(name: str) -> str:
    if ".corrections" in name:
        return (
            " Make the state with the `Storage(master_weight_bits=...)` of the "
            "checkpoint, and its `accumulate(bits=...)` if there are sums, for a model "
            "of its dtypes; or pass a state of `None` to restore the weights alone."
        )
    if ".sums" in name:
        return (
            " Make the state with the `accumulate(bits=...)` of the checkpoint, for "
            "the same model; or pass a state of `None` to restore the weights alone."
        )
    if ".moments[" in name:
        return (
            " Make the state with the optimizer, and the `Storage(moments=...)`, of "
            "the checkpoint, for the same model; or pass a state of `None` to restore "
            "the weights alone."
        )
    if name.startswith("state"):
        return (
            " Pass a state like the one that was saved; or `None` to restore the "
            "weights alone."
        )
    return (
        " Pass a model and a state like those that were saved; or pass a state of "
        "`None` to restore the weights alone, also into float32."
    )


def _form_argument(name: str) -> str:
    """What decides how a moment of this name is stored."""
    return "accumulate(bits=...)" if ".sums" in name else "Storage(moments=...)"


def form_of(moment: QuantMoment | None) -> tuple[str, str | None]:
    """The codec of a moment, and what it is relative to."""
    if moment is None:
        return "FullPrecision()", None
    return codec_name(moment.codec), moment.relative_to


def earlier_form(moment: QuantMoment) -> tuple[str, str | None]:
    """The same as an earlier version had it."""
    return codec_name(earlier_codec(moment)), None


def _form_text(form: tuple[Any, Any]) -> str:
    codec, base = form
    return codec if base is None else f"{codec} relative to {base!r}"


def codec_name(codec: AbstractMomentCodec) -> str:
    fields = (f"{f.name}={getattr(codec, f.name)!r}" for f in dataclasses.fields(codec))
    return f"{type(codec).__qualname__}({', '.join(fields)})"


def _sha256(contents: Any) -> str:
    text = json.dumps(contents, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
