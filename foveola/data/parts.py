"""Parts of images as images: tiles, pages of stacks, frames of videos; of slides, where tissue is.

A source around any source. What each image is cut into follows from its size, which is read from its header
once; parts are decoded alone where the library can.
"""

import re
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from foveola.data.annotations import read_json
from foveola.data.cut import cut_objects
from foveola.data.decoding import Decoding, ImageFile, Window, channels_of, source_depth
from foveola.data.formats import FILE_KINDS
from foveola.data.identity import Identity, identity_of
from foveola.data.sample import BadImage, DataError, Sample
from foveola.data.selected import SelectedImages
from foveola.data.sizes import path_of, read_sizes
from foveola.data.slides import tissue_of

PART = re.compile(r"#\d+(,\d+){0,2}$")
TISSUE = 0.1  # fraction of a tile of a slide that shows tissue, where nothing else is said
SLIDE, VIDEO = FILE_KINDS.index("slide"), FILE_KINDS.index("video")


@dataclass(frozen=True)
class Cutting:
    """How images are cut. `tiles` are pixels a side, `overlap` those that two of them share at least.

    `pages`: each page of a stack is an image. `tissue`: the fraction of a tile of a slide that shows tissue
    at least. Frames of videos are parts wherever the decoding says which are taken.
    """

    tiles: int | None = None
    overlap: int = 0
    pages: bool = False
    tissue: float | None = None

    def check(self) -> None:
        """Raise DataError for options that have no effect, or none that can be meant."""
        if self.tiles is None:
            for name, value in (("overlap", self.overlap or None), ("tissue", self.tissue)):
                if value is not None:
                    raise DataError(f"{name}={value:g} needs tiles=, the pixels a side of a tile")
        elif self.overlap >= self.tiles:
            raise DataError(f"overlap={self.overlap} needs to be less than tiles={self.tiles}")

    def along(self, side: int) -> int:
        """Return how many tiles a side of an image is cut into."""
        if self.tiles is None or side <= self.tiles:
            return 1
        return -(-(side - self.tiles) // (self.tiles - self.overlap)) + 1

    def start(self, number: int, side: int) -> int:
        """Return where a tile along a side begins. The last one ends at the border of the image."""
        tile = self.tiles or side
        return max(min(number * (tile - self.overlap), side - tile), 0)


class ImageParts(SelectedImages):
    """A source of the parts of the images of another, in their order; pages, and tiles row by row."""

    def __init__(self, source: Any, cutting: Cutting) -> None:
        cutting.check()
        self.source, self.cutting = source, cutting
        self.name: str = source.name
        self.classes, self.has_objects = source.classes, source.has_objects
        self.reading: Decoding = getattr(source, "reading", Decoding())
        self.sizes = read_sizes(source, self.reading)
        self._check_effects()
        counts = np.array([self._count(*size) for size in self.sizes.tolist()], np.int64)
        self.tissue: dict[int, np.ndarray] = {}  # of slides: which of their tiles show some
        self.notes: tuple[str, ...] = (*getattr(source, "notes", ()), *self._leave_glass(counts))
        self.ends = np.cumsum(counts)
        self.rows = np.arange(int(self.ends[-1]))
        if not len(self.rows):
            raise DataError(f"{self.name}: no tile shows tissue; tissue= takes a smaller fraction, or 0")

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return channels_of(self.source)

    @property
    def depth(self) -> int:
        """Bits of a channel of the images, 8 or 16."""
        return source_depth(self.source)

    def read_as(self, reading: Decoding) -> None:
        """Read all files, if it has any, in this way; pages that are images of their own stay so."""
        if not hasattr(self.source, "read_as"):
            return
        self.reading = replace(reading, page=None) if self.cutting.pages else reading
        self.source = copy(self.source)
        self.source.read_as(self.reading)

    def __getitem__(self, index: int) -> Sample:
        image, page, window = self.part(index)
        sample = self.source[image]
        if page is None and window is None:
            return sample
        name = sample.name + _suffix(page, window)
        pixels = _part_of(sample.image, page, window)
        if window is None:
            return replace(sample, image=pixels, name=name)
        size = int(self.sizes[image, 0]), int(self.sizes[image, 1])
        objects, crowds = (cut_objects(each, window, size) for each in (sample.objects, sample.crowds))
        return replace(sample, image=pixels, name=name, objects=objects, crowds=crowds)

    def part(self, index: int) -> tuple[int, int | None, Window | None]:
        """Return which image a part is of, its page or frame (from 0; None: as the image is read) and its
        pixels (None: all).
        """
        row = int(self.rows[index])
        image = int(np.searchsorted(self.ends, row, side="right"))
        number = row - (int(self.ends[image - 1]) if image else 0)
        if image in self.tissue:
            number = int(self.tissue[image][number])
        width, height = self.sizes[image, :2].tolist()
        if not width:
            return image, None, None
        page, number = divmod(number, self.cutting.along(width) * self.cutting.along(height))
        window = None if self.cutting.tiles is None else self._window(number, width, height)
        return image, (page if self._paged(image) else None), window

    def image_names(self) -> list[str]:
        """Return what the parts are called, in order."""
        own = getattr(self.source, "image_names", None)
        if own is None:
            return [self[index].name for index in range(len(self))]
        names = own()
        found = (self.part(index) for index in range(len(self)))
        return [names[image] + _suffix(page, window) for image, page, window in found]

    def identity(self, chosen: Int64[np.ndarray, "n"] | None = None) -> Identity:
        """Return the contents of the image of each part, and what tells the parts.

        So parts of one image count as one where halves are made and sets compared: they show one scene.
        """
        rows = self.rows if chosen is None else self.rows[chosen]
        images, number = np.unique(np.searchsorted(self.ends, rows, side="right"), return_inverse=True)
        plain = identity_of(self.source, images)
        tissue = [self.tissue.get(image, b"") for image in images.tolist()]
        return Identity.of(plain.contents[number], plain.digest, repr(self.cutting), rows, *tissue)

    # -- of one image --------------------------------------------------------------------------------------

    def _paged(self, image: int) -> bool:
        """Whether an image has pages or frames that are images of their own."""
        _, _, pages, kind = self.sizes[image].tolist()
        return kind == VIDEO or (self.cutting.pages and pages > 1)

    def _count(self, width: int, height: int, pages: int, kind: int) -> int:
        if not width:
            return 1
        pages = pages if self.cutting.pages or kind == VIDEO else 1
        return pages * self.cutting.along(width) * self.cutting.along(height)

    def _window(self, number: int, width: int, height: int) -> Window:
        """The pixels of a tile of an image."""
        row, column = divmod(number, self.cutting.along(width))
        x0, y0 = self.cutting.start(column, width), self.cutting.start(row, height)
        tile = self.cutting.tiles or max(width, height)
        return x0, y0, min(x0 + tile, width), min(y0 + tile, height)

    def _leave_glass(self, counts: Int64[np.ndarray, "n"]) -> tuple[str, ...]:
        """Leave out tiles of slides that show too little tissue, and say how many."""
        fraction = TISSUE if self.cutting.tissue is None else self.cutting.tissue
        slides = np.flatnonzero((self.sizes[:, 3] == SLIDE) & (self.sizes[:, 0] > 0)).tolist()
        if self.cutting.tiles is None or not fraction or not slides:
            return ()
        before = int(counts[slides].sum())
        for image in slides:
            width, height = self.sizes[image, :2].tolist()
            try:
                seen = tissue_of(path_of(self.source, image), self.reading, self.cutting.tiles)
            except BadImage:  # whoever decodes it will say why
                continue
            windows = np.array([self._window(number, width, height) for number in range(int(counts[image]))])
            self.tissue[image] = np.flatnonzero(_fractions(seen, windows, (width, height)) >= fraction)
            counts[image] = len(self.tissue[image])
        out = before - int(counts[slides].sum())
        what = f"{out:,} of {before:,} tiles of slides are left out: tissue covers less than {fraction:g}"
        return (f"{self.name}: {what} of them (tissue= is that fraction)",) if out else ()

    def _check_effects(self) -> None:
        readable = self.sizes[self.sizes[:, 0] > 0]
        kinds, pages = readable[:, 3], readable[:, 2]
        of_slides = {"tissue": self.cutting.tissue, "level": self.reading.level, "mpp": self.reading.mpp}
        of_videos = {"every": self.reading.every, "seconds": self.reading.seconds}
        for keys, kind, what in ((of_slides, SLIDE, "whole slide that has it"), (of_videos, VIDEO, "video")):
            given = [key for key, value in keys.items() if value is not None]
            if given and not (kinds == kind).any():
                raise DataError(f"{self.name}: {given[0]}= changes nothing, as no image is a {what}")
        if self.cutting.pages and not (pages > 1).any():
            raise DataError(f"{self.name}: pages=each changes nothing, as no image has several pages")
        annotated = self.has_objects or hasattr(self.source, "label_map")
        if annotated and any(map(self._paged, range(len(self.sizes)))):
            raise DataError(f"{self.name}: annotations are of files, and do not say of which page or frame")


class PixelParts(ImageParts):
    """Parts of images with a class for every pixel."""

    def label_map(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Return classes of the pixels of a part. Raises BadImage and DataError."""
        image, _, window = self.part(index)
        labels = self.source.label_map(image)
        if window is None:
            return labels
        width, height = self.sizes[image, :2].tolist()
        if labels.shape != (height, width):
            raise BadImage(f"is {width}x{height} pixels, its label map {labels.shape[1]}x{labels.shape[0]}")
        x0, y0, x1, y1 = window
        return labels[y0:y1, x0:x1]


def names_parts(path: Path) -> bool:
    """Return whether a COCO file names parts of images (`image.tif#0,512`) rather than images."""
    tree = read_json(path)
    images = tree.get("images") if isinstance(tree, dict) else None
    first = images[0] if isinstance(images, list) and images else None
    name = first.get("file_name") if isinstance(first, dict) else None
    return isinstance(name, str) and PART.search(name) is not None


def cut_into_parts(source: Any, cutting: Cutting) -> ImageParts:
    """Return a source of the parts of the images of another. Raises DataError for options without effect."""
    return (PixelParts if hasattr(source, "label_map") else ImageParts)(source, cutting)


def _suffix(page: int | None, window: Window | None) -> str:
    """What tells a part from the others of its image: the page, from 1, and where the tile begins."""
    numbers = ([] if page is None else [page + 1]) + ([] if window is None else [*window[:2]])
    return f"#{','.join(map(str, numbers))}" if numbers else ""


def _part_of(image: Any, page: int | None, window: Window | None) -> Any:
    if isinstance(image, np.ndarray):
        assert window is not None
        x0, y0, x1, y1 = window
        return np.ascontiguousarray(image[y0:y1, x0:x1])
    file = image if isinstance(image, ImageFile) else ImageFile(image, Decoding())
    reading = replace(file.reading, window=window, page=file.reading.page if page is None else page)
    return ImageFile(file.data, reading)


def _fractions(
    seen: Bool[np.ndarray, "h w"], windows: Int64[np.ndarray, "n 4"], size: tuple[int, int]
) -> np.ndarray:
    """The fraction of each window of an image of `size` in which there is tissue, by its overview."""
    height, width = seen.shape
    sums = np.zeros((height + 1, width + 1))
    sums[1:, 1:] = seen.cumsum(axis=0).cumsum(axis=1)
    scale = np.array([width / size[0], height / size[1]] * 2)
    x0, y0, x1, y1 = np.rint(windows * scale).astype(np.int64).T
    x0, y0 = np.minimum(x0, width - 1), np.minimum(y0, height - 1)
    x1, y1 = np.maximum(x1, x0 + 1).clip(None, width), np.maximum(y1, y0 + 1).clip(None, height)
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return inside / ((x1 - x0) * (y1 - y0))
