"""Stored features: a `Pass` writes the features of a source to memory-mapped arrays, a `Store` reads them.

A pass that was killed goes on with what it has. Every rank reads its contiguous part of the rows that are
not finished. Row r of every array is the r-th chosen image; a marker beside each array says which rows are
finished, and is written after they are on the disk. A checksum of each row tells when a file was damaged
later: such rows are computed again.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8
from torch import Tensor

from foveola import distributed, files
from foveola.config import UserError
from foveola.data.identity import identity_of
from foveola.data.sources import Source
from foveola.evaluation.features.encoding import Encoding, checked
from foveola.evaluation.features.need import FeedConfig, Need, shape_of
from foveola.evaluation.features.table import FeatureTable
from foveola.evaluation.images import choose_images, facts_of_bad, slice_of_rank
from foveola.models.encoder import Encoder

FORMAT = 3  # of the folder: another one is another key
FLUSH_SECONDS = 20.0  # what a kill may cost
CHECKSUM_ROWS = 4096  # rows whose checksums are compared at once
MISSING, READ, UNREADABLE = 0, 1, 2  # marks of a row
COLUMNS: dict[str, tuple[str, Any]] = {
    "labels": ("<i8", -1),
    "has_mask": ("|b1", False),
    "readable": ("<f4", 0.0),
}


class Store:
    """The features of one source: `take` reads rows, whole arrays are never in memory."""

    def __init__(
        self, folder: Path, chosen: Int64[np.ndarray, "n"], names: dict[str, str], facts: dict[str, Any]
    ) -> None:
        self.folder, self.chosen, self.names, self.facts = folder, chosen, names, facts
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names.values()}
        self.columns = {name: np.load(folder / f"{name}.npy") for name in COLUMNS}
        marks = [np.load(folder / f"{name}.done.npy") for name in names.values()]
        self.rows = torch.from_numpy(np.flatnonzero(np.all([mark == READ for mark in marks], axis=0)))

    def __len__(self) -> int:
        return len(self.rows)

    def take(
        self, feature: str, rows: Int64[Tensor, "b"] | slice = slice(None), view: int = 0, layers: int = 1
    ) -> Float32[Tensor, "b ..."]:
        """Return features of readable images: [b, layers, D] of tokens, [b, N, D] of patches, else [b, D].

        `view` 0 is the evaluation view, 1 and up are the random crops.
        """
        index = self.rows[rows].numpy()
        array = self.arrays[self.names[feature]]
        whole = len(index) == len(array) and len(index) > 0 and index[0] == 0
        block = array[:, view] if whole and bool((np.diff(index) == 1).all()) else array[index, view]
        if feature in ("token", "masked"):
            block = block[:, -layers:]
        return torch.from_numpy(np.ascontiguousarray(block).astype(np.float32))

    def maps(self, rows: Int64[Tensor, "b"]) -> UInt8[Tensor, "b S S"]:
        """Return label maps of readable images, of a store of squashed ones."""
        return torch.from_numpy(self.arrays[self.names["maps"]][self.rows[rows].numpy(), 0])

    def column(self, name: str) -> Shaped[Tensor, "n"]:
        """Return `labels` (-1: unknown), or with `masked` features also `has_mask` or `readable`, of the
        readable images.
        """
        return torch.from_numpy(self.columns[name])[self.rows]

    @property
    def image_indices(self) -> Int64[Tensor, "n"]:
        """Index of each readable image in its source."""
        return torch.from_numpy(self.chosen)[self.rows]

    def table(self, feature: str) -> FeatureTable:
        """Return one vector of an image, of tokens that of the last block, as the table that `extract`
        gives.
        """
        features, masked = self.take(feature), "masked" in self.names
        return FeatureTable(
            features=features[:, -1] if features.ndim == 3 else features,
            labels=self.column("labels"),
            image_indices=self.image_indices,
            objects=torch.full((len(self),), -1),
            has_mask=self.column("has_mask") if masked else torch.zeros(len(self), dtype=torch.bool),
            readable=self.column("readable") if masked else torch.ones(len(self)),
        )

    def sample_patches(self, count: int, seed: int) -> tuple[Float32[Tensor, "m D"], Int64[Tensor, "m"]]:
        """Return `count` patches (all, if there are no more) drawn by seed, and the row of each,
        ascending.
        """
        per = self.arrays[self.names["patches"]].shape[2]
        drawn = choose_images(len(self) * per, count, seed)
        rows, positions = drawn // per, drawn % per
        block = self.arrays[self.names["patches"]][self.rows.numpy()[rows], 0, positions]
        return torch.from_numpy(block.astype(np.float32)), torch.from_numpy(rows)


class Pass:
    """One pass over a source: makes or reopens the folder, computes the rows that are not finished."""

    def __init__(
        self,
        encoder: Encoder,
        fingerprint: str,
        source: Source,
        config: FeedConfig,
        need: Need,
        names: dict[str, str],
        views: int,
        folder: Path,
        *,
        progress: bool = False,
    ) -> None:
        self.encoder, self.source, self.config, self.need = encoder, source, config, need
        self.names, self.views, self.writing = names, views, 0.0
        self.encoding = Encoding(encoder, source, config, need, views, progress)
        self.chosen = choose_images(len(source), config.limit, config.seed)
        self.key = {
            "format": FORMAT,
            "encoder": fingerprint,
            "data": identity_of(source, self.chosen).digest,
            "images": hashlib.sha256(self.chosen.tobytes()).hexdigest()[:16],
            "precision": config.precision,
            "store": config.store,
            "mask_canvas": config.mask_canvas,
            **({} if config.min_coverage is None else {"min_coverage": config.min_coverage}),
            "views": views,
            "seed": config.seed if views else None,
            **({} if need.side is None else {"side": need.side}),
            **({"crops": need.crops} if views and need.crops else {}),
            **({} if need.size is None else {"size": need.size}),
            **({} if need.block is None else {"block": need.block}),
        }
        text = json.dumps(self.key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:20]

    def run(self) -> dict[str, Any]:
        """Compute what is missing; returns facts about the data. Every rank calls it."""
        distributed.on_main(self._prepare)
        if not (self.folder / "key.json").is_file():
            raise UserError(
                f"{self.folder} is not on this machine: give cache= a folder that all processes reach"
            )
        marks = {name: self._map(f"{name}.done") for name in self.names.values()}
        missing = np.flatnonzero(np.any([mark == MISSING for mark in marks.values()], axis=0))
        # Before any rank marks rows: all ranks must share out the same ones.
        distributed.barrier()
        problem = ""
        try:
            self._compute(missing[slice_of_rank(len(missing))], marks)
        except UserError as error:
            problem = str(error)
        for found in distributed.gather_objects(problem):
            if found:
                raise UserError(found)
        return self._facts(len(missing))

    def _prepare(self) -> None:
        """Empty arrays of the right size where there are none, and those that are damaged anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        n, wide = len(self.chosen), 1 + self.views
        shapes, dtypes = {}, {}
        for feature, name in self.names.items():
            shapes[name] = (n, wide, *shape_of(self.encoder, feature, self.need))
            dtypes[name] = np.dtype("uint8" if feature == "maps" else self.config.store)
        for name in shapes:
            self._discard_damaged(name, shapes[name], dtypes[name])
        for name, (dtype, _) in COLUMNS.items():
            self._discard_damaged(name, (n,), np.dtype(dtype))
        if not all((self.folder / f"{name}.npy").is_file() for name in COLUMNS):
            for done in self.folder.glob("*.done.npy"):  # rows without their labels are not finished
                done.unlink()
        new = [name for name in shapes if not (self.folder / f"{name}.done.npy").is_file()]
        size = sum(int(np.prod(shapes[name], dtype=np.int64)) * dtypes[name].itemsize for name in new)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise UserError(
                f"features of {self.source.name} need {size / 2**20:,.0f} MiB in {self.folder}, which has "
                f"{free / 2**20:,.0f}; use limit=, store=float16 or another cache="
            )
        for name, (dtype, empty) in COLUMNS.items():
            if not (self.folder / f"{name}.npy").is_file():
                _save(self.folder / f"{name}.npy", np.full(n, empty, dtype=dtype))
                _save(self.folder / f"{name}.sums.npy", _sums(np.full(n, empty, dtype=dtype)))
        for name in new:
            np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtypes[name], shapes[name])
            _take_room(self.folder / f"{name}.npy")
            _save(self.folder / f"{name}.sums.npy", np.zeros(n, np.uint32))
            _save(self.folder / f"{name}.done.npy", np.zeros(n, np.uint8))
        files.write_text(self.folder / "key.json", json.dumps(self.key, indent=2) + "\n")
        self._forget_damaged([name for name in shapes if name not in new])

    def _discard_damaged(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Remove an array that is not of its shape and size (numpy would fill up a short one with zeros)."""
        path = self.folder / f"{name}.npy"
        beside = [self.folder / f"{name}.sums.npy"]
        beside += [] if name in COLUMNS else [self.folder / f"{name}.done.npy"]
        if not any(file.exists() for file in (path, *beside)):
            return
        wanted = {path: (shape, dtype)}
        wanted |= {file: (shape[:1], np.dtype("u1" if "done" in file.name else "u4")) for file in beside}
        if not all(_is_sound(file, *what) for file, what in wanted.items()):
            self._say(f"{path} is damaged: computed again")
            for file in wanted:
                file.unlink(missing_ok=True)

    def _forget_damaged(self, names: list[str]) -> None:
        """Mark rows as missing whose bytes are not those that were written."""
        columns = [name for name in COLUMNS if name == "labels" or "masked" in self.names]
        marks = {name: self._map(f"{name}.done") for name in names}
        damaged = np.zeros(len(self.chosen), bool)
        for name in [*names, *(columns if names else ())]:
            array, sums = self._map(name), self._map(f"{name}.sums")
            read = marks[name] == READ if name in marks else np.ones(len(array), bool)
            for start in range(0, len(array), CHECKSUM_ROWS):
                part = slice(start, start + CHECKSUM_ROWS)
                damaged[part] |= read[part] & (_sums(array[part]) != sums[part])
        for mark in marks.values():
            mark[damaged] = MISSING
            mark.flush()
        if damaged.any():
            self._say(f"{int(damaged.sum())} rows in {self.folder} are damaged: computed again")

    def _say(self, text: str) -> None:
        print(f"features of {self.source.name}: {text}", file=sys.stderr, flush=True)

    def _map(self, name: str) -> np.memmap:
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r+")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}): remove the folder") from error

    def _compute(self, mine: Int64[np.ndarray, "t"], marks: dict[str, np.memmap]) -> None:
        arrays = {name: self._map(name) for name in [*self.names.values(), *COLUMNS]}
        sums = {name: self._map(f"{name}.sums") for name in arrays}
        waiting: list[tuple[np.ndarray, int]] = []
        last = perf_counter()

        def commit() -> None:
            for array in (*arrays.values(), *sums.values()):
                array.flush()
            for rows, mark in waiting:
                for marked in marks.values():
                    marked[rows] = mark
            for marked in marks.values():
                marked.flush()
            waiting.clear()

        for found in self.encoding.batches(self.chosen[mine]):
            began = perf_counter()
            where = np.searchsorted(self.chosen, found.image_indices.numpy())
            for feature, name in self.names.items():
                numbers = checked(
                    found.features[feature], self.config.store, found.image_indices, self.source
                )
                arrays[name][where] = numbers.numpy()
                sums[name][where] = _sums(numbers.numpy())
            for name, values in found.columns.items():
                arrays[name][where] = values.numpy()
                sums[name][where] = _sums(arrays[name][where])
            waiting.append((where, READ))
            if perf_counter() - last > FLUSH_SECONDS:
                commit()
                last = perf_counter()
            self.writing += perf_counter() - began
        began = perf_counter()
        waiting.append((np.searchsorted(self.chosen, np.array(self.encoding.bad, np.int64)), UNREADABLE))
        commit()
        self.writing += perf_counter() - began

    def _facts(self, computed: int) -> dict[str, Any]:
        mark = np.load(self.folder / f"{next(iter(self.names.values()))}.done.npy")
        bad = torch.from_numpy(self.chosen[mark == UNREADABLE])
        facts = facts_of_bad(bad, len(self.chosen), self.source)
        read = mark == READ
        if not read.any():
            raise UserError(f"{self.source.name}: no images")
        seconds = {**self.encoding.seconds, "writing": self.writing}
        total = {name: sum(s[name] for s in distributed.gather_objects(seconds)) for name in seconds}
        return {
            "name": self.source.name,
            "fingerprint": self.key["data"],
            "images": len(self.chosen),
            **facts,
            "rows": int(read.sum()),
            **(self._mask_facts(read) if "masked" in self.names else {}),
            "views": self.views,
            "computed": computed,
            "pass_seconds": {name: round(value, 4) for name, value in total.items()},
        }

    def _mask_facts(self, read: Bool[np.ndarray, "n"]) -> dict[str, Any]:
        readable, has_mask = (np.load(self.folder / f"{name}.npy")[read] for name in ("readable", "has_mask"))
        return {
            "rows_with_mask": int(has_mask.sum()),
            "rows_reading_everything": int((readable == 1).sum()),
            "mean_readable": round(float(readable.mean(dtype=np.float64)), 4),
        }


def _sums(rows: np.ndarray) -> np.ndarray:
    """A checksum of each row."""
    return np.array([zlib.crc32(np.ascontiguousarray(row).data) for row in rows], np.uint32)


def _is_sound(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether a file holds a whole array of that shape and type."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
            header = read(file) if read else None
            size = path.stat().st_size - file.tell()
    except (OSError, ValueError):
        return False
    if header is None:
        return False
    found, fortran, held = header
    count = int(np.prod(shape, dtype=np.int64))
    return (found, fortran, held) == (shape, False, dtype) and size == count * dtype.itemsize


def _take_room(path: Path) -> None:
    """Take the room on the disk that a file will need: a disk that fills up under a map kills the process."""
    if sys.platform != "linux":
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # else a file system that cannot
                raise


def _save(path: Path, array: np.ndarray) -> None:
    with files.whole(path) as part, part.open("wb") as file:
        np.save(file, array)
