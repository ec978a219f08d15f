"""Boxes of PASCAL VOC: Annotations/*.xml, of the images that a list of ImageSets/Main names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from foveola.data.annotations import XML_ERRORS, CocoObjects
from foveola.data.coco import check_size
from foveola.data.layouts import ImageFiles
from foveola.data.listing import find_images, misfit, read_lines
from foveola.data.sample import DataError
from foveola.data.segmentation import VOC_WORDS

FLAGS = ("difficult", "truncated")  # of an object
VOC_CLASSES = tuple(VOC_WORDS.split()[1:])


def ignored_flags(text: str) -> tuple[str, ...]:
    """Return the flags that `ignore=` names. Raises ValueError."""
    flags = tuple(text.split(","))
    if not set(flags) <= set(FLAGS) or len(set(flags)) < len(flags):
        raise ValueError(f"{' or '.join(FLAGS)}, or both, as in {','.join(FLAGS)}")
    return flags


def open_voc_objects(name: str, root: Path, split: str, ignore: tuple[str, ...] = ()) -> ImageFiles:
    """Open the boxes of VOC2007, VOC2012, or own data in their layout.

    `split` names a list of images; `test` is `val` where there is no such list, or no annotation of what it
    names. Objects with a flag of `ignore` are crowds, which count as nothing. Boxes on disk give the first
    and the last pixel, counted from 1. Classes are the 20 of VOC, or, where there are others, all names that
    occur, sorted.
    """
    base = _base(root)
    stems = _stems(base, split)
    if stems is None or (split == "test" and not _xml(base, stems[0]).is_file()):
        if split != "test":
            raise misfit("voc-objects", f"no list ImageSets/Main/{split}.txt in {base}")
        stems = _stems(base, "val")
        if stems is None:
            raise misfit("voc-objects", f"neither test.txt nor val.txt in {base / 'ImageSets/Main'}")
    folder = base / "JPEGImages"
    if not folder.is_dir():
        raise misfit("voc-objects", f"no folder JPEGImages in {base}")
    of_stem = {Path(file).stem: file for file in find_images(folder).files}
    if missing := [stem for stem in stems if stem not in of_stem]:
        raise DataError(
            f"{folder}: {len(missing)} of {len(stems)} listed images are missing, such as {missing[0]}"
        )
    read = [_read(_xml(base, stem), ignore) for stem in stems]
    names = {each["name"] for _, objects in read for each in objects}
    classes = VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))
    numbers = {word: number for number, word in enumerate(classes)}
    annotations = [[each | {"category_id": numbers[each["name"]]} for each in objects] for _, objects in read]
    sizes = np.array([size for size, _ in read], np.int64)
    try:
        reader = CocoObjects(sizes, annotations, {number: number for number in numbers.values()})
    except DataError as error:
        raise DataError(f"{base / 'Annotations'}: {error}") from error
    return ImageFiles(name, folder, [of_stem[stem] for stem in stems], None, classes, reader)


def _base(root: Path) -> Path:
    """The folder that holds Annotations: it, or one folder VOC2007 or the like in it or in its VOCdevkit."""
    if (root / "Annotations").is_dir():
        return root
    inner = [*root.glob("VOC[0-9]*"), *root.glob("VOCdevkit/VOC[0-9]*")]
    found = sorted(folder for folder in inner if (folder / "Annotations").is_dir())
    if len(found) > 1:
        raise DataError(
            f"voc-objects: {root} holds several: {', '.join(f.name for f in found)}; give one, as in "
            f"voc-objects:{found[0]}"
        )
    if not found:
        raise misfit("voc-objects", f"no folder Annotations in {root}")
    return found[0]


def _stems(base: Path, split: str) -> list[str] | None:
    """Names in a list, sorted, each once; None where there is no such list."""
    path = base / "ImageSets/Main" / f"{split}.txt"
    if not path.is_file():
        return None
    stems = sorted({line.split()[0] for line in read_lines(path) if line.strip()})
    if not stems:
        raise DataError(f"{path}: names no image")
    return stems


def _xml(base: Path, stem: str) -> Path:
    return base / "Annotations" / f"{stem}.xml"


def _read(path: Path, ignore: Sequence[str]) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """The width and height that a file states, and its objects as COCO has them, with names of classes."""
    if not path.is_file():
        raise DataError(f"no annotation {path}")
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(float(_text(root, f"size/{side}"))) for side in ("width", "height"))
        found = []
        for each in root.iterfind("object"):
            x0, y0, x1, y1 = (
                float(_text(each, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
            crowd = any(each.findtext(flag, "0").strip() == "1" for flag in ignore)
            found.append({"bbox": box, "name": _text(each, "name").strip(), "iscrowd": int(crowd)})
        check_size({"id": path.name, "width": width, "height": height})
    except XML_ERRORS as error:
        raise DataError(f"{path} is no annotation of VOC: {error}") from error
    return (width, height), [each | {"id": k, "image_id": path.stem} for k, each in enumerate(found)]


def _text(element: ElementTree.Element, path: str) -> str:
    found = element.findtext(path)
    if found is None:
        raise ValueError(f"{element.tag} without {path}")
    return found
