"""Locks of files, which tell one process that another works in a folder."""

import sys
from typing import Any


def is_held(file: Any) -> bool:
    """Take the lock of an open file, unless another process holds it; returns whether one does.

    Worker processes do not inherit it, and a process that dies lets go of it.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # a file system without locks: nothing that could be asked
        return False
    return False
