"""How data sets lie on disk: class folders, Tiny ImageNet, ImageNet, COCO. An opener returns `Images`."""

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from foveola.data.annotations import (
    BoxTable,
    CocoObjects,
    LabelMaps,
    Marked,
    ObjectReader,
    Packed,
    PixelBoxes,
    XmlBoxes,
    map_size,
)
from foveola.data.decoding import Decoding
from foveola.data.identity import Identity, hash_files
from foveola.data.instances import note_missing_objects, read_instances
from foveola.data.listing import check_listed, find_images, match_names, misfit, printable, read_lines
from foveola.data.readers import contents
from foveola.data.sample import BadImage, DataError, Sample
from foveola.data.selected import FilesReadAlike
from foveola.data.tables import read_boxes

PROBES = 500  # images looked at to see whether a folder of annotations belongs to them


class ImageFiles(FilesReadAlike):
    """Image files below a folder. `labels` are -1 where unknown; `reader` finds an image's objects."""

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        reader: ObjectReader | None = None,
    ) -> None:
        self.name, self.root, self.reader = name, root, reader
        self.classes = None if classes is None else tuple(classes)
        self.files = Packed(os.fsencode(file) for file in files)
        self.labels = np.full(len(files), -1) if labels is None else np.array(labels, np.int64)
        self.label_sets: Sequence[tuple[int, ...]] | None = None  # of images that may have several classes
        self.rows = np.arange(len(files))
        self.annotations = ""  # tells what a subclass knows about its images from what another might
        self.has_objects = reader is not None
        self.notes: tuple[str, ...] = ()  # what whoever uses the data should know
        self.reading, self.raw = Decoding(), False
        # By which an annotation file of COCO calls its images (by row) and its classes; None elsewhere.
        self.image_ids: np.ndarray | None = None
        self.category_ids: np.ndarray | None = None

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        file, label = os.fsdecode(self.files[row]), int(self.labels[row])
        found = Marked(self.root / file)
        if self.reader is not None:
            found = self.reader(row, file, self.root / file, label)
        image = self.as_read(found.image)
        known = None if label < 0 else label
        several = None if self.label_sets is None else self.label_sets[row]
        return Sample(image, printable(file), found.objects, known, found.crowds, several)

    def path(self, index: int) -> Path:
        """Return the file of an image."""
        return self.root / os.fsdecode(self.files[int(self.rows[index])])

    def image_names(self) -> list[str]:
        """Return what the images are called, in order."""
        return [printable(os.fsdecode(self.files[row])) for row in self.rows.tolist()]

    def files_below(self) -> tuple[Path, list[str]]:
        """Return the folder, and the paths of the images below it, in order."""
        return self.root, [os.fsdecode(self.files[row]) for row in self.rows.tolist()]

    def data(self, index: int) -> bytes | Path:
        """Return the bytes of the file of an image, or its path where its reader takes that.

        Raises OSError, and BadImage for what is no file.
        """
        path = self.path(index)
        if not path.is_file():  # a pipe would be waited for
            raise BadImage("no file")
        return contents(path)

    def _about(self) -> str:
        return self.annotations + ("" if self.reading == Decoding() else f" {self.reading}")

    def drawn(self, raw: bool) -> None:
        """Say whether annotations were drawn on pixels as stored, before EXIF, where sizes do not tell."""
        self.raw = raw
        if isinstance(self.reader, LabelMaps | CocoObjects | XmlBoxes):
            self.reader.raw = raw

    def annotation_size(self, index: int) -> tuple[int, int] | None:
        """Return the width and height that the annotation of an image states, if it states any."""
        row = int(self.rows[index])
        if isinstance(self.reader, CocoObjects):
            return int(self.reader.sizes[row, 0]), int(self.reader.sizes[row, 1])
        if isinstance(self.reader, LabelMaps):
            return map_size(self.reader.path(os.fsdecode(self.files[row])))
        if isinstance(self.reader, XmlBoxes):
            return self.reader.size_of(os.fsdecode(self.files[row]))
        return None

    def with_objects(self) -> int | None:
        """Return how many images have an annotated object; None where the file of each would have to be
        read.
        """
        table = getattr(self.reader, "table", None)
        if table is None:
            return None
        return int((np.diff(table.ends, prepend=0)[self.rows] > 0).sum())

    def identity(self, chosen: Int64[np.ndarray, "n"] | None = None) -> Identity:
        """Return contents of the image files, labels and annotations, in order; not names nor paths."""
        rows = self.rows if chosen is None else self.rows[chosen]
        files = [os.fsdecode(self.files[row]) for row in rows.tolist()]
        about = [self.classes, self.labels[rows], self._about(), self.raw]
        if self.reader is not None:
            about.append(self.reader.digest())
        beside = [self.beside(row) for row in rows.tolist()]
        if any(beside):
            about.append(
                hash_files(self.root, [path or "" for path in beside], f"annotations of {self.name}")
            )
        return Identity.of(hash_files(self.root, files, self.name), *about)

    def beside(self, row: int) -> str | None:
        """Return the path (from the root, or absolute) of the file that annotates one image alone, if it has
        one.
        """
        path = None if self.reader is None else self.reader.path(os.fsdecode(self.files[row]))
        return None if path is None else str(path.absolute())

    def hold_out(self, fraction: float, seed: int, half: str) -> None:
        """Keep one half: "test", `fraction` of the images, drawn from each class, or "train", the others.

        Contents are drawn rather than names, so that copies of an image are in one half: all files are read.
        Raises DataError where no image can be spared.
        """
        files = [os.fsdecode(self.files[row]) for row in self.rows.tolist()]
        hashes = hash_files(self.root, files, self.name).tolist()
        contents = [found or b"name " + os.fsencode(file) for found, file in zip(hashes, files, strict=True)]
        self.keep_half(contents, fraction, seed, half)


