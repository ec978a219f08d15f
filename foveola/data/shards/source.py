"""Images of shards and of parquet files as a source: what `ImageFiles` is for files in folders."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8

from foveola.data.annotations import Marked, read_values
from foveola.data.decoding import Decoding
from foveola.data.fit import turn_of, upright_map
from foveola.data.formats import Header, turn
from foveola.data.identity import HASH, Identity, hash_of, shown_reading
from foveola.data.readers import read_header
from foveola.data.sample import BadImage, DataError, Sample
from foveola.data.segmentation import MAX_CLASSES, to_classes
from foveola.data.selected import FilesReadAlike
from foveola.data.shards.index import ShardIndex
from foveola.data.shards.parts import NO_LABEL
from foveola.data.shards.schema import Label, mapped_objects, objects_in, read_objects, stated_size

_NAMED = 10**6  # images up to which their names are kept with a run
HASHED_AT_ONCE = 256


@runtime_checkable
class HeldSamples(Protocol):
    """What is read of a set, by the index: files of tar, or of parquet."""

    index: ShardIndex
    exact: bool  # whether the bytes of each image are known

    def image(self, row: int) -> Any:
        """Return where the image lies: what has `read_bytes`."""
        ...

    def about(self, row: int) -> dict[str, Any]:
        """Return the JSON of an image; of one without, nothing."""
        ...

    def label_map(self, row: int) -> bytes:
        """Return the file of the label map of an image; none where it has none."""
        ...

    def bytes_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the bytes of the file of each image, or about how many."""
        ...

    def notes(self) -> tuple[str, ...]:
        """Return what is to be known of how they are read."""
        ...


@dataclass(frozen=True)
class Annotating:
    """How annotations are read: class numbers of words, and what maps are of."""

    numbers: Mapping[str, int]
    objects: bool = False  # of the JSON
    masks: bool = False  # maps tell objects apart
    ignore: int | None = None


