"""Objects that a file gives to the images of any source, by their names: `annotations=` of data strings."""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Int64

from foveola.data.decoding import Decoding, ImageFile
from foveola.data.fit import turn_of
from foveola.data.formats import Header
from foveola.data.identity import Identity, identity_of
from foveola.data.instances import AGNOSTIC, InstancesFile, note_missing_objects, read_instances
from foveola.data.listing import match_names, printable
from foveola.data.readers import contents, read_header
from foveola.data.sample import BadImage, DataError, Objects, Sample


class GivenObjects:
    """A source with the objects of a COCO file in place of its own. All else is that of the source.

    Images are met by their names: the path below the folder of the data, or the file name where only one
    image has it. An image that the file does not name has no objects. The classes of the file come behind
    those of the source; where it tells none apart (`AGNOSTIC`), an object has the label of its image. Raises
    DataError for a file that names images which the source lacks, or one of them twice.
    """

    has_objects = True

    def __init__(self, source: Any, path: Path | InstancesFile) -> None:
        file = read_instances(path) if isinstance(path, Path) else path
        path = file.path
        names = image_names(source)
        met = match_names(file.files, names, path)
        indices = np.array([met[name] for name in file.files], np.int64)
        numbers, counts = np.unique(indices, return_counts=True)
        if counts.max() > 1:
            raise DataError(f"{path}: names the image {names[numbers[counts.argmax()]]} more than once")
        rows = getattr(source, "rows", np.arange(len(source)))
        self.given = np.full(int(rows.max()) + 1, -1)  # in the file, of each image by its row
        self.given[rows[indices]] = np.arange(len(file.files))
        self.source = source
        self.classes, labels = _classes(source, file)
        self.reader = file.reader(labels)
        self.raw = False
        self.name: str = source.name
        if "annotations=" not in self.name:
            self.name += f"{'&' if '?' in self.name else '?'}annotations={quote(str(path))}"
        self.path = path
        self.says_lacking = True  # among its notes, which images have no objects

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "source" not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        row = self._row(index)
        without = replace(sample, objects=None, crowds=None)
        if row < 0 or not self.reader.holds(row):
            return without
        image, header = _opened(sample.image)
        if header is None:  # whoever decodes it will say why
            return without
        width, height = (int(side) for side in self.reader.sizes[row])
        orientation = turn_of((width, height), header, self.raw, sample.name)
        objects, crowds = (each.of(row, orientation) for each in (self.reader.objects, self.reader.crowds))
        named = _named(objects, sample.label), _named(crowds, sample.label)
        return replace(sample, image=image, objects=named[0], crowds=named[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the source says, and how many of the images that are left have objects."""
        own: tuple[str, ...] = tuple(getattr(self.source, "notes", ()))
        if not self.says_lacking:
            return own
        given = self._given()
        own += note_missing_objects(self.path, self.with_objects(), len(given))
        missing = np.flatnonzero(given < 0)
        if len(missing):
            own += (
                f"{self.path}: names {len(given) - len(missing):,} of {len(given):,} images; those that it "
                f"leaves out have no objects, such as {image_names(self.source)[missing[0]]}",
            )
        return own

    def annotation_size(self, index: int) -> tuple[int, int] | None:
        """Return the width and height that the file states for an image, if it names it."""
        row = self._row(index)
        return None if row < 0 else (int(self.reader.sizes[row, 0]), int(self.reader.sizes[row, 1]))

    def drawn(self, raw: bool) -> None:
        """Say whether objects were drawn on pixels as stored, before EXIF, where sizes do not tell."""
        self.raw = raw
        self.source.drawn(raw)

    def with_objects(self) -> int:
        """Return how many images have an object."""
        has = np.diff(self.reader.table.ends, prepend=0) > 0
        given = self._given()
        return int(has[given[given >= 0]].sum())

    def read_as(self, reading: Decoding) -> None:
        """Read all files in this way."""
        self.source = copy(self.source)
        self.source.read_as(reading)

    def keep(self, indices: Int64[np.ndarray, "n"]) -> None:
        """Leave only the images of these indices, in their order. Raises DataError where the source
        cannot.
        """
        if not hasattr(self.source, "keep"):
            raise DataError(f"{self.name}: its source has no method keep(indices)")
        self.source = copy(self.source)
        self.source.keep(indices)

    def identity(self, chosen: Int64[np.ndarray, "n"] | None = None) -> Identity:
        """Return the identity of the images, and of the objects that the file gives them."""
        plain = identity_of(self.source, chosen)
        given = self._given() if chosen is None else self._given()[chosen]
        about = self.classes, given, self.reader.digest(), self.raw
        return Identity.of(plain.contents, plain.digest, *about)

    def _row(self, index: int) -> int:
        """Which image of the file it is, or -1."""
        rows = getattr(self.source, "rows", None)
        return int(self.given[index if rows is None else rows[index]])

    def _given(self) -> Int64[np.ndarray, "n"]:
        """The same of each image that is left."""
        rows = getattr(self.source, "rows", None)
        return self.given if rows is None else self.given[rows]


def image_names(source: Any) -> list[str]:
    """Return what the images of a source are called, in order; an empty name where that cannot be had."""
    own = getattr(source, "image_names", None)
    if callable(own):
        return own()  # type: ignore[return-value]
    names = []
    for index in range(len(source)):
        try:
            names.append(printable(source[index].name))
        except (BadImage, OSError):
            names.append("")
    return names


def _classes(source: Any, file: InstancesFile) -> tuple[tuple[str, ...] | None, dict[int, int]]:
    """The classes of both, and the label of each category id; -1 where the image's label is meant."""
    own: tuple[str, ...] = tuple(source.classes or ())
    if file.classes == AGNOSTIC and AGNOSTIC[0] not in own:
        return source.classes, dict.fromkeys(file.labels, -1)
    classes = (*own, *(name for name in dict.fromkeys(file.classes) if name not in own))
    if len(classes) > len(own) and hasattr(source, "label_map"):
        new = classes[len(own)]
        raise DataError(
            f"{file.path}: its class {new!r} is none of the classes of the pixels of {source.name}"
        )
    index = {name: label for label, name in enumerate(classes)}
    return classes, {number: index[file.classes[label]] for number, label in file.labels.items()}


def _named(objects: Objects | None, label: int | None) -> Objects | None:
    if objects is None or objects.labels is None or label is None:
        return objects
    return replace(objects, labels=np.where(objects.labels < 0, label, objects.labels))


def _opened(image: Any) -> tuple[Any, Header | None]:
    """An image, read at most once, and its header; None where it cannot be read."""
    if isinstance(image, ImageFile):
        if image.reading.window is not None:
            x0, y0, x1, y1 = image.reading.window
            return image, Header(x1 - x0, y1 - y0)
        data, header = _opened(image.data)
        return ImageFile(data, image.reading), header
    if isinstance(image, np.ndarray):
        return image, Header(image.shape[1], image.shape[0])
    try:
        data = contents(image)
        return data, read_header(data)
    except (OSError, BadImage):
        return image, None
