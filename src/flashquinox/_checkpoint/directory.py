"""The directory of checkpoints. It has one folder for each step; only complete ones
count as checkpoints."""

import contextlib
import json
import os
import re
from collections.abc import Iterable
from typing import Any

from etils import epath

from .._common.errors import CheckpointError
from . import manifests


# The two items of a checkpoint, each a folder in that of the step.
ARRAYS = "arrays"
MANIFEST = "flashquinox"

# The file that Orbax's JSON handler writes.
_MANIFEST_FILE = f"{MANIFEST}/metadata"
_ORBAX_FILE = "_CHECKPOINT_METADATA"
# All names that can be in the folder of a step.
_KNOWN = {ARRAYS, MANIFEST, _ORBAX_FILE, "commit_success.txt"}
# While it is being deleted, the folder of a step is called `100.deleted`; while it is
# being written, `100.orbax-checkpoint-tmp`.
_DELETED = ".deleted"
_UNFINISHED = ".orbax-checkpoint-tmp"

# Schemes of addresses that both Orbax and tensorstore know.
_SCHEMES = ("gs://", "s3://")

# Characters that Orbax, which finds files by `glob`, or tensorstore, which reads `\` as
# `/`, misread in a path.
_MISREAD = "*?[" + ("\\" if os.sep == "/" else "")


