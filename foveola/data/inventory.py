"""What the images of a data set were: name, size, time and, where they were read, a hash of each.

A digest tells that data are others; an inventory that was kept tells which images.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from foveola import files
from foveola.data.identity import HASH, hash_files, stated

KEPT = np.dtype("S8")  # of a hash: two of a million images share the first half with a probability of 10^-7
CHANGES_NAMED = 3  # images that are named of each kind of change
PARTS = ("names", "sizes", "times", "hashes")


@dataclass(frozen=True, eq=False)
class Inventory:
    """Images in order: what there is to compare, without reading them again.

    Sources that do not consist of files have no names; sizes are -1 and times 0 then.
    """

    names: list[bytes]  # paths below the folder
    sizes: Int64[np.ndarray, "n"]  # bytes; -1: cannot be read
    times: Int64[np.ndarray, "n"]  # of the contents, ns
    hashes: np.ndarray  # S8 [n]; empty: not known
    root: Path | None = None  # the folder, where the images can be read

    def __len__(self) -> int:
        return len(self.hashes)

    def name(self, index: int) -> str:
        """Return what an image is called in messages."""
        if not self.names:
            return f"image {index}"
        return self.names[index].decode("utf-8", "backslashreplace")

    def save(self, path: Path) -> None:
        """Write the inventory to a compressed .npz file."""
        text = np.frombuffer(b"\0".join(self.names), np.uint8)  # no name holds this byte
        with files.whole(path) as part, part.open("wb") as file:
            np.savez_compressed(file, names=text, sizes=self.sizes, times=self.times, hashes=self.hashes)


def inventory_of(source: Any, read: Int64[np.ndarray, "r"], contents: np.ndarray) -> Inventory:
    """Make the inventory of a source, of which the images `read` (indices) have the hashes `contents` (S16
    [r]).
    """
    n = len(source)
    names, hashes, root = [], np.zeros(n, HASH), None
    sizes, times = np.full(n, -1), np.zeros(n, np.int64)
    if below := getattr(source, "files_below", None):
        root, paths = below()
        names = [os.fsencode(path) for path in paths]
        sizes, times, hashes = stated(root, paths)
    elif own := getattr(source, "stated", None):
        names, sizes, times, hashes = own()
    hashes[read] = contents
    sizes[read[contents == b""]] = -1
    return Inventory(names, sizes, times, hashes.astype(KEPT), root)


def load_inventory(path: Path) -> Inventory | None:
    """Return what `Inventory.save` wrote; None for a file that is missing or damaged."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            text, *rest = (file[part] for part in PARTS)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    names = text.tobytes().split(b"\0") if len(text) else []
    fits = len({len(part) for part in rest}) == 1 and len(names) in (0, len(rest[0]))
    return Inventory(names, *rest) if fits else None


# -- differences -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageDifference:
    """Names of the images that differ, of each kind all of them; `untold`: perhaps replaced, perhaps not."""

    added: Sequence[str]
    removed: Sequence[str]
    replaced: Sequence[str]
    renamed: Sequence[str]
    unreadable: Sequence[str]
    untold: Sequence[str]

    def __str__(self) -> str:
        """How many images of each kind, and the first names; empty where all are the same."""
        return ", ".join(
            f"{len(names):,} {kind} ({first_names(names)})"
            for kind, names in (
                ("added", self.added),
                ("removed", self.removed),
                ("replaced", self.replaced),
                ("renamed", self.renamed),
                ("cannot be read any more", self.unreadable),
            )
            if names
        )


def first_names(names: Sequence[str]) -> str:
    """Return the first names of a list, as text."""
    return ", ".join([*names[:CHANGES_NAMED], *(["..."] if len(names) > CHANGES_NAMED else [])])


