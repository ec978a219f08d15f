"""Images of tar files by the index: where each lies, and what is written beside it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from foveola.data.shards.index import ShardIndex
from foveola.data.shards.schema import parse_sample
from foveola.data.shards.stores import Shard


@dataclass(frozen=True)
class Stretch:
    """A part of a file that is a file of its own."""

    shard: Shard
    start: int
    size: int

    def read_bytes(self) -> bytes:
        """Return it. Raises OSError, and DataError where the file was changed since it was indexed."""
        return self.shard.read(self.start, self.size)


class TarHeld:
    """The images of tar files."""

    exact = True

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def _stretch(self, row: int, kind: str) -> Stretch:
        offset, size = (int(self.index.array(f"{kind}{which}")[row]) for which in ("places", "sizes"))
        return Stretch(self.index.shard(row), offset, size)

    def image(self, row: int) -> Stretch:
        """Return where the image lies."""
        return self._stretch(row, "")

    def about(self, row: int) -> dict[str, Any]:
        """Return the JSON of an image; of one without, nothing."""
        found = self._stretch(row, "about_")
        return parse_sample(found.read_bytes(), self.index.name(row)) if found.size else {}

    def label_map(self, row: int) -> bytes:
        """Return the file of the label map of an image; none where it has none."""
        found = self._stretch(row, "map_")
        return found.read_bytes() if found.size else b""

    def bytes_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the bytes of the file of each image."""
        return self.index.array("sizes")[rows].astype(np.int64)

    def notes(self) -> tuple[str, ...]:
        """Return what is to be known of how they are read: nothing."""
        return ()
