"""The index of a set of files: made once, in parallel, kept on the disk, mapped into memory.

The cache folder has a file for each file of a set (so that a set that grows, or an indexing that was ended,
goes on where it was), and a folder for each set with one array in a file. Both are named by paths, sizes and
stamps: what was changed is looked at anew.
"""

import atexit
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from foveola import files
from foveola.data.decoding import Decoding
from foveola.data.identity import HASH, tables
from foveola.data.sample import DataError
from foveola.data.shards.parts import ARRAYS, NO_LABEL, ShardColumns, ShardPart
from foveola.data.shards.stores import REMOTE_AT_ONCE, Shard

_VERSION = 1
WORTH_PROCESSES = 2**28  # bytes of files on this machine from which on processes share the work
_SAID = 2**30  # bytes from which on a line says what is being done
MOST_PROCESSES = 16
Indexer = Callable[[Shard, ShardColumns], ShardPart]


class ShardIndex:
    """The n images of a set, one after the other in all of its files; arrays as in `ShardPart`, mapped from
    the disk.

    It goes to other processes as the name of a folder.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder, self.shards = folder, tuple(shards)
        about = json.loads((folder / "set.json").read_text(encoding="utf-8"))
        self.words: list[str] = about["words"]
        self.highest, self.left_out, self.example = about["highest"], about["left_out"], about["example"]
        self.distinct: bool = about["distinct"]  # whether names are
        self.starts = np.array(about["starts"], np.int64)  # the first image of each file, and their number
        self.stems = [] if self.distinct else _stems(shards)
        self._map()

    def _map(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        for name, (dtype, _) in ARRAYS.items():
            size = (self.folder / name).stat().st_size
            self.arrays[name] = np.memmap(self.folder / name, dtype, "r") if size else np.zeros(0, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: each for name, each in self.__dict__.items() if name != "arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def array(self, name: str) -> np.ndarray:
        """Return one of the arrays."""
        return self.arrays[name]

    def shard(self, row: int) -> Shard:
        """Return the file that holds an image."""
        return self.shards[int(np.searchsorted(self.starts, row, "right")) - 1]

    def name(self, row: int) -> str:
        """Return what an image is called; with the name of its file where several are called the same."""
        ends, names = self.array("name_ends"), self.array("names")
        shard = int(np.searchsorted(self.starts, row, "right")) - 1
        start = int(ends[row - 1]) if row else 0
        name = names[start : int(ends[row])].tobytes().decode("utf-8")
        return name if self.distinct else f"{self.stems[shard]}/{name}"

    def several(self, row: int) -> tuple[int, ...] | None:
        """Return the classes that an image lists; None where it lists none."""
        if not self.array("annotated")[row] & 2:
            return None
        ends = self.array("several_ends")
        return tuple(self.array("several")[int(ends[row - 1]) if row else 0 : int(ends[row])].tolist())

    def hashes(self) -> np.ndarray:
        """Return the table of hashes of contents (S16 [n]; empty: not yet known), which can be written to."""
        return self._table("hashes")

    def sizes(self, reading: Decoding) -> np.ndarray:
        """Return the table of sizes of images as they are read in a way (S16 [n], the bytes of four uint32;
        empty: not yet known), which can be written to.
        """
        return self._table(f"sizes-{hashlib.sha256(repr(reading).encode()).hexdigest()[:20]}")

    def _table(self, name: str) -> np.ndarray:
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != len(self) * HASH.itemsize:
            try:
                with files.whole(path) as part, part.open("wb") as file:
                    file.truncate(len(self) * HASH.itemsize)
            except OSError:
                return np.zeros(len(self), HASH)
        return np.memmap(path, HASH, "r+" if os.access(path, os.W_OK) else "c")


def _stems(shards: Sequence[Shard]) -> list[str]:
    """The names of files without suffix; paths where some are called the same."""
    names = [shard.name for shard in shards]
    if len({*names}) < len(names):
        names = [shard.path.replace("://", "/").strip("/") for shard in shards]
    return [name.rsplit(".", 1)[0] for name in names]


def index_of(shards: list[Shard], columns: ShardColumns, indexer: Indexer) -> ShardIndex:
    """Return the index of files, made where the cache does not have it. Raises DataError for what is wrong
    with a file.
    """
    own = hashlib.sha256(repr([_VERSION, indexer.__name__, *_keys(shards, columns)]).encode()).hexdigest()[
        :20
    ]
    cache = _cache()
    folder = cache / own
    with suppress(OSError, ValueError, KeyError):
        return ShardIndex(folder, shards)
    with _alone(cache / f"{own}.lock"):
        with suppress(OSError, ValueError, KeyError):  # another process has made it
            return ShardIndex(folder, shards)
        _merge(folder, _make_parts(cache, shards, columns, indexer))
    return ShardIndex(folder, shards)


def _keys(shards: list[Shard], columns: ShardColumns) -> list[str]:
    return [f"{each.path}\0{each.size}\0{each.stamp}\0{columns}" for each in shards]


def _cache() -> Path:
    """The folder that keeps indices; one of this process alone where it cannot be written to."""
    cache = tables().parent / "shards"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
        reason = "it cannot be written to"
    except OSError as error:
        reason = error.strerror or str(error)
    print(
        f"the index of shards is not kept, but made at each start: {cache}: {reason}; FOVEOLA_CACHE names "
        "another folder",
        file=sys.stderr,
        flush=True,
    )
    folder = tempfile.mkdtemp(prefix="foveola-shards-")
    atexit.register(rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time make an index: the others wait, and find it."""
    with path.open("w") as file:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    with suppress(OSError):
        path.unlink(missing_ok=True)