class Directory:
    """The folders of the steps. A step is complete if all files exist that its manifest
    lists. The manifest is written last."""

    def __init__(self, directory: str | os.PathLike[str]):
        self.path = _checked_path(directory)
        self._root = epath.Path(self.path)

    def step_path(self, step: int) -> str:
        return f"{self.path}/{step}"

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, in order."""
        return [step for step in self.folders() if self.missing(step) is None]

    def latest(self) -> int | None:
        for step in reversed(self.folders()):
            if self.missing(step) is None:
                return step
        return None

    def folders(self) -> list[int]:
        """The steps of all folders, complete or not, in order."""
        return sorted(
            int(name)
            for name in _names(self._root)
            if re.fullmatch("0|[1-9][0-9]{0,18}", name)
        )

    def missing(self, step: int) -> str | None:
        """The name of a file that is missing. `None` if the checkpoint is complete; it
        may still be damaged."""
        folder = self._root / str(step)
        present = set(_files(folder))
        if _MANIFEST_FILE not in present:
            return _MANIFEST_FILE
        try:
            manifest = self.manifest(step)
            files = manifests.files(manifest)
            if files is None:
                # A checkpoint from before manifests listed files.
                files = [_ORBAX_FILE]
                if manifests.has_elements(manifest):
                    files += [f"{ARRAYS}/_METADATA", f"{ARRAYS}/manifest.ocdbt"]
        except Exception:
            # A damaged manifest. `restore` will say so.
            return None
        if isinstance(files, dict) and _is_of_another(files, present):
            return None
        return next((name for name in files if name not in present), None)

    def altered(self, step: int) -> str | None:
        """Which file has another size than its manifest says, if one has."""
        listed = manifests.files(self.manifest(step))
        present = _files(self._root / str(step))
        if listed is None or _is_of_another(listed, present):
            return None
        for name, size in present.items():
            if listed.get(name) not in (None, size):
                return f"`{name}` has {size} bytes of {listed[name]}"
        return None

    def manifest(self, step: int) -> Any:
        """The manifest, as it is in the file."""
        return json.loads((self._root / str(step) / _MANIFEST_FILE).read_text())

    def list_files(self, step: int) -> None:
        """Adds the list of files to the manifest of the checkpoint that is being
        written. This is the last thing that happens before the checkpoint appears."""
        folder = self._root / f"{step}{_UNFINISHED}"
        if not folder.exists():
            folder = self._root / str(step)
        path = folder / _MANIFEST_FILE
        files: dict[str, Any] = dict(_files(folder))
        # Orbax adds the time to its own.
        files |= {_ORBAX_FILE: None, _MANIFEST_FILE: None}
        manifest = manifests.with_files(json.loads(path.read_text()), files)
        new = folder / f"{_MANIFEST_FILE}.new"
        new.write_text(json.dumps(manifest))
        new.replace(path)

    #
    # Changes, by one writer at a time: see `lock.py`
    #

    def make_room(self, call: str, step: int) -> None:
        """Removes the remains of an incomplete checkpoint of this step."""
        if (self._root / str(step)).exists():
            self._check_own(call, step)
            self.remove(step)

    def remove(self, step: int) -> None:
        """Deletes a checkpoint. If this is interrupted at any moment, the checkpoint is
        either complete or does not count."""
        folder = self._root / str(step)
        if _is_local(self.path):
            there = self._root / f"{step}{_DELETED}"
            _remove(there)
            folder = folder.replace(there)
        else:
            (folder / _MANIFEST_FILE).unlink(missing_ok=True)
        _remove(folder)

    def discard(self, step: int) -> None:
        """Removes the files of a save that failed."""
        if self.missing(step) is not None:
            with contextlib.suppress(OSError):
                _remove(self._root / f"{step}{_UNFINISHED}")
                if not _is_local(self.path):
                    _remove(self._root / str(step))

    def keep(self, newest: int | None, period: int | None) -> None:
        """Deletes old checkpoints, except the newest complete ones and those of steps
        that are multiples of the period; and the remains of interrupted deletions."""
        for name in _names(self._root):
            if re.fullmatch(rf"[0-9]+{re.escape(_DELETED)}", name):
                _remove(self._root / name)
        if newest is None:
            return
        kept = 0
        for step in reversed(self.folders()):
            if kept < newest:
                kept += self.missing(step) is None
            elif (period is None or step % period > 0) and self._is_own(step):
                self.remove(step)

    def check_deletable(self, call: str, step: int) -> None:
        if not (self._root / str(step)).exists():
            raise CheckpointError(
                f"`{call}(step={step})`: {self.path} has checkpoints of the steps "
                f"{self.steps()}. Pass one of them."
            )
        self._check_own(call, step)

    def _check_own(self, call: str, step: int) -> None:
        if not self._is_own(step):
            raise CheckpointError(
                f"`{call}(step={step})`: {self.step_path(step)} is no checkpoint of "
                "flashquinox. Move it away, or use another directory."
            )

    def _is_own(self, step: int) -> bool:
        """Whether a folder is a checkpoint of this library, or the remains of one."""
        names = set(_names(self._root / str(step)))
        return MANIFEST in names or names <= _KNOWN


def _checked_path(directory: str | os.PathLike[str]) -> str:
    """The absolute path, or the address, of a directory that exists."""
    call = f"Checkpoints({directory!r})"
    path = os.fsdecode(directory)
    if "://" not in path:
        if path == "":
            raise CheckpointError(
                f"`{call}`: the path is empty. Pass that of a directory, such as "
                '"checkpoints".'
            )
        path = os.path.abspath(os.path.expanduser(path))
    if not _is_local(path) and not path.startswith(_SCHEMES):
        raise CheckpointError(
            f"`{call}`: this is the address of a store that Orbax does not know. Pass "
            f"a path, or an address that begins with {' or '.join(_SCHEMES)}."
        )
    if "\0" in path or not _is_text(path):
        raise CheckpointError(
            f"`{call}`: the path has characters in it that file systems, or Orbax, "
            "cannot take. Use a directory without."
        )
    misread = [c for c in path if c in _MISREAD]
    if misread:
        raise CheckpointError(
            f"`{call}`: the path {path!r} has {misread[0]!r} in it, by which Orbax "
            "would not find its files again. Use a directory without."
        )
    if not _is_local(path):
        return path.rstrip("/")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise CheckpointError(
            f"`{call}` is a file, or a link to nothing. Pass a directory: it holds one "
            "folder for each step."
        )
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"`{call}`: there is no directory {path}, and it cannot be made ({error})."
        ) from error
    return path


def _is_of_another(listed: dict[str, Any], present: Iterable[str]) -> bool:
    """Whether a manifest belongs to another checkpoint: then there are files that it
    does not list. Deleted files alone do not cause this."""
    names = (name for name in present if name.startswith(f"{ARRAYS}/"))
    return any(n not in listed and "/." not in n for n in names)


def _is_text(path: str) -> bool:
    """Whether a path can be written in UTF-8. Paths that Python decoded from other
    bytes cannot."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_local(path: str) -> bool:
    return "://" not in path


def _names(folder: Any) -> list[str]:
    """The names in a folder; none if there is no folder, or another process has just
    deleted it."""
    try:
        return [child.name for child in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(folder: Any, prefix: str = "") -> dict[str, int]:
    """The sizes of all files below a folder, by their paths."""
    found: dict[str, int] = {}
    for name in _names(folder):
        child = folder / name
        if child.is_dir():
            found |= _files(child, f"{prefix}{name}/")
        else:
            with contextlib.suppress(FileNotFoundError):
                found[f"{prefix}{name}"] = child.stat().length
    return found


def _remove(folder: Any) -> None:
    with contextlib.suppress(FileNotFoundError):
        folder.rmtree()