def open_folder(
    name: str,
    root: Path,
    boxes: Path | None = None,
    masks: Path | None = None,
    ignore: int | None = None,
    videos: bool = False,
) -> ImageFiles:
    """Return images below a folder: class subfolders make labels; own boxes or label maps make objects."""
    files, notes = find_images(root, masks, videos)
    tops = [file.split("/", 1)[0] if "/" in file else None for file in files]
    folders = {top for top in tops if top is not None}
    if boxes is not None and masks is not None:
        raise DataError("folder: takes boxes= or masks=, not both")
    found = {} if boxes is None else read_boxes(boxes)
    classes = sorted(folders | {box[4] for of_image in found.values() for box in of_image if box[4]})
    index = {label: number for number, label in enumerate(classes)}
    reader = None
    if boxes is not None:
        rows: list[list] = [[] for _ in files]
        for key, row in match_names(found, files, boxes).items():
            rows[row] += [(*box[:4], index[box[4]] if box[4] else -1) for box in found[key]]
        reader = PixelBoxes(BoxTable(rows))
        notes += note_missing_objects(boxes, sum(map(bool, rows)), len(files))
    elif masks is not None:
        reader = maps = LabelMaps(masks, ignore)
        _probe(files, masks, lambda file: maps.path(file).is_file())
    labels = [-1 if top is None else index[top] for top in tops]
    source = ImageFiles(name, root, files, labels, classes or None, reader)
    source.notes = notes
    return source


def open_tiny_imagenet(name: str, root: Path, split: str) -> ImageFiles:
    """Open Tiny ImageNet as it is distributed, or any part of it: what is not on disk is left out."""
    words = _read_table(root, "words.txt", 2) if (root / "words.txt").is_file() else []
    wnids = sorted(row[0] for row in _read_table(root, "wnids.txt", 1))
    index = {wnid: number for number, wnid in enumerate(wnids)}
    if split == "train":
        tables = [(wnid, f"train/{wnid}/{wnid}_boxes.txt") for wnid in wnids]
        listed = [
            (f"train/{wnid}/images/{row[0]}", wnid, *row[1:5])
            for wnid, t in tables
            for row in _read_table(root, t, 5)
        ]
    else:
        listed = [
            (f"val/images/{row[0]}", *row[1:6]) for row in _read_table(root, "val/val_annotations.txt", 6)
        ]
    folders = sorted({row[0].rsplit("/", 1)[0] for row in listed})
    present = {f"{folder}/{name}" for folder in folders for name in find_images(root / folder).files}
    listed = sorted(row for row in listed if row[0] in present)  # subsets often keep the full lists
    if len(listed) < len(present):
        nameless = min(present - {row[0] for row in listed})
        raise DataError(f"{root}: {len(present) - len(listed)} images are not listed, such as {nameless}")
    files, labels, boxes = [], [], []
    for file, wnid, *corners in listed:
        if wnid not in index or not all(corner.isdecimal() for corner in corners):
            raise DataError(f"{root}: the line of {file} is not: class in wnids.txt, 4 whole numbers")
        x0, y0, x1, y1 = (int(corner) for corner in corners)
        files.append(file)
        labels.append(index[wnid])
        # Corners are the first and last pixel. Boxes of one pixel are what is left of objects beyond the cut.
        boxes.append([(x0, y0, x1 + 1, y1 + 1, index[wnid])] if x1 > x0 and y1 > y0 else [])
    names = {row[0]: row[1].split(",")[0] for row in words}
    classes = [f"{wnid} {names[wnid]}" if wnid in names else wnid for wnid in wnids]
    return ImageFiles(name, root, files, labels, classes, PixelBoxes(BoxTable(boxes), (64, 64)))


