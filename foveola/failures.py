"""Faults of the machine in one line: full disks, rights, limits, memory, processes that are gone."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from foveola.config import UserError

_MEMORY = "give it more memory, or a smaller model, batch or number of workers"
# What the system says, and what to do about it.
_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose another place",
    errno.EACCES: "get the rights, or choose another place",
    errno.EPERM: "get the rights, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit (ulimit -n 4096), or use fewer workers",
    errno.ENFILE: "raise the limit, or use fewer workers",
    errno.ENOTDIR: "a file stands where a folder belongs",
    errno.EEXIST: "something else stands there: choose another place",
    errno.EISDIR: "a folder stands where a file belongs",
    errno.ENOMEM: _MEMORY,
}
# RuntimeErrors of torch that tell of the machine, by a part of their text.
_OF_TORCH = {
    r"enforce fail at inline_container|PytorchStreamWriter failed|iostream error": (
        "writing failed: the disk is full, or a limit on the size of files was met; make room"
    ),
    r"allocate memory|out of memory|not enough memory|unable to mmap|alloc_cpu": f"out of memory: {_MEMORY}",
    r"Storage size calculation overflowed|multiplication overflow|Invalid buffer size": (
        "out of memory: no machine has as much as these sizes ask for"
    ),
    r"shared memory\(shm\)|shared memory object|torch_shm": (
        "out of shared memory: make /dev/shm larger (docker run --shm-size=8g), or set workers to 0"
    ),
    r"DataLoader worker": "a process that reads images has ended, perhaps for lack of memory; use fewer",
    r"closed by peer|reset by peer|NCCL|gloo|[Tt]imed out waiting|TCPStore": (
        "another process of this run has ended or cannot be reached; its own message says why"
    ),
}


def explain(error: BaseException) -> str | None:
    """Return one line for a fault of the machine: what, where, and what to do. None for any other error."""
    if isinstance(error, MemoryError):
        return f"out of memory: {str(error) or 'nothing is left'}; {_MEMORY}"
    if isinstance(error, OSError):
        return _of_system(error)
    first = (str(error).strip().splitlines() or [""])[0]
    if type(error).__name__ == "SafetensorError":
        number = re.search(r"os error (\d+)", first)
        return f"{first}{_remedy(int(number[1])) if number else ''}"
    if isinstance(error, RuntimeError):
        for pattern, words in _OF_TORCH.items():
            if re.search(pattern, str(error)):
                return words
    return None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn faults of the machine into a UserError that begins with `what` could not be done, and where."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := explain(error)) is None:
            raise
        raise UserError(f"{what}: {reason}") from error


def _of_system(error: OSError) -> str:
    if error.errno is None:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)]
    where = f"{' -> '.join(names)}: " if names else ""
    return f"{where}{error.strerror}{_remedy(error.errno)}"


def _remedy(number: int) -> str:
    return f"; {_REMEDIES[number]}" if number in _REMEDIES else ""