class ShardImages(FilesReadAlike):
    """Images of a set. `labels` are -1 where unknown."""

    def __init__(
        self,
        name: str,
        held: HeldSamples,
        labels: np.ndarray,
        classes: tuple[str, ...] | None,
        annotating: Annotating,
    ) -> None:
        self.name, self.held, self.labels, self.classes = name, held, labels, classes
        self.annotating = annotating
        self.rows = np.arange(len(held.index))
        self.has_objects = annotating.objects or annotating.masks
        self.notes: tuple[str, ...] = ()
        self.reading, self.raw, self.reader = Decoding(), False, None

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        label = int(self.labels[row])
        name = self.held.index.name(row)
        found = self._marked(row, label, name)
        image = self.as_read(found.image)
        several = self.held.index.several(row)
        if several is not None:
            several = tuple(self._number(each) for each in several)
        return Sample(image, name, found.objects, None if label < 0 else label, found.crowds, several)

    def _number(self, stored: int) -> int:
        """The class of a number of the index, where words are negative."""
        return stored if stored >= NO_LABEL else self.annotating.numbers[self.held.index.words[-2 - stored]]

    def number(self, label: Label) -> int:
        """Return the class that a label in the JSON means."""
        return label if isinstance(label, int) else self.annotating.numbers[label]

    def _marked(self, row: int, label: int, name: str) -> Marked:
        image = self.held.image(row)
        if not self.has_objects or not self.held.index.array("annotated")[row] & 1:
            return Marked(image)
        data, header = _opened(image)
        if header is None:  # whoever decodes it will say why
            return Marked(image)
        if self.annotating.masks:
            packed = self.held.label_map(row)
            values = read_values(packed, name) if packed else np.zeros((1, 1), np.uint8)
            if packed:
                values = turn(values, turn_of((values.shape[1], values.shape[0]), header, self.raw, name))
            return Marked(data, mapped_objects(values, self.annotating.ignore, label))
        found = read_objects(self.held.about(row), (header, self.raw), label, self.number, name)
        return found._replace(image=data)

    def stored_sizes(self, reading: Decoding) -> tuple[np.ndarray, np.ndarray]:
        """Return the table of sizes that the index keeps (`ShardIndex.sizes`), and which of its rows are the
        images.
        """
        return self.held.index.sizes(reading), self.rows

    def image_names(self) -> list[str]:
        """Return what the images are called, in order."""
        return [self.held.index.name(row) for row in self.rows.tolist()]

    def data(self, index: int) -> bytes:
        """Return the bytes of the file of an image. Raises OSError and BadImage."""
        return self.held.image(int(self.rows[index])).read_bytes()

    def drawn(self, raw: bool) -> None:
        """Say whether annotations were drawn on pixels as stored, before EXIF, where sizes do not tell."""
        self.raw = raw

    def annotation_size(self, index: int) -> tuple[int, int] | None:
        """Return the width and height that the annotation of an image states, if it states any."""
        row = int(self.rows[index])
        if self.annotating.objects and self.held.index.array("annotated")[row] & 1:
            tree = self.held.about(row)
            return stated_size(tree, objects_in(tree, ""))
        return self._map_size(row) if self.annotating.masks else None

    def _map_size(self, row: int) -> tuple[int, int] | None:
        packed = self.held.label_map(row)
        try:
            return read_header(packed).upright if packed else None
        except BadImage:
            return None

    def with_objects(self) -> int | None:
        """Return how many images have an annotated object."""
        return int((self.held.index.array("annotated")[self.rows] & 1).sum()) if self.has_objects else 0

    def stated(self) -> tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray]:
        """Return names (none of very many images), sizes in bytes, times (0: unknown) and the hashes that are
        known (S16; empty: not known), of the images in order.
        """
        index, count = self.held.index, len(self)
        if count > _NAMED:
            return [], np.full(count, -1), np.zeros(count, np.int64), np.array(index.hashes()[self.rows])
        names = [name.encode() for name in self.image_names()]
        stamps = [int(shard.stamp) if shard.stamp.isdecimal() else 0 for shard in index.shards]
        times = np.array(stamps, np.int64)[np.searchsorted(index.starts, self.rows, "right") - 1]
        return (
            names,
            self.held.bytes_of(self.rows) if self.held.exact else np.zeros(count, np.int64),
            times,
            np.array(index.hashes()[self.rows]),
        )

    def identity(self, chosen: Int64[np.ndarray, "n"] | None = None) -> Identity:
        """Return contents of the images, labels and annotations, in order; not names nor paths: that of the
        same images in a folder, where objects and label maps are not annotated.
        """
        rows = self.rows if chosen is None else self.rows[chosen]
        reading = "" if self.reading == Decoding() else f" {self.reading}"
        about: list[Any] = [self.classes, self.labels[rows].astype(np.int64), reading, self.raw]
        about += self._annotated(rows)
        return Identity.of(self.contents(rows), *about)

    def _annotated(self, rows: Int64[np.ndarray, "n"]) -> list[Any]:
        index = self.held.index
        flags = index.array("annotated")[rows]
        whole = hashlib.sha256()
        if self.annotating.objects:
            for row in rows[flags & 1 > 0].tolist():
                tree = self.held.about(row)
                part = {name: tree.get(name) for name in ("width", "height", "objects")}
                whole.update(json.dumps(part, sort_keys=True).encode() + b"\0")
        if self.annotating.masks:
            whole.update(f"ignore {self.annotating.ignore}".encode())
            for row in rows.tolist():
                whole.update(hash_of(self.held.label_map(row)))
        if (flags & 2).any():
            whole.update(repr([index.several(row) for row in rows.tolist()]).encode())
        return [whole.digest()] if self.has_objects or (flags & 2).any() else []

    def contents(self, rows: Int64[np.ndarray, "n"]) -> np.ndarray:
        """Return hashes (S16 [n]; empty: cannot be read) of images; those not yet known are found and
        kept.
        """
        known = self.held.index.hashes()
        missing = rows[known[rows] == b""]
        size = int(self.held.bytes_of(missing).sum())
        blocks = range(0, len(missing), HASHED_AT_ONCE)
        for start in shown_reading(blocks, (len(missing), size), self.name, self.held.index.folder):
            block = missing[start : start + HASHED_AT_ONCE]
            known[block] = np.array([self._hash(row) for row in block.tolist()], HASH)
        return np.array(known[rows])

    def _hash(self, row: int) -> bytes:
        try:
            return hash_of(self.held.image(row).read_bytes())
        except (OSError, BadImage):
            return b""

    def hold_out(self, fraction: float, seed: int, half: str) -> None:
        """Keep one half, drawn by contents, as a folder of the images does. Raises DataError where no image
        can be spared.
        """
        hashes = self.contents(self.rows).tolist()
        contents = [found or b"name " + name.encode() for found, name in
                    zip(hashes, self.image_names(), strict=True)]  # fmt: skip
        self.keep_half(contents, fraction, seed, half)


class ShardPixels(ShardImages):
    """Images with a label map each. `values[v]` is the class of the value v of the maps."""

    classes: tuple[str, ...]

    def __init__(
        self,
        name: str,
        held: HeldSamples,
        labels: np.ndarray,
        classes: tuple[str, ...],
        annotating: Annotating,
        values: UInt8[np.ndarray, "256"],
    ) -> None:
        if not 0 < len(classes) <= MAX_CLASSES:
            raise DataError(f"{name}: {len(classes)} classes; from 1 to {MAX_CLASSES} are possible")
        super().__init__(name, held, labels, classes, annotating)
        self.values = values

    def label_map(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """Return classes of the pixels of an image. Raises BadImage and DataError."""
        row = int(self.rows[index])
        name = self.held.index.name(row)
        packed = self.held.label_map(row)
        if not packed:
            raise BadImage("has no label map")
        where = f"{self.name}, {name}"
        labels = to_classes(read_values(packed, name), self.values, where)
        return upright_map(labels, self.held.image(row), self.raw, name)

    def annotation_size(self, index: int) -> tuple[int, int] | None:
        """Return the width and height of a label map."""
        return self._map_size(int(self.rows[index]))

    def _annotated(self, rows: Int64[np.ndarray, "n"]) -> list[Any]:
        maps = np.array([hash_of(self.held.label_map(row)) for row in rows.tolist()], HASH)
        return [*super()._annotated(rows), maps, self.values]


def _opened(image: Any) -> tuple[Any, Header | None]:
    try:
        data = image.read_bytes()
        return data, read_header(data)
    except (OSError, BadImage):
        return image, None
