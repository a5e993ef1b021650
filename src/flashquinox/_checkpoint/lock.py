"""A lock for a directory: one writer at a time, among all processes and threads."""

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


# Seconds. Longer than the save of another writer should take.
_TIMEOUT = 600.0


def lock(call: str, directory: str) -> Callable[[], None]:
    """Waits until no other writer holds the lock of a directory, and takes it. The lock
    ends with the process at the latest, even if that is killed. Where there are no
    locks, as in stores by address, this does nothing.

    **Returns:**

    A function that releases the lock.
    """
    if fcntl is None or "://" in directory:
        return lambda: None
    try:
        file = os.open(directory, os.O_RDONLY)
    except OSError:
        # The error will be raised when files are written.
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
        # Unlocks the copies of this file that forked processes have, too.
        unlock()
        os.close(file)

    return release
