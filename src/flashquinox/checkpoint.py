"""Checkpoints of a model and the state of its optimizer, stored by Orbax."""

from ._checkpoint.checkpoints import Checkpoints as Checkpoints
from ._common.errors import CheckpointError as CheckpointError
from ._common.short_types import show_short_types as _show_short_types


_show_short_types(vars().values())
