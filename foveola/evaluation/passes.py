"""The pass behind the cache: pictures to rows of memory-mapped arrays, which a killed pass goes on with.

Every rank reads its contiguous share of the rows that are not finished. Row r of every array is the r-th
chosen picture; a marker beside each array says which rows are finished, and is written after they are on the
disk.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foveola import distributed
from foveola.config import UserError, key
from foveola.data.sources import Source
from foveola.evaluation.crops import Crops, by_picture
from foveola.evaluation.features import choose_pictures, facts_of_bad, read_ahead, share, show
from foveola.evaluation.kinds import Need, Reader, shape_of
from foveola.evaluation.rows import ExtractConfig, Rows, join
from foveola.models.encoder import Encoder

FORMAT = 1  # of the folder: another one is another key
FLUSH_SECONDS = 20.0  # what a kill may cost
TODO, READ, UNREADABLE = 0, 1, 2  # marks of a row
COLUMNS: dict[str, tuple[str, Any]] = {
    "labels": ("<i8", -1),
    "has_mask": ("|b1", False),
    "readable": ("<f4", 0.0),
}


@dataclass(frozen=True)
class FeedConfig:
    """How pictures become stored features."""

    batch_size: int = key(64, "pictures encoded at once", at_least=1)
    workers: int = key(2, "processes that read pictures; 0 = none besides this one", at_least=0)
    limit: int | None = key(None, "use at most this many pictures of each set, drawn by seed", at_least=1)
    seed: int = key(0, "seed of every random choice", at_least=0)
    precision: Literal["fp32", "bf16"] = key("fp32", "arithmetic of the encoder")
    store: Literal["float32", "float16"] = key("float32", "numbers in which features are kept")
    mask_canvas: int | None = key(
        None, "pixels a side on which masks are drawn; null = the encoder's resize, or more", at_least=1
    )

    def reading(self) -> ExtractConfig:
        """The same as settings of the reading of pictures."""
        names = ("batch_size", "workers", "limit", "seed", "precision", "mask_canvas")
        return ExtractConfig(**{name: getattr(self, name) for name in names})


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
        progress: bool,
    ) -> None:
        self.encoder, self.source, self.config, self.need = encoder, source, config, need
        self.names, self.views, self.progress = names, views, progress
        self.chosen = choose_pictures(len(source), config.limit, config.seed)
        self.key = {
            "format": FORMAT,
            "encoder": fingerprint,
            "data": source.fingerprint(),
            "pictures": hashlib.sha256(self.chosen.tobytes()).hexdigest()[:16],
            "precision": config.precision,
            "store": config.store,
            "mask_canvas": config.mask_canvas,
            "views": views,
            "seed": config.seed if views else None,
        }
        text = json.dumps(self.key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:20]
        self.seconds = {"data_wait": 0.0, "encoder": 0.0, "writing": 0.0}

    def run(self) -> dict[str, Any]:
        """Compute what is missing; returns facts about the data. Every rank calls it."""
        distributed.on_main(self._prepare)
        if not (self.folder / "key.json").is_file():
            raise UserError(
                f"{self.folder} is not on this machine: give cache= a folder that all processes reach"
            )
        marks = {name: self._map(f"{name}.done") for name in self.names.values()}
        todo = np.flatnonzero(np.any([mark == TODO for mark in marks.values()], axis=0))
        # Before any rank marks rows: all ranks must share out the same ones.
        distributed.barrier()
        problem = ""
        try:
            self._compute(todo[share(len(todo))], marks)
        except UserError as error:
            problem = str(error)
        for found in distributed.gather_objects(problem):
            if found:
                raise UserError(found)
        return self._facts(len(todo))

    def _prepare(self) -> None:
        """Empty arrays of the right size where there are none (sparse files: the disk fills as rows come)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        n, wide, dtype = len(self.chosen), 1 + self.views, np.dtype(self.config.store)
        shapes = {
            name: (n, wide, *shape_of(self.encoder, kind, self.need.layers))
            for kind, name in self.names.items()
        }
        new = [name for name in shapes if not (self.folder / f"{name}.done.npy").is_file()]
        size = sum(int(np.prod(shapes[name], dtype=np.int64)) * dtype.itemsize for name in new)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise UserError(
                f"features of {self.source.name} need {size / 2**30:.1f} GiB in {self.folder}, which has "
                f"{free / 2**30:.1f}; use limit=, store=float16 or another cache="
            )
        for name, (kind, empty) in COLUMNS.items():
            if not (self.folder / f"{name}.npy").is_file():
                _save(self.folder / f"{name}.npy", np.full(n, empty, dtype=kind))
        for name in new:
            np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtype, shapes[name])
            _save(self.folder / f"{name}.done.npy", np.zeros(n, np.uint8))
        (self.folder / "key.json").write_text(json.dumps(self.key, indent=2) + "\n")
        for name, shape in shapes.items():
            if self._map(name).shape != shape or self._map(f"{name}.done").shape != (n,):
                raise UserError(f"{self.folder / name}.npy is not what it should be: remove the folder")

    def _map(self, name: str) -> np.memmap:
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r+")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}): remove the folder") from error

    def _compute(self, mine: Int64[np.ndarray, "t"], marks: dict[str, np.memmap]) -> None:
        if not len(mine):
            return
        reader = Reader(self.encoder, self.config.precision)
        arrays = {name: self._map(name) for name in [*self.names.values(), *COLUMNS]}
        waiting: list[tuple[np.ndarray, int]] = []
        last = perf_counter()

        def commit() -> None:
            for array in arrays.values():
                array.flush()
            for rows, mark in waiting:
                for marked in marks.values():
                    marked[rows] = mark
            for marked in marks.values():
                marked.flush()
            waiting.clear()

        for rows in self._batches(mine):
            began = perf_counter()
            images, masks, first = by_picture(rows, self.views)
            found = self._encode(reader, images, masks)
            self.seconds["encoder"] += perf_counter() - began
            began = perf_counter()
            where = np.searchsorted(self.chosen, rows.pictures[first].numpy())
            for kind, name in self.names.items():
                arrays[name][where] = self._checked(found[kind], rows.pictures[first]).numpy()
            arrays["labels"][where] = rows.labels[first].numpy()
            arrays["has_mask"][where] = rows.has_mask[first].numpy()
            arrays["readable"][where] = masks[:, 0].float().mean(dim=1).numpy()
            waiting += [
                (where, READ),
                (np.searchsorted(self.chosen, rows.bad.numpy()), UNREADABLE),
            ]
            if perf_counter() - last > FLUSH_SECONDS:
                commit()
                last = perf_counter()
            self.seconds["writing"] += perf_counter() - began
        began = perf_counter()
        commit()
        self.seconds["writing"] += perf_counter() - began

    def _batches(self, mine: Int64[np.ndarray, "t"]) -> Iterator[Rows]:
        """Parcels joined until they hold a batch of pictures; the time waited for them is counted."""
        pictures = Crops(
            self.source,
            self.chosen[mine],
            self.encoder.config.transform,
            self.encoder.patch_size,
            self.config.reading(),
            self.views,
        )
        parcels = read_ahead(pictures, self.config.workers)
        waiting: list[Rows] = []
        shown = iter(show(parcels, len(pictures), f"features of {self.source.name}", self.progress))
        while True:
            began = perf_counter()
            parcel = next(shown, None)
            self.seconds["data_wait"] += perf_counter() - began
            if parcel is not None:
                waiting.append(parcel)
            full = sum(len(part.images) for part in waiting) >= self.config.batch_size
            if waiting and (full or parcel is None):
                yield join(waiting)
                waiting = []
            if parcel is None:
                return

    def _encode(self, reader: Reader, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Features of p pictures in 1 + views views each, encoded `batch_size` at a time."""
        flat, read = images.flatten(0, 1), masks.flatten(0, 1)
        size = self.config.batch_size
        parts = [reader(i, m, self.need) for i, m in zip(flat.split(size), read.split(size), strict=True)]
        kinds = self.need.kinds if parts else ()
        joined = {kind: torch.cat([part[kind] for part in parts]) for kind in kinds}
        if not len(images):
            return {
                kind: torch.zeros(0, 1 + self.views, *shape_of(self.encoder, kind, self.need.layers))
                for kind in self.need.kinds
            }
        return {kind: x.unflatten(0, (len(images), 1 + self.views)) for kind, x in joined.items()}

    def _checked(self, x: Tensor, pictures: Int64[Tensor, "p"]) -> Tensor:
        """As they are stored. Raises UserError, naming a picture, unless all are finite."""
        stored = x.to(getattr(torch, self.config.store))
        broken = ~stored.flatten(1).isfinite().all(dim=1)
        if broken.any():
            name = self.source[int(pictures[broken][0])].name
            large = " in float16 (store=float32 holds more)" if x.isfinite().all() else ""
            raise UserError(
                f"features of {int(broken.sum())} pictures of {self.source.name} are not finite{large} "
                f"(first: {name}): is the encoder damaged, or its training diverged?"
            )
        return stored

    def _facts(self, computed: int) -> dict[str, Any]:
        mark = np.load(self.folder / f"{next(iter(self.names.values()))}.done.npy")
        bad = torch.from_numpy(self.chosen[mark == UNREADABLE])
        facts = facts_of_bad(bad, len(self.chosen), self.source)
        read = mark == READ
        if not read.any():
            raise UserError(f"{self.source.name}: no pictures")
        readable, has_mask = (np.load(self.folder / f"{name}.npy")[read] for name in ("readable", "has_mask"))
        total = {
            name: sum(s[name] for s in distributed.gather_objects(self.seconds)) for name in self.seconds
        }
        return {
            "name": self.source.name,
            "fingerprint": self.source.fingerprint(),
            "pictures": len(self.chosen),
            **facts,
            "rows": int(read.sum()),
            "rows_with_mask": int(has_mask.sum()),
            "rows_reading_everything": int((readable == 1).sum()),
            "mean_readable": round(float(readable.mean(dtype=np.float64)), 4),
            "views": self.views,
            "computed": computed,
            "pass_seconds": {name: round(value, 2) for name, value in total.items()},
        }


def _save(path: Path, array: np.ndarray) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("wb") as file:
        np.save(file, array)
    part.replace(path)
