"""Checkpoints of a model and the state of its optimizer, stored by Orbax."""

from ._checkpoint.checkpoints import Checkpoints as Checkpoints
from ._common.errors import CheckpointError as CheckpointError
