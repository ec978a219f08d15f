"""Files of a set, here or behind a URL: which there are, and parts of them, read at random.

A file is known with its size and a stamp (its time, or the tag that a server gives it). Each part is read
only from a file that still has both: positions in one that was changed mean nothing.
"""

import errno
import hashlib
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, lru_cache
from glob import glob, has_magic
from itertools import product
from pathlib import Path
from typing import Any
from weakref import finalize

from foveola import files
from foveola.config import path_hint
from foveola.data.sample import DataError

OPEN_FILES = 128  # of each process
_BLOCK = 4 * 2**20  # bytes of a file behind a URL that are fetched and kept at once, where a cache is
# What no server causes, but a mistake in a program.
INNER_FAULTS = (TypeError, AttributeError, NameError, AssertionError, LookupError, RecursionError)
REMOTE_AT_ONCE = 16  # questions to a server
STAMPS = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "updated", "created")
COMPRESSED = {
    b"\x1f\x8b": "gzip -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ": "xz -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
}
BRACES = re.compile(r"\{([^{}]*)\}")
RUN = re.compile(r"(\d+)\.\.(\d+)")
_MANY = 10**7  # files that one pattern may name


@dataclass(frozen=True)
class Shard:
    """A file of a set: path or URL, bytes, and what changes when its contents do."""

    path: str
    size: int
    stamp: str
    cache: str | None = None  # folder for parts of what lies behind a URL

    @property
    def remote(self) -> bool:
        """Whether it lies behind a URL."""
        return is_url(self.path)

    @property
    def name(self) -> str:
        """The name of the file alone."""
        return self.path.rsplit("/", 1)[-1]

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on. Raises OSError, and DataError where the file was changed."""
        data = _read_remote(self, start, size) if self.remote else _read_local(self, start, size)
        if len(data) > size:
            raise DataError(
                f"{self.path}: the server gives whole files alone, and no parts of them (range requests): "
                "copy it to a disk, or to a server that does"
            )
        if len(data) != size:
            raise DataError(f"{self.path}: {why_changed(self)}")
        return data


def why_changed(shard: Shard) -> str:
    """Return the words for a file that is not what it was when it was indexed."""
    return (
        "was changed since it was indexed "
        f"({shard.size} bytes then): start again, which reads what is there now; training goes on where "
        "it was"
    )


def is_url(path: str) -> bool:
    """Return whether a path is a URL, as `s3://bucket/data`."""
    return "://" in path


def find_shards(kind: str, location: str, suffix: str, cache: str | None = None) -> list[Shard]:
    """Return the files that a path names, in the order of their paths: a file, a folder (all files of the
    suffix below it), a pattern with `*`, or with `{000..127}` and `{a,b}` as shells have them, here or behind
    a URL.

    Raises DataError, in one line, where there are none, or where one of a list is missing.
    """
    if cache is not None and not is_url(location):
        raise DataError(f"{kind}: cache= is for what lies behind a URL; {location} is on this machine")
    found: dict[str, Shard] = {}
    there = not is_url(location) and Path(location).expanduser().exists()  # names may hold what patterns do
    paths = [location] if there else list(braced(location))
    look = _look_remote if is_url(location) else _look_local
    if len(paths) > 1 and is_url(location) and not any(map(has_magic, paths)):
        with ThreadPoolExecutor(REMOTE_AT_ONCE) as pool:
            several = list(pool.map(lambda each: look(kind, each, suffix), paths))
    else:
        several = [look(kind, each, suffix) for each in paths]
    for block in several:
        found |= {shard.path: replace(shard, cache=cache) for shard in block}
    return [found[path] for path in sorted(found)]


def braced(pattern: str) -> Iterator[str]:
    """Yield the texts that a pattern with braces stands for: `{00..11}` counts with leading zeros, `{a,b}`
    names each.
    """
    parts = BRACES.split(pattern)  # plain text and the insides of braces take turns
    choices: list[Sequence[str]] = []
    count = 1
    for number, part in enumerate(parts):
        choices.append(_choices(part) if number % 2 else [part])
        count *= len(choices[-1])
        if count > _MANY:
            raise DataError(f"{pattern}: names more than {_MANY:,} files")
    yield from map("".join, product(*choices))


def _choices(inside: str) -> Sequence[str]:
    run = RUN.fullmatch(inside)
    if run is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    low, high = run.groups()
    width = len(low) if low.startswith("0") or len(low) == len(high) else 0
    if int(low) > int(high):
        raise DataError(f"{{{inside}}}: a run of numbers ends below its beginning")
    if int(high) - int(low) > _MANY:
        raise DataError(f"{{{inside}}}: names more than {_MANY:,} files")
    return [f"{number:0{width}}" for number in range(int(low), int(high) + 1)]


def read_beside(kind: str, location: str) -> bytes | None:
    """Return a small file that may be there; None where it is not."""
    if not is_url(location):
        path = Path(location).expanduser()
        return path.read_bytes() if path.is_file() else None
    system, path = _file_system(kind, location)
    try:
        return system.cat_file(path)
    except Exception:  # whatever a server says of a file that it does not have
        return None


# -- on this machine ----------------------------------------------------------------------------------------


def _look_local(kind: str, location: str, suffix: str) -> list[Shard]:
    path = Path(location).expanduser()
    if has_magic(location) and not path.exists():
        paths = [Path(each) for each in glob(str(path), recursive=True)]  # noqa: PTH207 (of any root)
        paths = [each for each in paths if each.is_file()]
    elif path.is_dir():
        paths = [p for p in path.rglob(f"*{suffix}") if p.is_file() and not p.name.startswith(".")]
        if not paths:
            _refuse_compressed(kind, path, suffix)
    elif path.is_file():
        paths = [path]
    else:
        raise DataError(f"{kind}: no file or folder {path}{path_hint(path)}")
    if not paths:
        raise DataError(f"{kind}: no file {suffix} is at {location}")
    return [_stated(each) for each in paths]


def _refuse_compressed(kind: str, folder: Path, suffix: str) -> None:
    packed = sorted(folder.rglob(f"*{suffix}.*")) + sorted(folder.rglob("*.tgz"))
    if packed and suffix == ".tar":
        raise DataError(
            f"{kind}: {folder} holds no {suffix} files, but compressed ones, such as {packed[0].name}: "
            "images "
            "are compressed themselves, and nothing can be read at random within; decompress them (gzip -d)"
        )


def _stated(path: Path) -> Shard:
    found = path.stat()
    return Shard(str(path.absolute()), found.st_size, str(found.st_mtime_ns))


class _Opened:
    """A file that is open for as long as somebody has it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        finalize(self, os.close, self.number)

    def is_as(self, shard: Shard) -> bool:
        found = os.fstat(self.number)
        return (found.st_size, str(found.st_mtime_ns)) == (shard.size, shard.stamp)


