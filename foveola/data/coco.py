"""COCO annotations: held against what they may be before pycocotools, which trusts them, reads them; and RLE.

Counts that do not add up to the image, or a polygon that reaches to 1e9, make it hang or crash the process.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from foveola.data.guard import MAX_PIXELS
from foveola.data.listing import read_lines
from foveola.data.sample import DataError

RLE_DIGITS = 6  # characters of a number in compressed RLE: 30 bits


def listed_part(tree: dict, path: Path) -> dict:
    """Return the images that a text file names, a name or path a line, and their annotations.

    A file name alone is enough, as is a path with more folders than the annotations have (lists such as that
    of COCO20k). Raises DataError for names of no image, or of several.
    """
    lines = [line.strip() for line in read_lines(path)]
    known: dict[str, list[dict]] = {}
    for image in tree["images"]:
        for name in {image["file_name"], image["file_name"].rsplit("/", 1)[-1]}:
            known.setdefault(name, []).append(image)
    chosen, missing = {}, []
    for line in filter(None, lines):
        found = known.get(line) or known.get(line.rsplit("/", 1)[-1], [])
        if len(found) > 1:
            raise DataError(f"{path}: {line} is the name of {len(found)} images: give paths")
        missing += [] if found else [line]
        chosen |= {image["id"]: image for image in found}
    if missing or not chosen:
        such = (
            f": {len(missing)} of its names are of no annotated image, such as {missing[0]}"
            if missing
            else ""
        )
        raise DataError(f"{path}{such or ': names no image'}")
    annotations = [each for each in tree["annotations"] if each["image_id"] in chosen]
    return {"images": list(chosen.values()), "annotations": annotations}


def check_size(image: dict) -> None:
    """Raise DataError unless the image states a width and height that it may have."""
    sides = [image["width"], image["height"]]
    if not all(isinstance(side, int) and side > 0 for side in sides) or math.prod(sides) > MAX_PIXELS:
        raise DataError(f"image {image['id']}: width and height are {sides[0]} and {sides[1]}")


def check_annotation(annotation: dict, width: int, height: int) -> None:
    """Raise DataError, naming the annotation, for a box, area, mask or score that cannot be of such an
    image.
    """
    name = f"annotation {annotation.get('id', 'without id')} of image {annotation.get('image_id')}"
    box, area = annotation["bbox"], annotation.get("area", 0)
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and min(box[2:]) >= 0):
        raise DataError(f"{name}: bbox {box} is not x, y, width, height")
    x, y, w, h = box
    if w > 0 and h > 0 and not (-w < x < width and -h < y < height):
        raise DataError(f"{name}: bbox {box} lies outside its {width}x{height} pixels")
    if not _is_finite(area) or area < 0:
        raise DataError(f"{name}: area {area}")
    if not _is_finite(annotation.get("score", 0)):
        raise DataError(f"{name}: score {annotation['score']}")
    mask = annotation.get("segmentation")
    try:
        if isinstance(mask, dict):
            _check_rle(mask, width, height)
        elif isinstance(mask, list):
            for ring in mask:
                _check_ring(ring, width, height)
        elif mask is not None:
            raise ValueError("neither polygons nor RLE")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: segmentation: {error}") from error


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # JSON's integers have no end


def _check_ring(ring: Any, width: int, height: int) -> None:
    points = np.array(ring)
    if points.ndim != 1 or points.dtype.kind not in "iuf" or len(points) % 2:
        raise ValueError("a polygon is a list of x, y, x, y, ...")
    for values, side in ((points[::2], width), (points[1::2], height)):
        if len(values) and not (-side <= values.min() and values.max() <= 2 * side):  # NaN is neither
            raise ValueError(f"a polygon reaches from {values.min():g} to {values.max():g} of {side} pixels")


def _check_rle(mask: dict, width: int, height: int) -> None:
    if "size" in mask and list(mask["size"]) != [height, width]:
        raise ValueError(f"RLE of size {mask['size']} in an image of height {height} and width {width}")
    counts = mask["counts"]
    if isinstance(counts, list):
        found = np.array(counts)
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise ValueError("counts of RLE are whole numbers")
    else:
        found = rle_counts(counts.encode() if isinstance(counts, str) else counts)
    if found.min(initial=0) < 0 or found.sum() != width * height:
        raise ValueError(f"counts of RLE do not add up to the {width * height} pixels of the image")


def rle_counts(text: bytes) -> Int64[np.ndarray, "n"]:
    """Return the counts of compressed RLE. Raises ValueError.

    5 bits a character from "0" on, the lowest first, and a sixth for "more follows"; numbers have a sign, and
    from the fourth on they are the difference to the last but one.
    """
    bits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = bits & 32 == 0
    if not len(bits) or bits.min() < 0 or bits.max() > 63 or not last[-1]:
        raise ValueError("compressed RLE is damaged")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > RLE_DIGITS:
        raise ValueError("compressed RLE holds a number beyond 30 bits")
    digits = np.arange(len(bits)) - np.repeat(starts, lengths)
    counts = np.add.reduceat((bits & 31) << (5 * digits), starts)
    counts -= np.where(bits[ends] & 16, 1 << (5 * lengths), 0)
    counts[1::2], counts[2::2] = counts[1::2].cumsum(), counts[2::2].cumsum()
    return counts


def rle_of(mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
    """Return a mask as compressed RLE whose counts are text, as files of results hold it."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": counts_text(rle["counts"])}


def counts_text(counts: bytes | str) -> str:
    """Return the counts of compressed RLE as text."""
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
