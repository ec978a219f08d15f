"""What a run has found so far: whole lines on the disk, from which a run that was killed goes on."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from foveola import files
from foveola.config import UserError
from foveola.trees import flat

NAMES, RESULTS = {"index", "file_name"}, {"found", "unreadable"}  # of a record: all of these, one of those
ImageRecord = dict[str, Any]  # of an image: its index, file_name, and what `written` says was found


class Journal:
    """Records of images in a folder: a file for each rank, a line for each batch.

    A line that a kill has torn, or that holds no records, counts as not written. `work` are plain values that
    tell what is done, on which data: only the same work goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, work: dict[str, Any]) -> None:
        """Make the folder, or go on in it. Raises UserError where it holds other work."""
        about = self.folder / "work.json"
        if about.is_file():
            refuse_other_work(self.folder, self._begun(about), work)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            files.write_text(about, json.dumps(work))

    def _begun(self, about: Path) -> dict[str, Any]:
        try:
            there = json.loads(about.read_bytes())
        except (ValueError, RecursionError):
            there = None
        if not isinstance(there, dict):
            raise UserError(f"{about} is damaged: remove {self.folder}, and all images are done again")
        return there

    def append(self, rank: int, records: list[ImageRecord]) -> None:
        """Write the records of a batch as one line, which is with the system when this returns."""
        with self._path(rank).open("ab") as file:
            file.write(json.dumps(records, separators=(",", ":")).encode() + b"\n")

    def mend(self, rank: int) -> None:
        """Cut off the line of this rank that a kill has torn, so that the next one begins anew."""
        path = self._path(rank)
        if path.is_file():
            with path.open("r+b") as file:
                whole = 0
                for line in file:
                    whole += len(line) if line.endswith(b"\n") else 0
                file.truncate(whole)

    def done(self) -> Int64[np.ndarray, "n"]:
        """Return the indices of the images that are done, ascending."""
        return np.array(sorted(self._where()), np.int64)

    def records(self) -> Iterator[ImageRecord]:
        """Yield the records of all images that are done, in the order of their indices."""
        where = self._where()
        opened = {path: path.open("rb") for path in {path for path, _ in where.values()}}
        last: tuple[Path, int] | None = None
        batch: dict[int, ImageRecord] = {}
        try:
            for index in sorted(where):
                if where[index] != last:
                    last = path, start = where[index]
                    opened[path].seek(start)
                    batch = {record["index"]: record for record in _records_of(opened[path].readline())}
                yield batch[index]
        finally:
            for file in opened.values():
                file.close()

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder)

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank}.jsonl"

    def _where(self) -> dict[int, tuple[Path, int]]:
        """Return the file in which the line of each image stands, and the byte at which it begins."""
        found = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            start = 0
            with path.open("rb") as file:
                for line in file:
                    found |= {record["index"]: (path, start) for record in _records_of(line)}
                    start += len(line)
        return found


def _records_of(line: bytes) -> list[ImageRecord]:
    """The records of a batch; none where the line is torn, or is no such line."""
    try:
        records = json.loads(line) if line.endswith(b"\n") else []
        whole = all(record.keys() >= NAMES and RESULTS & record.keys() for record in records)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []
    return records if whole else []


def refuse_other_work(where: Path, there: dict[str, Any], work: dict[str, Any]) -> None:
    """Raise UserError, with the first difference, where `there` is other work than what is asked for."""
    before, now = flat(there), flat(work)
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise UserError(
                f"{where} holds other work: {name} is {before.get(name)!r} there and {now.get(name)!r} here; "
                "give another out=, or remove it"
            )
