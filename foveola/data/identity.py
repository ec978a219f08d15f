"""What a data set is, by its contents: a hash of every image, its label and its annotations.

Names say nothing about pixels, sizes and times little. So the bytes of files are read, once: a small table on
the disk keeps the hash of each file with its path, size and times, and a file of which one of these differs
is read again. A table that is missing, damaged or cannot be written costs time, and nothing else.
"""

import hashlib
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foveola.data.decoding import ImageFile, StoredFile
from foveola.data.sample import DataError, Objects

BYTES = 16  # of a hash: two of 10^9 images share one with a probability of 10^-21
HASH = np.dtype(f"S{BYTES}")  # numpy compares these as numbers of 16 bytes; empty: cannot be read
PREFIX = "content:"  # of the digests here; those of earlier versions were made of names
MAGIC = b"foveola hashes 1"
SETTLED = 2.0  # seconds: what was written later than that before it was read may change within one time stamp
SAVE_SECONDS = 30.0  # what a kill may cost
FILES_AT_ONCE = 1024  # files hashed between two looks at the clock
LARGE = 2**31  # bytes from which on reading them takes long enough to be said


@dataclass(frozen=True, eq=False)
class Identity:
    """The contents of a data set, in order: images by hash (S16 [n]; empty: unreadable), and all in one."""

    contents: np.ndarray
    digest: str

    @classmethod
    def of(cls, contents: np.ndarray, *about: Any) -> "Identity":
        """Make the identity of the images' contents, and of what tells the rest (arrays, bytes, values):
        labels, boxes, ...
        """
        whole = hashlib.sha256(contents.tobytes())
        for part in about:
            data = part.tobytes() if isinstance(part, np.ndarray) else part
            data = data if isinstance(data, bytes) else repr(data).encode(errors="surrogateescape")
            whole.update(b"%d " % len(data) + data)
        return cls(contents, PREFIX + whole.hexdigest()[:24])


_KEPT: ContextVar[dict[Any, tuple[Any, Identity]] | None] = ContextVar("kept", default=None)
_SAYING: ContextVar[bool] = ContextVar("saying", default=False)


@contextmanager
def looked_at_once() -> Iterator[None]:
    """Let `identity_of`, within this (it also decorates a function), look at each source once."""
    kept = _KEPT.get()
    tokens = _KEPT.set({} if kept is None else kept), _SAYING.set(_SAYING.get())
    try:
        yield
    finally:
        _KEPT.reset(tokens[0])
        _SAYING.reset(tokens[1])


def say(progress: bool) -> None:
    """Set whether, until the end of `looked_at_once`, slow work is reported on standard error."""
    _SAYING.set(progress)


@contextmanager
def saying(progress: bool) -> Iterator[None]:
    """Set whether, within this, slow work is reported on standard error."""
    token = _SAYING.set(progress)
    try:
        yield
    finally:
        _SAYING.reset(token)


def identity_of(source: Any, chosen: np.ndarray | None = None) -> Identity:
    """Return the identity of a source, or of its images `chosen` (indices, ascending).

    Equal digests: the same images in the same order with the same labels, classes and annotations; names and
    paths do not count. A source says it in `identity(chosen)`; of one that has no such method all samples
    are gone through, not decoded: bytes of files, pixels, labels, objects and label maps.
    """
    if chosen is not None and len(chosen) == len(source):
        chosen = None
    kept = _KEPT.get()
    name = id(source), None if chosen is None else chosen.tobytes()
    if kept is not None and name in kept:
        return kept[name][1]
    own = getattr(source, "identity", None)
    found = _of_samples(source, chosen) if own is None else own(chosen)
    if kept is not None:
        kept[name] = source, found  # with the source itself, so that no other gets its id
    return found


def shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return which of the contents `a` are among `b`: bool [len(a)]; what cannot be read is not."""
    return np.isin(a, b) & (a != b"")


def hash_of(data: Any) -> bytes:
    """Return the hash of a file (a Path), of the bytes of one, or of an array; empty for a file that is
    missing.
    """
    if isinstance(data, ImageFile):
        return hash_of(data.data)
    if isinstance(data, Path):
        return _hash_file(str(data))
    if isinstance(data, StoredFile):
        return hash_of(data.read_bytes())
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()[:BYTES]
    array = np.ascontiguousarray(data)
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).digest()[:BYTES]


def _of_samples(source: Any, chosen: np.ndarray | None) -> Identity:
    contents, about = [], hashlib.sha256()
    for index in range(len(source)) if chosen is None else chosen.tolist():
        try:
            sample = source[index]
        except DataError:
            contents.append(b"")
            continue
        contents.append(hash_of(sample.image))
        about.update(repr((sample.label, getattr(sample.image, "reading", None))).encode())
        if hasattr(source, "answers"):
            about.update(repr([int(label) for label in source.answers(index)]).encode())
        for part in (*_parts(sample.objects), *_parts(sample.crowds)):
            about.update(hash_of(part))
        if hasattr(source, "label_map"):
            try:
                about.update(hash_of(source.label_map(index)))
            except DataError:
                about.update(b"-")
    more = [getattr(source, name, None) for name in ("classes", "candidates")]
    return Identity.of(np.array(contents, HASH), about.digest(), *more)


def _parts(objects: Objects | None) -> Iterator[Any]:
    for part in () if objects is None else (objects.boxes, objects.areas, objects.labels):
        yield b"" if part is None else part
    if objects is not None and objects.scores is not None:
        yield objects.scores
    for mask in () if objects is None else objects.masks or ():
        yield mask if isinstance(mask, np.ndarray) else repr(mask).encode()


# -- files -------------------------------------------------------------------------------------------------


def hash_files(root: Path, files: Sequence[str], name: str) -> np.ndarray:
    """Return hashes (S16 [n]) of files below `root`, read where the table does not have them. `name` is
    shown.
    """
    with ThreadPoolExecutor(_threads()) as pool:
        table, paths, states, keys = _look_up(root, files, pool)
        found = np.zeros(len(paths), HASH)
        missing = table.fill(found, keys)
        size = sum(state[0] for i in missing.tolist() if (state := states[i]))
        began = time.monotonic()
        blocks = range(0, len(missing), FILES_AT_ONCE)
        for start in shown_reading(blocks, (len(missing), size), name, table.path.parent):
            block = missing[start : start + FILES_AT_ONCE]
            found[block] = list(pool.map(_hash_file, (paths[i] for i in block.tolist())))
            now = time.time_ns() - int(SETTLED * 1e9)
            settled = [i for i in block.tolist() if (s := states[i]) and max(s[1:]) < now and found[i]]
            table.add(keys[settled], found[settled])
            if time.monotonic() - began > SAVE_SECONDS:
                table.save()
                began = time.monotonic()
        table.save()
    return found


class Stated(NamedTuple):
    """What is known of files that nobody reads."""

    sizes: np.ndarray  # bytes, int64 [n]; -1: no file
    times: np.ndarray  # of their contents in ns, int64 [n]; 0: no file
    hashes: np.ndarray  # S16 [n]; empty: the table has none


def stated(root: Path, files: Sequence[str]) -> Stated:
    """Return sizes, times, and those hashes that the table has, of files below `root`."""
    with ThreadPoolExecutor(_threads()) as pool:
        table, _, states, keys = _look_up(root, files, pool)
    found = np.zeros(len(files), HASH)
    table.fill(found, keys)
    size_and_time = np.array([state[:2] if state else (-1, 0) for state in states], np.int64).reshape(-1, 2)
    return Stated(size_and_time[:, 0], size_and_time[:, 1], found)


def _look_up(root: Path, files: Sequence[str], pool: ThreadPoolExecutor) -> Any:
    """The table of a folder, and of its files: paths, states and keys."""
    paths = [os.path.join(root, file) for file in files]  # noqa: PTH118 (speed)
    blocks = [paths[start : start + FILES_AT_ONCE] for start in range(0, len(paths), FILES_AT_ONCE)]
    states = [
        state
        for block_states in pool.map(lambda block: [*map(_state, block)], blocks)
        for state in block_states
    ]
    keys = np.array([_key(f, s) for f, s in zip(files, states, strict=True)], HASH)
    return Table(root), paths, states, keys


def tables(kind: str = "contents") -> Path:
    """Return where tables of files are: below FOVEOLA_CACHE, or in the user's own cache folder."""
    own = os.environ.get("FOVEOLA_CACHE")
    if own:
        return Path(own).expanduser() / kind
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user).expanduser() / "foveola" / kind