def compare_inventories(before: Inventory, now: Inventory, limit: int) -> ImageDifference | None:
    """Return which images differ; None where that cannot be known.

    Images of files are compared by name: their sizes, and their hashes where both are known. Where a hash was
    kept and the time of the file is another, the file is read (at most `limit` of such files, spread evenly).
    """
    if bool(before.names) != bool(now.names):
        return None
    if not now.names:
        return _of_contents(before, now)
    a, b, gone, new = _paired(before, now)
    now = _read_again(before, now, (a, b), limit)
    both = (before.hashes[a] != b"") & (now.hashes[b] != b"")
    lost = (now.sizes[b] == -1) & (before.sizes[a] != -1)
    other = (before.sizes[a] != now.sizes[b]) | (both & (before.hashes[a] != now.hashes[b]))
    untold = ~other & ~both & (before.times[a] != now.times[b]) & (now.sizes[b] != -1)
    renamed = list(_renamed(before, now, gone, new))
    left, right = ({pair[side] for pair in renamed} for side in (0, 1))

    def names(chosen: Bool[np.ndarray, "p"]) -> list[str]:
        return [now.name(index) for index in b[chosen].tolist()]

    return ImageDifference(
        added=[now.name(j) for j in new if j not in right],
        removed=[before.name(i) for i in gone if i not in left],
        replaced=names(other & ~lost),
        renamed=[f"{before.name(i)} to {now.name(j)}" for i, j in renamed],
        unreadable=names(lost),
        untold=names(untold),
    )


def _paired(before: Inventory, now: Inventory) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """Indices in both of the same names, indices in `before` alone, and in `now` alone."""
    if before.names == now.names:
        every = np.arange(len(now))
        return every, every, [], []
    then, today = ({name: i for i, name in enumerate(each.names)} for each in (before, now))
    pairs = [(then[name], j) for name, j in today.items() if name in then]
    a, b = np.array(pairs, np.int64).reshape(-1, 2).T
    gone = [i for name, i in then.items() if name not in today]
    return a, b, gone, [j for name, j in today.items() if name not in then]


def _of_contents(before: Inventory, now: Inventory) -> ImageDifference | None:
    """Compare images that have no names by their contents; None unless all of them were read."""
    if (before.hashes == b"").any() or (now.hashes == b"").any():
        return None
    added = np.flatnonzero(~np.isin(now.hashes, before.hashes)).tolist()
    removed = np.flatnonzero(~np.isin(before.hashes, now.hashes)).tolist()
    return ImageDifference([now.name(j) for j in added], [before.name(i) for i in removed], (), (), (), ())


def _read_again(
    before: Inventory, now: Inventory, pairs: tuple[np.ndarray, np.ndarray], limit: int
) -> Inventory:
    """`now` with the hashes of those files of which one was kept, and which have another time since."""
    a, b = pairs
    asked = (before.hashes[a] != b"") & (now.hashes[b] == b"") & (before.sizes[a] == now.sizes[b])
    asked = b[asked & (before.times[a] != now.times[b]) & (now.sizes[b] != -1)]
    if len(asked) > limit:
        asked = asked[np.unique(np.linspace(0, len(asked) - 1, limit).astype(np.int64))]
    if now.root is None or not len(asked):
        return now
    hashes, sizes = now.hashes.copy(), now.sizes.copy()
    paths = [os.fsdecode(now.names[index]) for index in asked.tolist()]
    hashes[asked] = hash_files(now.root, paths, f"images of {now.root}").astype(KEPT)
    sizes[asked[hashes[asked] == b""]] = -1
    return replace(now, hashes=hashes, sizes=sizes)


def _renamed(before: Inventory, now: Inventory, gone: list[int], new: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs of images that are the same under another name, each in one pair."""
    left: dict[bytes, list[int]] = {}
    for i in reversed(gone):
        left.setdefault(before.hashes[i], []).append(i)
    for j in new:
        if now.hashes[j] and left.get(now.hashes[j]):
            yield left[now.hashes[j]].pop(), j