@lru_cache(maxsize=OPEN_FILES)
def _opened(shard: Shard) -> _Opened:
    return _Opened(shard.path)


def _read_local(shard: Shard, start: int, size: int) -> bytes:
    opened = _opened(shard)
    if not opened.is_as(shard):
        raise DataError(f"{shard.path}: {why_changed(shard)}")
    return os.pread(opened.number, size, start)


# -- behind a URL -------------------------------------------------------------------------------------------


def _file_system(kind: str, url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise DataError(f"{kind}: a URL needs the extra `remote`: pip install 'foveola[remote]'") from error
    try:
        return url_to_fs(url)
    except ImportError as error:  # of a protocol that needs a package
        what = f"{_reason(error).rstrip('.')}: pip install 'foveola[remote]'"
        raise DataError(f"{kind}: {url}: {what}, where it is one of that extra") from error
    except ValueError as error:  # of a protocol that nobody knows
        raise DataError(f"{kind}: {url}: {_reason(error)}") from error


def _look_remote(kind: str, location: str, suffix: str) -> list[Shard]:
    system, path = _file_system(kind, location)
    protocol = location.split("://", 1)[0]
    try:
        if has_magic(path):
            found = system.glob(path, detail=True)
        else:
            about = system.info(path)
            found = {path: about}
            if about.get("type") == "directory":
                found = {
                    name: each
                    for name, each in system.find(path, detail=True).items()
                    if name.endswith(suffix)
                }
        found = _with_sizes(system, found)
    except Exception as error:  # whatever a server and its library answer
        raise DataError(f"{kind}: {location} cannot be read: {_reason(error)}") from error
    shards = []
    for name, about in found.items():
        if about.get("type") == "directory":
            continue
        url = name if is_url(name) else f"{protocol}://{name}"
        if not isinstance(about.get("size"), int):
            raise DataError(
                f"{kind}: the server does not say how large {url} is, so it cannot be read in parts"
            )
        shards.append(Shard(url, about["size"], stamp_of(about)))
    if not shards:
        raise DataError(f"{kind}: no file {suffix} is at {location}")
    return shards


def _with_sizes(system: Any, found: dict[str, Any]) -> dict[str, Any]:
    """What is known of files, with their sizes, which listings of web servers do not say."""
    lacking = [name for name, about in found.items() if not isinstance(about.get("size"), int)
               and about.get("type") != "directory"]  # fmt: skip
    with ThreadPoolExecutor(REMOTE_AT_ONCE) as pool:
        return found | dict(zip(lacking, pool.map(system.info, lacking), strict=True))


def stamp_of(about: dict[str, Any]) -> str:
    """Return what a file system says of a version of a file; empty where it says nothing but its size."""
    found = next((about[name] for name in STAMPS if about.get(name) is not None), "")
    return str(found.timestamp() if isinstance(found, datetime) else found)  # listings and files differ


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):  # whose text is a path alone
        cause = error.__cause__
        return "there is no such file" if cause is None else _reason(cause)
    if isinstance(error, INNER_FAULTS):
        where = traceback.extract_tb(error.__traceback__)
        line = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else ""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return f"a fault inside foveola or its libraries, not of the server: {reason}{line}"
    return " ".join((str(error) or type(error).__name__).split())[:300]


