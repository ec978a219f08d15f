"""What is done of a file: its rows in parts, each whole or not there, until the file is made of them."""

import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from foveola import files
from foveola.config import UserError
from foveola.embedding.rows import FeatureRows


class FileParts:
    """The folder `out.parts` beside a file that is not finished; its `work.json` says of which work."""

    def __init__(self, out: Path, work: dict[str, Any], count: int) -> None:
        self.folder, self.work, self.count = out.with_name(f"{out.name}.parts"), work, count

    def prepare(self) -> None:
        """Make the folder. Raises UserError where it holds parts of other work."""
        path = self.folder / "work.json"
        if not path.exists() and not any(self.folder.glob("part-*")):  # perhaps a kill came between
            files.write_text(path, json.dumps(self.work, indent=2) + "\n")
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} is no folder of parts ({error}): remove it") from error
        if other := differing(known, self.work):
            raise UserError(
                f"{self.folder} has parts of other work (another {other}): remove it to begin anew, or give "
                "another out="
            )

    def is_here(self) -> bool:
        """Return whether this process sees the folder."""
        return (self.folder / "work.json").is_file()

    def missing(self) -> list[int]:
        """Return numbers of the parts that are not there, ascending."""
        return [number for number in range(self.count) if not self._path(number).is_file()]

    def write(self, number: int, rows: FeatureRows) -> None:
        """Write one part as a whole."""
        with files.whole(self._path(number)) as part, part.open("wb") as file:
            np.savez(file, **rows._asdict())

    def __iter__(self) -> Iterator[FeatureRows]:
        """All parts, one after the other."""
        for number in range(self.count):
            with self._open(number) as part:
                rows = FeatureRows(*(part[name] for name in FeatureRows._fields))
            yield rows

    def column(self, name: str) -> Iterator[np.ndarray]:
        """Yield one column of each part."""
        for number in range(self.count):
            with self._open(number) as part:
                values = part[name]
            yield values

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    @contextmanager
    def _open(self, number: int) -> Iterator[Any]:
        path = self._path(number)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as part:
                yield part
        except (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, and give the same command") from error

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.npz"


def differing(known: Any, work: dict[str, Any]) -> str:
    """Return the name of the first value in which a piece of work differs from what is known, or ""."""
    if not isinstance(known, dict):
        return "format"
    plain = json.loads(json.dumps(work))
    return next((name for name in plain if known.get(name) != plain[name]), "")
