"""Files that are whole or not there: written under another name beside their own, then renamed."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from foveola.config import UserError

STALE_SECONDS = 3600.0  # no write takes so long: what is older was left by a process that was killed


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path to write to, in the folder of `path` (made if needed), which becomes `path` when the block ends.

    An error or a kill inside the block leaves the file that was there before, or none. The file gets the
    permissions that any new file gets (0666 & ~umask), also from libraries that write private ones, and is on
    the disk before it has its name. What killed processes left of earlier writes of `path` is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode  # asking for the umask would mean to change it, for all threads
        yield part
        if part.stat().st_mode != mode:
            part.chmod(mode)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # the disk may be the reason
            part.unlink(missing_ok=True)
        raise


def check_place(folder: str | Path, remedy: str) -> None:
    """Raise UserError, before any work is done for it, where no file can be written to `folder`.

    Nothing is made: the nearest folder that exists must be one, and be open to writing.
    """
    place = Path(folder).expanduser()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{place} is a file where a folder belongs: {remedy}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} cannot be written to: {remedy}")


def write_text(path: str | Path, text: str) -> Path:
    """Write a file of UTF-8 text as a whole; returns its path."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def _remove_stale(path: Path) -> None:
    # Not by a pattern: names may hold the letters that patterns are made of.
    for left in path.parent.iterdir():
        stem, _, process = left.name.rpartition(".")
        if stem == f".{path.name}" and process.isdecimal():
            with suppress(OSError):  # another process was first, or it is not ours to remove
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()