def open_imagenet(name: str, root: Path, split: str, boxes: Path | None = None) -> ImageFiles:
    """Open ImageNet-1k: class folders in train and val, boxes as XML files (no file: no objects)."""
    half = "train" if split == "train" else "val"
    folders = [root / inner / half for inner in (".", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")]
    base = next((folder for folder in folders if folder.is_dir()), None)
    if base is None:
        raise misfit("imagenet", f"no folder {half} in {root}")
    files, notes = find_images(base)
    nested = "/" in files[0]
    wnids = [file.split("/", 1)[0] for file in files] if nested else _flat_labels(root, base, files)
    classes = sorted(set(wnids))
    index = {wnid: number for number, wnid in enumerate(classes)}
    reader = None
    if boxes is not None:
        inner = [boxes / half, boxes / "Annotations" / "CLS-LOC" / half]
        reader = xml = XmlBoxes(next((folder for folder in inner if folder.is_dir()), boxes))
        _probe(files, xml.folder, lambda file: xml.path(file) is not None)
    source = ImageFiles(name, base, files, [index[wnid] for wnid in wnids], classes, reader)
    source.notes = notes
    return source


def _flat_labels(root: Path, base: Path, files: list[str]) -> list[str]:
    """Classes of images without class folders, from Kaggle's LOC_val_solution.csv (ImageId, classes)."""
    tables = [folder / "LOC_val_solution.csv" for folder in (root, base.parent)]
    table = next((each for each in tables if each.is_file()), None)
    if table is None:
        raise DataError(
            f"imagenet: {base} has no class folders, and {root} no LOC_val_solution.csv to tell classes"
        )
    with table.open(newline="") as file:
        classes = {row[0]: row[1].split(" ", 1)[0] for row in csv.reader(file) if len(row) > 1}
    unknown = [file for file in files if Path(file).stem not in classes]
    if unknown:
        raise DataError(f"{table}: says nothing about {len(unknown)} images of {base}, such as {unknown[0]}")
    return [classes[Path(file).stem] for file in files]


def open_coco(
    name: str, root: Path, annotations: Path | None = None, files: Path | None = None
) -> ImageFiles:
    """Open COCO instances, crowds apart. Classes are numbered from 0 in the order of their ids.

    `files` lists the images that are taken, a name or path a line.
    """
    if annotations is None:
        raise DataError("coco: needs annotations=, as in coco:/images?annotations=/instances.json")
    found = read_instances(annotations, files)
    check_listed(root, found.files)
    source = ImageFiles(name, root, found.files, None, found.classes, found.reader())
    source.image_ids, source.category_ids = found.image_ids, found.category_ids
    source.notes = note_missing_objects(annotations, found.annotated, len(found.files))
    return source


# -- finding and checking ---------------------------------------------------------------------------------


def _probe(files: list[str], folder: Path, has: Callable[[str], bool]) -> None:
    if not any(has(file) for file in files[:: max(len(files) // PROBES, 1)]):
        raise DataError(f"{folder}: no annotation there belongs to any of the images, such as {files[0]}")


def _read_table(root: Path, file: str, columns: int) -> list[list[str]]:
    """Lines of tab-separated fields of a file of Tiny ImageNet."""
    path = root / file
    if not path.is_file():
        raise misfit("tinyimagenet", f"no file {path}")
    rows = [line.split("\t") for line in read_lines(path) if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) < columns:
            raise DataError(f"{path}, line {number}: {len(row)} fields where {columns} are expected")
    return rows
