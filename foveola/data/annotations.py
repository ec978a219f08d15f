"""Readers of object annotations: own boxes, PNG label maps, ImageNet's XML files, COCO's JSON.

A reader is called as `reader(row, file, path, label)` for image `row` of a source, `file` below its folder
and `path` on disk, and returns what to decode, the objects in it, and the crowds. Everything is kept in a
few arrays rather than in many Python objects: forked workers share arrays, but copy the memory of every
object that they look at.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Integer

from foveola.data.coco import check_annotation
from foveola.data.fit import turn_of, views_of
from foveola.data.formats import DAMAGED, Header, open_image, orientation_of, turn, turn_boxes
from foveola.data.readers import contents, read_header
from foveola.data.sample import BadImage, DataError, Objects, full_mask


class Marked(NamedTuple):
    """What is to be decoded, and what is annotated in it."""

    image: Path | bytes
    objects: Objects | None = None
    crowds: Objects | None = None


@runtime_checkable
class ObjectReader(Protocol):
    """Finds the objects of an image."""

    def __call__(self, row: int, file: str, path: Path, label: int) -> Marked: ...

    def digest(self) -> str:
        """Tells the annotations in memory, and the rules of reading, from others."""
        ...

    def path(self, file: str) -> Path | None:
        """Return the file that annotates one image alone, if there is one."""
        ...


class Packed:
    """Many byte strings in two arrays."""

    def __init__(self, items: Iterable[bytes]) -> None:
        items = list(items)
        self.ends = np.cumsum([len(item) for item in items], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(items), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.bytes[start : self.ends[index]].tobytes()


class BoxTable:
    """Boxes (x0, y0, x1, y1) of many images in pixels, each with a label or -1."""

    def __init__(self, boxes: Sequence[Sequence[tuple[float, float, float, float, int]]]) -> None:
        self.ends = np.cumsum([len(of_image) for of_image in boxes], dtype=np.int64)
        flat = [box for of_image in boxes for box in of_image]
        self.boxes = np.array([box[:4] for box in flat], np.float32).reshape(-1, 4)
        self.labels = np.array([box[4] for box in flat], np.int64)

    def of(self, row: int) -> tuple[Float32[np.ndarray, "K 4"], Int64[np.ndarray, "K"]]:
        """Return the boxes and labels of one image."""
        part = slice(self.ends[row - 1] if row else 0, self.ends[row])
        return self.boxes[part], self.labels[part]

    def digest(self) -> str:
        """Return a hash of all of it."""
        parts = (self.ends, self.boxes, self.labels)
        return hashlib.sha256(b"".join(array.tobytes() for array in parts)).hexdigest()


class PixelBoxes:
    """Reader of boxes in pixels. `size` is the (width, height) of all images; None: each has its own."""

    def __init__(self, table: BoxTable, size: tuple[int, int] | None = None) -> None:
        self.table, self.size = table, size

    def digest(self) -> str:
        """Return the digest of all boxes and labels."""
        return f"{self.table.digest()} {self.size}"

    def path(self, file: str) -> None:
        """Return None: all boxes are in memory."""

    def __call__(self, row: int, file: str, path: Path, label: int) -> Marked:
        boxes, labels = self.table.of(row)
        if not len(boxes):
            return Marked(path)
        data, size = path, self.size
        if size is None:
            data, header = _opened(path)
            if header is None:
                return Marked(path)
            size = header.upright
            outside = (boxes[:, :2] >= size).any(1) | (boxes[:, 2:] <= 0).any(1)
            if outside.any():
                box = ", ".join(f"{side:g}" for side in boxes[outside][0])
                raise BadImage(f"{file}: its box {box} lies outside its {size[0]}x{size[1]} pixels")
        labels = np.where(labels < 0, label, labels)
        return Marked(data, Objects.from_boxes(boxes / np.array([*size, *size], np.float32), labels))


class LabelMaps:
    """Reader of PNG label maps, named like the images: a value per object, 0 and `ignore` for none."""

    raw = False  # whether maps are of pixels as stored, where their size does not tell

    def __init__(self, folder: Path, ignore: int | None = None) -> None:
        self.folder, self.ignore = folder, ignore

    def digest(self) -> str:
        """Return the digest of the rule of reading."""
        return f"ignore {self.ignore}"

    def path(self, file: str) -> Path:
        """Return where the label map of an image would be."""
        return self.folder / Path(file).with_suffix(".png")

    def __call__(self, row: int, file: str, path: Path, label: int) -> Marked:
        where = self.path(file)
        if not where.is_file():
            return Marked(path)
        values = read_values(where, file)
        data, header = _opened(path)
        if header is None:
            return Marked(path)
        values = turn(values, turn_of((values.shape[1], values.shape[0]), header, self.raw, file))
        found = [value for value in np.unique(values) if value not in (0, self.ignore)]
        if not found:
            return Marked(data)
        masks = [values == value for value in found]
        return Marked(data, mask_objects(masks, np.full(len(masks), label)))


class XmlBoxes:
    """Reader of ILSVRC2012 XML files: `<folder>/<class>/<name>.xml` or `<folder>/<name>.xml`.

    XML boxes are in pixels of the size that the XML states, which is not always the image's. Class names in
    the files are not to be trusted: objects get the image's label.
    """

    raw = False  # whether boxes are of pixels as stored, where the size does not tell

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def digest(self) -> str:
        """Return an empty digest: there is only one rule of reading."""
        return "xml"

    def path(self, file: str) -> Path | None:
        """Return the XML file of an image, if there is one."""
        name = Path(file).with_suffix(".xml")
        return next((p for p in (self.folder / name, self.folder / name.name) if p.is_file()), None)

    def __call__(self, row: int, file: str, path: Path, label: int) -> Marked:
        where = self.path(file)
        if where is None:
            return Marked(path)
        try:
            size, boxes = read_xml(where)
        except XML_ERRORS as error:
            raise BadImage(f"{file}: its annotation {where} cannot be read") from error
        data, header = _opened(path)
        if header is not None and header.orientation != 1:
            stored, upright = views_of(size, header)
            if stored and (self.raw or not upright):
                boxes = turn_boxes(boxes, header.orientation)
        return Marked(data, Objects.from_boxes(boxes, np.full(len(boxes), label)))

    def size_of(self, file: str) -> tuple[int, int] | None:
        """Return the width and height that the XML file of an image states; None where there is none to be
        read.
        """
        where = self.path(file)
        try:
            return None if where is None else read_xml(where)[0]
        except (OSError, *XML_ERRORS):
            return None


class CocoRegions:
    """Boxes and masks (polygons or RLE) of many images, packed until asked for."""

    def __init__(
        self, sizes: Int64[np.ndarray, "N 2"], annotations: list[list[dict]], labels: dict[int, int]
    ) -> None:
        boxes, areas, masks, scores = [], [], [], []
        for (width, height), of_image in zip(sizes.tolist(), annotations, strict=True):
            rows = []
            for annotation in of_image:
                check_annotation(annotation, width, height)
                x, y, w, h = annotation["bbox"]
                rows.append((x, y, x + w, y + h, labels[annotation["category_id"]]))
                areas.append(annotation.get("area", w * h) / (width * height))
                masks.append(_pack_mask(annotation.get("segmentation"), height, width))
                scores.append(annotation.get("score"))
            boxes.append(rows)
        self.sizes = sizes  # width, height
        self.table, self.masks = BoxTable(boxes), Packed(masks)
        self.areas = np.array(areas, np.float32)
        known = [score for score in scores if score is not None]
        if 0 < len(known) < len(scores):
            raise DataError(
                f"{len(known)} of {len(scores)} annotations have a score; all or none can have one"
            )
        self.scores = np.array(known, np.float32) if known else None

    def digest(self) -> str:
        """Return the digest of sizes, boxes, labels, areas, polygons, RLE, and scores if there are any."""
        parts = (self.sizes, self.areas, self.masks.ends, self.masks.bytes)
        parts += () if self.scores is None else (self.scores,)
        own = hashlib.sha256(b"".join(array.tobytes() for array in parts)).hexdigest()
        return f"{self.table.digest()} {own}"

    def of(self, row: int, orientation: int) -> Objects | None:
        """Return those of one image, turned by an EXIF orientation."""
        boxes, labels = self.table.of(row)
        if not len(boxes):
            return None
        first = int(self.table.ends[row]) - len(boxes)
        width, height = (int(side) for side in self.sizes[row])
        masks = [_unpack_mask(self.masks[i], height, width) for i in range(first, first + len(boxes))]
        part = slice(first, first + len(boxes))
        scores = None if self.scores is None else self.scores[part]
        unit = boxes / np.array([width, height, width, height], np.float32)
        if orientation != 1:
            unit = turn_boxes(unit, orientation)
            masks = [None if mask is None else turn(full_mask(mask), orientation) for mask in masks]
        return Objects.from_boxes(unit, labels, masks, self.areas[part], scores)


class CocoObjects:
    """Reader of COCO instances: objects, and crowds apart from them."""

    raw = False  # whether annotations are of pixels as stored, where their size does not tell

    def __init__(
        self, sizes: Int64[np.ndarray, "N 2"], annotations: list[list[dict]], labels: dict[int, int]
    ) -> None:
        self.sizes = sizes  # width, height
        apart = [[[a for a in of_image if bool(a.get("iscrowd")) is crowd] for of_image in annotations]
                 for crowd in (False, True)]  # fmt: skip
        self.objects, self.crowds = (CocoRegions(sizes, part, labels) for part in apart)
        self.table = self.objects.table

    def digest(self) -> str:
        """Return the digest of the objects. Crowds are left out: data stay what they were before these were
        read.
        """
        return self.objects.digest()

    def path(self, file: str) -> None:
        """Return None: all annotations are in memory."""

    def holds(self, row: int) -> bool:
        """Return whether anything is annotated in an image."""
        return any(len(each.table.of(row)[0]) for each in (self.objects, self.crowds))

    def __call__(self, row: int, file: str, path: Path, label: int) -> Marked:
        if not self.holds(row):
            return Marked(path)
        data, header = _opened(path)
        if header is None:
            return Marked(path)
        width, height = (int(side) for side in self.sizes[row])
        orientation = turn_of((width, height), header, self.raw, file)
        return Marked(data, self.objects.of(row, orientation), self.crowds.of(row, orientation))


def _opened(path: Path) -> tuple[Path | bytes, Header | None]:
    """The bytes of an image and its header; None where it cannot be read: whoever decodes it will say why."""
    try:
        data = contents(path)
        return data, read_header(data)
    except (OSError, BadImage):
        return path, None


# -- files ------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Return a JSON file. Raises DataError with the line of what is wrong."""
    if not path.is_file():
        raise DataError(f"no annotation file {path}")
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError:
        raise DataError(f"{path} is not JSON (not even text)") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None