@cache
def _check_once(shard: Shard, process: int) -> None:
    """Ask the server once in each process whether a file is still the same."""
    system, path = _file_system("shards", shard.path)
    system.invalidate_cache(path)
    about = system.info(path)
    if (about.get("size"), stamp_of(about)) != (shard.size, shard.stamp):
        raise DataError(f"{shard.path}: {why_changed(shard)}")


def _read_remote(shard: Shard, start: int, size: int) -> bytes:
    try:
        _check_once(shard, os.getpid())
        if shard.cache is not None:
            return _read_cached(shard, start, size)
        return _fetch(shard, start, size)
    except DataError:
        raise
    except Exception as error:  # whatever a server and its library answer: the loader asks again
        raise OSError(errno.EIO, f"{shard.path}: {_reason(error)}") from error


def _fetch(shard: Shard, start: int, size: int) -> bytes:
    if not size:
        return b""
    system, path = _file_system("shards", shard.path)
    return system.cat_file(path, start=start, end=start + size)


def _read_cached(shard: Shard, start: int, size: int) -> bytes:
    """Read from blocks of the file that a folder holds, each a whole file of its own."""
    about = f"{shard.path}\0{shard.size}\0{shard.stamp}"
    folder = Path(str(shard.cache)).expanduser() / hashlib.sha256(about.encode()).hexdigest()[:20]
    parts = []
    for number in range(start // _BLOCK, -(-(start + size) // _BLOCK)):
        first = number * _BLOCK
        length = min(_BLOCK, shard.size - first)
        path = folder / f"{number:06d}"
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        if len(data) != length:
            data = _fetch(shard, first, length)
            with files.whole(path) as part:
                part.write_bytes(data)
        parts.append(data[max(start - first, 0) : start + size - first])
    return b"".join(parts)


class Walked:
    """A file that is gone through from its beginning, with what `tarfile` asks of one: parts are read ahead.

    No more than `most` bytes are given at once, whatever a damaged header asks for.
    """

    def __init__(self, shard: Shard, ahead: int, most: int) -> None:
        self.shard, self.ahead, self.most = shard, ahead, most
        self.at, self.first, self.held = 0, 0, b""

    def seek(self, at: int, whence: int = 0) -> int:
        """Go to a position, counted from the beginning."""
        assert whence == 0
        self.at = at
        return at

    def tell(self) -> int:
        """Return the position."""
        return self.at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; fewer at the end of the file. Raises DataError for too many."""
        size = self.shard.size - self.at if size < 0 else size
        if size > self.most:
            raise DataError(f"{self.shard.path}: a header of {size} bytes at {self.at}, which none has")
        size = max(min(size, self.shard.size - self.at), 0)
        start = self.at - self.first
        if start < 0 or start + size > len(self.held):
            self.first, start = self.at, 0
            self.held = self.shard.read(self.at, min(max(self.ahead, size), self.shard.size - self.at))
        self.at += size
        return self.held[start : start + size]
