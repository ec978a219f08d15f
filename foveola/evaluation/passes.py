"""The pass behind the cache: pictures to rows of memory-mapped arrays, which a killed pass goes on with.

Every rank reads its contiguous share of the rows that are not finished. Row r of every array is the r-th
chosen picture; a marker beside each array says which rows are finished, and is written after they are on the
disk.
"""

import hashlib
import json
import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64

from foveola import distributed, files
from foveola.config import UserError
from foveola.data.sources import Source, stamp_of
from foveola.evaluation.encoding import Encoding, FeedConfig, checked
from foveola.evaluation.features import choose_pictures, facts_of_bad, share
from foveola.evaluation.kinds import Need, shape_of
from foveola.models.encoder import Encoder

FORMAT = 2  # of the folder: another one is another key
FLUSH_SECONDS = 20.0  # what a kill may cost
MISSING, READ, UNREADABLE = 0, 1, 2  # marks of a row
COLUMNS: dict[str, tuple[str, Any]] = {
    "labels": ("<i8", -1),
    "has_mask": ("|b1", False),
    "readable": ("<f4", 0.0),
}


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
        self.names, self.views, self.writing = names, views, 0.0
        self.encoding = Encoding(encoder, source, config, need, views, progress)
        self.chosen = choose_pictures(len(source), config.limit, config.seed)
        self.key = {
            "format": FORMAT,
            "encoder": fingerprint,
            "data": source.fingerprint(),
            "files": stamp_of(source),
            "pictures": hashlib.sha256(self.chosen.tobytes()).hexdigest()[:16],
            "precision": config.precision,
            "store": config.store,
            "mask_canvas": config.mask_canvas,
            "views": views,
            "seed": config.seed if views else None,
            **({} if need.side is None else {"side": need.side}),
            **({"crops": need.crops} if views and need.crops else {}),
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
            self._compute(missing[share(len(missing))], marks)
        except UserError as error:
            problem = str(error)
        for found in distributed.gather_objects(problem):
            if found:
                raise UserError(found)
        return self._facts(len(missing))

    def _prepare(self) -> None:
        """Empty arrays of the right size where there are none (sparse files: the disk fills as rows come)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        n, wide = len(self.chosen), 1 + self.views
        shapes, dtypes = {}, {}
        for kind, name in self.names.items():
            shapes[name] = (n, wide, *shape_of(self.encoder, kind, self.need))
            dtypes[name] = np.dtype("uint8" if kind == "maps" else self.config.store)
        new = [name for name in shapes if not (self.folder / f"{name}.done.npy").is_file()]
        size = sum(int(np.prod(shapes[name], dtype=np.int64)) * dtypes[name].itemsize for name in new)
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
            np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtypes[name], shapes[name])
            _save(self.folder / f"{name}.done.npy", np.zeros(n, np.uint8))
        files.write_text(self.folder / "key.json", json.dumps(self.key, indent=2) + "\n")
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

        for found in self.encoding.batches(self.chosen[mine]):
            began = perf_counter()
            where = np.searchsorted(self.chosen, found.pictures.numpy())
            for kind, name in self.names.items():
                numbers = checked(found.kinds[kind], self.config.store, found.pictures, self.source)
                arrays[name][where] = numbers.numpy()
            for name, values in found.columns.items():
                arrays[name][where] = values.numpy()
            waiting += [(where, READ), (np.searchsorted(self.chosen, found.bad.numpy()), UNREADABLE)]
            if perf_counter() - last > FLUSH_SECONDS:
                commit()
                last = perf_counter()
            self.writing += perf_counter() - began
        began = perf_counter()
        commit()
        self.writing += perf_counter() - began

    def _facts(self, computed: int) -> dict[str, Any]:
        mark = np.load(self.folder / f"{next(iter(self.names.values()))}.done.npy")
        bad = torch.from_numpy(self.chosen[mark == UNREADABLE])
        facts = facts_of_bad(bad, len(self.chosen), self.source)
        read = mark == READ
        if not read.any():
            raise UserError(f"{self.source.name}: no pictures")
        seconds = {**self.encoding.seconds, "writing": self.writing}
        total = {name: sum(s[name] for s in distributed.gather_objects(seconds)) for name in seconds}
        return {
            "name": self.source.name,
            "fingerprint": self.source.fingerprint(),
            "pictures": len(self.chosen),
            **facts,
            "rows": int(read.sum()),
            **(self._mask_facts(read) if "masked" in self.names else {}),
            "views": self.views,
            "computed": computed,
            "pass_seconds": {name: round(value, 2) for name, value in total.items()},
        }

    def _mask_facts(self, read: Bool[np.ndarray, "n"]) -> dict[str, Any]:
        readable, has_mask = (np.load(self.folder / f"{name}.npy")[read] for name in ("readable", "has_mask"))
        return {
            "rows_with_mask": int(has_mask.sum()),
            "rows_reading_everything": int((readable == 1).sum()),
            "mean_readable": round(float(readable.mean(dtype=np.float64)), 4),
        }


def _save(path: Path, array: np.ndarray) -> None:
    with files.whole(path) as part, part.open("wb") as file:
        np.save(file, array)
