"""One writer at a time in a directory, in whichever process or thread it is."""

import functools
import os
import time
from collections.abc import Callable

from .._common.errors import CheckpointError


try:
    import fcntl
except ImportError:
    # Windows has no locks of directories.
    fcntl = None


# Seconds.
_TIMEOUT = 600.0


def lock(call: str, directory: str) -> Callable[[], None]:
    """Waits until no other writer has the directory, and takes it. The lock ends with
    the process, however that ends. Where there are none, as in stores by address, this
    does nothing.

    **Returns:**

    A function that gives the directory free.
    """
    if fcntl is None or "://" in directory:
        return lambda: None
    try:
        file = os.open(directory, os.O_RDONLY)
    except OSError:
        # What is wrong will be said when files are written.
        return lambda: None
    unlock = functools.partial(fcntl.flock, file, fcntl.LOCK_UN)
    deadline = time.monotonic() + _TIMEOUT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(file)
                raise CheckpointError(
                    f"`{call}`: another `Checkpoints` has been writing to {directory} "
                    f"for {_TIMEOUT:.0f} seconds, in this process or another one. End "
                    "that, or use another directory."
                ) from None
            time.sleep(0.02)
        except OSError:
            # A file system without locks.
            break

    def release() -> None:
        # Of a copy that a forked process may have, too.
        unlock()
        os.close(file)

    return release
