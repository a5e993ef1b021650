"""Errors of Orbax and tensorstore, as messages show them."""


def first_line(error: BaseException) -> str:
    """The type and the first line of an error, at most 240 characters of it."""
    line = str(error).strip().partition("\n")[0]
    # Tensorstore adds all that it knows; what the system said comes last.
    line = line.partition(" [tensorstore_spec=")[0].rstrip(".")
    if len(line) > 240:
        line = f"{line[:80]} ... {line[-150:]}"
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
