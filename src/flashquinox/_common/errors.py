"""Errors that callers may want to catch."""


class CheckpointError(ValueError):
    """A checkpoint that does not exist, is damaged, was written by another library, or
    does not fit the trees to restore to. The message says which, and what to do."""
