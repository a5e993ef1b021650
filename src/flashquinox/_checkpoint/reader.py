"""Reading a checkpoint: choosing its step, and saying what is wrong with it."""

import warnings
from typing import Any, SupportsIndex

import jax

from .._common.errors import CheckpointError
from .._common.path_checks import check_step
from .._common.version import __version__
from . import files, manifests
from .directory import Directory
from .messages import first_line
from .restoring import Plan


class Reader:
    """Reads the checkpoints of a directory: `choose` gives a step, `contents` what its
    manifest says, and `read` its arrays."""

    def __init__(self, directory: Directory):
        self._directory = directory

    def choose(self, call: str, step: SupportsIndex | None) -> int:
        """The step to restore: the one asked for, or the latest that is complete.

        **Raises:**

        `CheckpointError` if there is no such checkpoint, or it is not complete.
        """
        latest = self._directory.latest()
        if step is None and latest is not None:
            self._warn_of_later(call, latest)
            return latest
        folders = self._directory.folders()
        if step is not None and (number := check_step(call, step)) in folders:
            missing = self._directory.missing(number)
            if missing is None:
                return number
            wrong = f"that of step {step} is not complete: it has no `{missing}`"
            if latest is None:
                raise CheckpointError(
                    f"`{call}(step={step})`: there is no checkpoint in "
                    f"{self._directory.path}, as {wrong}."
                )
            raise CheckpointError(
                f"`{call}(step={step})`: {self._directory.path} has checkpoints of the "
                f"steps {self._directory.steps()}; {wrong}. Pass one of them."
            )
        if latest is None:
            incomplete = (
                f" Not complete, or of another program: {folders}." if folders else ""
            )
            raise CheckpointError(
                f"`{call}`: there is no checkpoint of flashquinox in "
                f"{self._directory.path}. Pass the directory that was given to "
                f"`Checkpoints` when it was saved.{incomplete}"
            )
        raise CheckpointError(
            f"`{call}(step={step})`: {self._directory.path} has checkpoints of the "
            f"steps {self._directory.steps()}. Pass one of them."
        )

    def contents(self, call: str, step: int) -> Any:
        """What the manifest of a checkpoint says.

        **Raises:**

        `CheckpointError` if the manifest, or the size of a file, is not as it was
        saved.
        """
        where, remedy = self._directory.step_path(step), self._remedy(step)
        try:
            manifest = self._directory.manifest(step)
        except Exception as error:
            raise CheckpointError(
                f"`{call}`: {where} has no manifest that can be read "
                f"({first_line(error)}): it is damaged, or no checkpoint of "
                "flashquinox. Pass the directory that was given to `Checkpoints` when "
                f"it was saved. {remedy}"
            ) from error
        contents = manifests.contents(call, where, manifest, __version__, remedy)
        altered = self._directory.altered(step)
        if altered is not None:
            raise CheckpointError(f"`{call}`: {where} is damaged: {altered}. {remedy}")
        return contents

    def read(self, call: str, step: int, plan: Plan) -> dict[str, Any]:
        """The arrays of a checkpoint that a plan asks for, by their names.

        **Raises:**

        `CheckpointError` if they cannot be read, or are not as they were saved.
        """
        where = self._directory.step_path(step)
        try:
            read = files.read(where, plan.stored, plan.shardings)
        except (MemoryError, jax.errors.JaxRuntimeError):
            # The fault of the machine, such as too little memory: the files may be
            # sound.
            raise
        except Exception as error:
            raise self._unreadable(call, step, error) from error
        altered = plan.altered(read)
        if altered is not None:
            raise CheckpointError(
                f"`{call}`: {where} is damaged: `{altered}` is not as it was saved."
                f" {self._remedy(step)}"
            )
        return read

    def _warn_of_later(self, call: str, latest: int) -> None:
        later = self._directory.folders()[-1]
        if later > latest:
            warnings.warn(
                f"`{call}`: {self._directory.step_path(later)} is left out, and step "
                f"{latest} restored: it is not complete, as it has no "
                f"`{self._directory.missing(later)}`.",
                stacklevel=4,
            )

    def _remedy(self, step: int) -> str:
        others = [other for other in self._directory.steps() if other != step]
        if not others:
            return "There is no other one in the directory."
        return f"Restore another one, `step=` one of {others}, and `delete({step})`."

    def _unreadable(self, call: str, step: int, error: Exception) -> CheckpointError:
        where = self._directory.step_path(step)
        missing = self._directory.missing(step)
        if missing is not None:
            return CheckpointError(
                f"`{call}`: {where} was deleted while it was read: it has no "
                f"`{missing}`. {self._remedy(step)}"
            )
        # Damaged files fail in too many ways to tell them from other errors.
        return CheckpointError(
            f"`{call}`: the arrays of {where} cannot be read ({first_line(error)}). "
            f"Unless that names another cause, its files are damaged. "
            f"{self._remedy(step)}"
        )
