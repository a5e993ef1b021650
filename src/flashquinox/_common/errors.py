"""Errors that callers may want to catch."""


class CheckpointError(ValueError):
    """A checkpoint that does not exist, is damaged, is none of this library, or does
    not fit what it should be restored to. The message says which, and what to do."""