class Table:
    """Hashes of the files below one folder, by a hash of path, size and times; a file of its own on the disk.

    Layout: MAGIC, the SHA-256 of what follows, then pairs of key and hash, 16 bytes each, ascending. It is
    replaced whole. Of several processes that write at once one wins; what the others found is read again.
    """

    def __init__(self, root: Path, kind: str = "contents") -> None:
        where = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:20]
        self.path = tables(kind) / where
        self.rows = self._read()
        self.new: list[np.ndarray] = []

    def fill(self, found: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Write the known hashes of `keys` into `found`; the indices of the others, without empty keys."""
        known = self.rows[:, 0]
        at = np.searchsorted(known, keys)
        hit = np.zeros(len(keys), bool)
        inside = at < len(known)
        hit[inside] = (known[at[inside]] == keys[inside]) & (keys[inside] != b"")
        found[hit] = self.rows[at[hit], 1]
        return np.flatnonzero(~hit & (keys != b""))

    def add(self, keys: np.ndarray, hashes: np.ndarray) -> None:
        """Hold the hashes of files, which `save` writes."""
        self.new.append(np.stack([keys, hashes], axis=1))

    def save(self) -> None:
        """Merge what was added into the file, if it can be written."""
        if not any(map(len, self.new)):
            return
        rows = np.concatenate([*self.new, self._read()])  # others may have written meanwhile
        rows = rows[np.unique(rows[:, 0], return_index=True)[1]]
        body = rows.tobytes()
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(MAGIC + hashlib.sha256(body).digest() + body)
            part.replace(self.path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        self.new.clear()

    def _read(self) -> np.ndarray:
        """S16 [n, 2]: key and hash; none of a file that is missing or damaged."""
        nothing = np.zeros((0, 2), HASH)
        try:
            data = self.path.read_bytes()
        except OSError:
            return nothing
        start = len(MAGIC) + 32
        body = data[start:]
        whole = data[:start] == MAGIC + hashlib.sha256(body).digest() and len(body) % (2 * BYTES) == 0
        return np.frombuffer(body, HASH).reshape(-1, 2) if whole else nothing


def _threads() -> int:
    """Hashing keeps cores busy, a network file system lets them wait."""
    return min(16, 4 + (os.cpu_count() or 1))


def _state(path: str) -> tuple[int, int, int] | None:
    """Size and times (of the contents, and of any change to the file) in ns; None for what is no file."""
    try:
        found = os.stat(path)  # noqa: PTH116 (speed)
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns) if stat.S_ISREG(found.st_mode) else None


def _key(file: str, state: tuple[int, int, int] | None) -> bytes:
    if state is None:
        return b""
    return hashlib.sha256(os.fsencode(file) + b"\0%d %d %d" % state).digest()[:BYTES]


def _hash_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (speed)
            return hashlib.file_digest(file, "sha256").digest()[:BYTES]
    except (OSError, ValueError):
        return b""


def shown_reading(
    blocks: Sequence[int], count_and_bytes: tuple[int, int], name: str, folder: Path
) -> Iterable[int]:
    """Yield blocks of files whose contents are read, and show how far they are where that takes long."""
    count, size = count_and_bytes
    if size < LARGE or not _SAYING.get():
        return blocks
    what = f"{name}: the contents of {count:,} files ({size / 2**30:.1f} GiB) are read, once"
    print(f"{what}; their hashes are kept in {folder}", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        return blocks
    from rich.console import Console
    from rich.progress import track

    return track(blocks, "contents", console=Console(stderr=True), transient=True)
