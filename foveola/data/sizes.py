"""Sizes of the images of a source, read from headers once and kept on the disk, as hashes of files are."""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from foveola.data.decoding import Decoding, ImageFile
from foveola.data.formats import FILE_KINDS
from foveola.data.identity import BYTES, HASH, Table
from foveola.data.readers import read_header
from foveola.data.sample import BadImage

TABLES = "sizes"  # the folder of the tables
SIZES_AT_ONCE = 256  # of images of shards, until they are kept


class ImageSize(NamedTuple):
    """What is known of an image before it is decoded: pixels the right way up, pages or frames, and which of
    `FILE_KINDS` it is. A width of 0: it cannot be read.
    """

    width: int = 0
    height: int = 0
    pages: int = 1
    kind: int = 0


def read_sizes(source: Any, reading: Decoding) -> Int64[np.ndarray, "n 4"]:
    """Return the `ImageSize` of each image, without decoding it; read once, and kept on the disk."""
    if hasattr(source, "stored_sizes"):
        return _beside_index(source, reading)
    found = np.zeros((len(source), len(ImageSize._fields)), np.int64)
    root = getattr(source, "root", None)
    table = None if root is None or not hasattr(source, "path") else Table(root, TABLES)
    keys = np.zeros(len(source), HASH)
    if table is not None:
        keys = np.array([_key(source.path(index), reading) for index in range(len(source))], HASH)
        kept = np.zeros(len(source), HASH)
        table.fill(kept, keys)
        found[:] = kept.view("<u4").reshape(-1, 4)
    missing = np.flatnonzero(found[:, 0] == 0)
    for index in missing.tolist():
        found[index] = _size(source, index, reading)
    if table is not None:
        new = missing[(found[missing, 0] > 0) & (keys[missing] != b"")]
        table.add(keys[new], _packed(found[new]))
        table.save()
    return found


def _beside_index(source: Any, reading: Decoding) -> Int64[np.ndarray, "n 4"]:
    """Sizes of images of shards, kept beside the index of these: none that changed has the same index."""
    table, rows = source.stored_sizes(reading)
    found = np.ascontiguousarray(table[rows]).view("<u4").reshape(-1, 4).astype(np.int64)
    missing = np.flatnonzero(found[:, 0] == 0)
    for start in range(0, len(missing), SIZES_AT_ONCE):
        block = missing[start : start + SIZES_AT_ONCE]
        found[block] = [_size(source, index, reading) for index in block.tolist()]
        table[rows[block]] = _packed(found[block])
    return found


def _packed(sizes: Int64[np.ndarray, "n 4"]) -> np.ndarray:
    return np.ascontiguousarray(sizes.astype("<u4")).view(HASH)[:, 0]


def path_of(source: Any, index: int) -> Any:
    """Return the file of an image: its path where it has one; pixels of one that has none."""
    if hasattr(source, "path"):
        return source.path(index)
    image = source[index].image
    return image.data if isinstance(image, ImageFile) else image


def _size(source: Any, index: int, reading: Decoding) -> ImageSize:
    try:
        image = path_of(source, index)
        if isinstance(image, np.ndarray):
            return ImageSize(image.shape[1], image.shape[0])
        header = read_header(image, reading)
    except (BadImage, OSError):  # whoever decodes it will say why
        return ImageSize()
    return ImageSize(*header.upright, header.pages, FILE_KINDS.index(header.kind))


def _key(path: Path, reading: Decoding) -> bytes:
    """What tells a file, and what is read of it, from others; empty where it is not there."""
    try:
        state = os.stat(path)  # noqa: PTH116 (speed)
    except OSError:
        return b""
    about = f"\0{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {reading}"
    return hashlib.sha256(os.fsencode(path) + about.encode()).digest()[:BYTES]