# -- parts --------------------------------------------------------------------------------------------------


def _make_parts(cache: Path, shards: list[Shard], columns: ShardColumns, indexer: Indexer) -> list[Path]:
    """ShardIndex each file of which there is none yet, several at once."""
    names = [hashlib.sha256(f"{_VERSION} {indexer.__name__} {key}".encode()).hexdigest()[:24]
             for key in _keys(shards, columns)]  # fmt: skip
    paths = [cache / "parts" / name[:2] / f"{name}.npz" for name in names]
    missing = [at for at, path in enumerate(paths) if not path.is_file()]
    if not missing:
        return paths
    size = sum(shards[at].size for at in missing)
    if size >= _SAID:
        count = f"{len(missing):,} of {len(shards):,}" if len(missing) < len(shards) else f"{len(missing):,}"
        print(f"{count} files ({size / 2**30:.1f} GiB) are indexed, once; their index is kept in {cache}",
              file=sys.stderr, flush=True)  # fmt: skip
    work = [partial(_index_one, indexer, shards[at], columns, paths[at]) for at in missing]
    done_by = _pool(shards, len(work), size)
    run_all(done_by, work, "index", "indexed shards was ended; what is indexed is kept")
    return paths


def run_all(pool: Executor | None, work: Sequence[Callable[[], Any]], label: str | None, ended: str) -> None:
    """Call functions, in a pool where there is one, with a bar (`label`) on a terminal.

    When one raises, those that have not begun do not. Raises DataError where a process of the pool is gone:
    "a process that" `ended`.
    """
    if pool is None:
        for each in shown_bar(work, len(work), label):
            each()
        return
    with pool:
        running = [pool.submit(each) for each in work]
        try:
            for done in shown_bar(as_completed(running), len(running), label):
                done.result()
        except BrokenProcessPool:
            raise DataError(f"a process that {ended}: start again") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _index_one(indexer: Indexer, shard: Shard, columns: ShardColumns, path: Path) -> None:
    indexer(shard, columns).save(path)


def _pool(shards: list[Shard], count: int, size: int) -> Executor | None:
    if count < 2:
        return None
    if shards[0].remote:
        return ThreadPoolExecutor(min(count, REMOTE_AT_ONCE))
    processes = min(count, os.cpu_count() or 1, MOST_PROCESSES)
    if size < WORTH_PROCESSES or processes < 2:
        return None
    if sys.platform != "linux":  # new processes would run the caller's script once more
        return None
    return ProcessPoolExecutor(processes, get_context("fork"))


def shown_bar(items: Any, count: int, label: str | None) -> Any:
    """Iterate with a bar on a terminal; without one where there is no `label`."""
    if label is None or count < 2 or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, label, total=count, console=Console(stderr=True), transient=True)


# -- of all of them -----------------------------------------------------------------------------------------


def _merge(folder: Path, paths: list[Path]) -> None:
    """Lay the arrays of parts one after the other, in files of a folder that is there when all are."""
    for stale in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
        rmtree(stale, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        about = _append(building, paths)
        (building / "set.json").write_text(json.dumps(about), encoding="utf-8")
        rmtree(folder, ignore_errors=True)  # damaged
        building.replace(folder)
    except BaseException:
        rmtree(building, ignore_errors=True)
        raise


def _append(building: Path, paths: list[Path]) -> dict[str, Any]:
    words = _all_words(paths)
    index = {word: number for number, word in enumerate(words)}
    starts, several, names, hashes = [0], 0, 0, []
    about: dict[str, Any] = {"words": words, "highest": NO_LABEL, "left_out": 0, "example": ""}
    opened = {name: (building / name).open("wb") for name in ARRAYS}
    try:
        for path in paths:
            part = _loaded(path)
            numbers = np.array([*(-2 - index[word] for word in part.words)], np.int32)
            for name in ("labels", "several"):
                found = part.arrays[name]
                part.arrays[name] = found.copy()
                text = found <= -2
                part.arrays[name][text] = numbers[-2 - found[text]]
            part.arrays["several_ends"] = part.arrays["several_ends"] + several
            part.arrays["name_ends"] = part.arrays["name_ends"] + names
            several, names = several + len(part.arrays["several"]), names + len(part.arrays["names"])
            for name, array in part.arrays.items():
                opened[name].write(array.tobytes())
            hashes.append(part.arrays["name_hashes"])
            starts.append(starts[-1] + len(part))
            about["highest"] = max(about["highest"], part.highest)
            about["left_out"] += part.left_out
            about["example"] = about["example"] or part.example
    finally:
        for file in opened.values():
            file.close()
    every = np.sort(np.concatenate(hashes))
    return about | {"starts": starts, "distinct": not bool((every[1:] == every[:-1]).any())}


def _all_words(paths: list[Path]) -> list[str]:
    return sorted({word for path in paths for word in _loaded(path).words})


def _loaded(path: Path) -> ShardPart:
    part = ShardPart.load(path)
    if part is None:
        path.unlink(missing_ok=True)
        raise DataError(f"{path}: a part of an index is damaged; it is removed: start again")
    return part