XML_ERRORS = (ElementTree.ParseError, AttributeError, OverflowError, TypeError, ValueError)  # of no such file


def read_xml(path: Path) -> tuple[tuple[int, int], Float[np.ndarray, "K 4"]]:
    """Return the width and height that an ILSVRC2012 XML file states, and all boxes in units of them."""
    root = ElementTree.parse(path).getroot()
    size = [int(float(root.find(f"size/{side}").text)) for side in ("width", "height")]  # type: ignore[union-attr, arg-type]
    if min(size) <= 0:
        raise ValueError(f"size {size}")
    names = ("xmin", "ymin", "xmax", "ymax")
    boxes = [[float(box.find(name).text) for name in names] for box in root.iterfind("object/bndbox")]  # type: ignore
    return (size[0], size[1]), np.array(boxes, np.float64).reshape(-1, 4) / (size * 2)


def read_values(where: Path | bytes, file: str) -> Integer[np.ndarray, "H W"]:
    """Return the values of a PNG label map (grey of 8 or 16 bits, or palette: its indices). `file` is its
    image.

    Raises BadImage for a map that is missing or damaged, DataError for one with several channels.
    """
    shown = where if isinstance(where, Path) else "in the data set"
    try:
        data = where.read_bytes() if isinstance(where, Path) else where
        image = open_image(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata and size
            values = np.asarray(image)
    except (BadImage, *DAMAGED) as error:
        raise BadImage(f"{file}: its label map {shown} cannot be read ({error})") from error
    values = turn(values, orientation_of(image))
    if values.dtype.kind == "b":  # a PNG of one bit
        values = values.astype(np.uint8)
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise DataError(f"{shown}: a label map has one channel (grey or palette), this one is {image.mode}")
    return values


def map_size(where: Path) -> tuple[int, int] | None:
    """Return the width and height of a label map, from its header; None where it cannot be read."""
    _, header = _opened(where)
    return None if header is None else header.upright


# -- masks ------------------------------------------------------------------------------------------------


def mask_objects(masks: Sequence[Bool[np.ndarray, "H W"]], labels: Int64[np.ndarray, "K"]) -> Objects:
    """Return objects of masks that are not empty: boxes around them, and their true areas."""
    height, width = masks[0].shape
    boxes = np.empty((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box[:] = xs[0] / width, ys[0] / height, (xs[-1] + 1) / width, (ys[-1] + 1) / height
    return Objects(boxes, np.array([mask.mean() for mask in masks], np.float32), labels, tuple(masks))


def _pack_mask(segmentation: Any, height: int, width: int) -> bytes:
    """Polygons as float32 with a NaN after each ring, RLE as compressed counts; a letter tells them apart."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = _compress(segmentation, height, width)
        counts = segmentation["counts"]
        return b"r" + (counts.encode() if isinstance(counts, str) else counts)
    rings = [ring for ring in segmentation or [] if len(ring) >= 6]  # fewer points enclose nothing
    if not rings:
        return b""
    return b"p" + np.concatenate([[*ring, np.nan] for ring in rings]).astype(np.float32).tobytes()


def _compress(segmentation: Any, height: int, width: int) -> Any:
    """Compressed RLE of RLE whose counts are a list."""
    from pycocotools import mask as coco

    return coco.frPyObjects(segmentation, height, width)


def _unpack_mask(packed: bytes, height: int, width: int) -> dict | None:
    if not packed:
        return None
    size = [height, width]
    if packed[:1] == b"r":
        return {"size": size, "counts": packed[1:]}
    points = np.frombuffer(packed, np.float32, offset=1)
    ends = np.flatnonzero(np.isnan(points))
    starts = [0, *(ends[:-1] + 1)]
    return {"size": size, "polygons": [points[a:b].tolist() for a, b in zip(starts, ends, strict=True)]}
