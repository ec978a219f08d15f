"""What the JSON of a sample says: its name, its classes and its objects. docs/shards.md has the schema."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from foveola.data.annotations import CocoObjects, Marked, mask_objects
from foveola.data.coco import rle_of
from foveola.data.fit import turn_of
from foveola.data.formats import Header
from foveola.data.listing import printable
from foveola.data.sample import BadImage, DataError, Objects, Sample

Label = int | str
_LARGEST = 2**31 - 1  # number of a class
_UNSAID = object()  # an object has the class of its image, then; null says that it has none


def parse_sample(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON of a sample; of another kind of JSON nothing. Raises DataError for what is none."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {str(error).splitlines()[0]}") from None
    return tree if isinstance(tree, dict) else {}


def label_of(value: Any, where: str) -> Label | None:
    """Return a class, a number from 0 on or text; None for null. Raises DataError for anything else."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST):
        return value
    if isinstance(value, str) and value.strip():
        return printable(value.strip())
    raise DataError(f"{where}: a label is a whole number from 0 on, or text, not {str(value)[:40]!r}")


def written_label(data: bytes, where: str) -> Label | None:
    """Return the class that a member such as `.cls` says; None for -1. Raises DataError for no text."""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(f"{where} is no text in UTF-8") from None
    if text == "-1":
        return None
    return label_of(int(text) if text.isdecimal() and text.isascii() and len(text) < 12 else text, where)


def listed_labels(value: Any, where: str) -> list[Label]:
    """Return the classes of an image that may have several. Raises DataError for what is no list of them."""
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: labels is a list, not {str(value)[:40]!r}")
    found = [label_of(each, where) for each in value]
    if None in found:
        raise DataError(f"{where}: labels holds null")
    return found  # type: ignore[return-value]


def objects_in(tree: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the objects that a sample lists. Raises DataError for what is no list of them."""
    found = tree.get("objects")
    if isinstance(found, dict):  # as `datasets` gives a sequence of structs
        lists = {name: list(each) for name, each in found.items() if each is not None}
        if len({len(each) for each in lists.values()}) > 1:
            raise DataError(f"{where}: the lists in objects are of different lengths")
        count = len(next(iter(lists.values()), []))
        found = [{name: each[row] for name, each in lists.items()} for row in range(count)]
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise DataError(f"{where}: objects is a list of objects; objects=- leaves it out")
    return found


def read_objects(
    tree: dict[str, Any],
    image: tuple[Header, bool],
    label: int,
    number: Callable[[Label], int],
    where: str,
) -> Marked:
    """Return the objects and crowds that a sample lists, with class numbers; `image` is the header, and
    whether annotations are of pixels as stored.

    Raises BadImage for what cannot be of such an image: it counts as unreadable.
    """
    listed = objects_in(tree, where)
    header, raw = image
    width, height = stated_size(tree, listed) or header.upright
    try:
        orientation = turn_of((width, height), header, raw, where)
        annotations = [_as_coco(each, number, (width, height), label, where) for each in listed]
        boxes = [each.pop("box") for each in annotations]
        kinds = CocoObjects(np.array([[width, height]], np.int64), [annotations], _Same())  # type: ignore
        both = []
        for crowd, regions in enumerate((kinds.objects, kinds.crowds)):
            found = regions.of(0, orientation)
            own = [b for b, a in zip(boxes, annotations, strict=True) if bool(a["iscrowd"]) == bool(crowd)]
            both.append(_exact(found, own, [a for a in annotations if bool(a["iscrowd"]) == bool(crowd)]))
        return Marked(b"", *both)
    except BadImage:
        raise
    except (DataError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadImage(f"{where}: its objects are not as docs/shards.md says: {error}") from error


class _Same(dict):
    """Labels are numbered already."""

    def __missing__(self, label: int) -> int:
        return label


def stated_size(tree: dict[str, Any], listed: list[dict[str, Any]]) -> tuple[int, int] | None:
    """Return the width and height of the image on which objects were drawn, if the sample says them."""
    sides = tree.get("width"), tree.get("height")
    if all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        return sides  # type: ignore[return-value]
    for each in listed:
        mask = each.get("segmentation")
        if isinstance(mask, dict) and len(mask.get("size", ())) == 2:
            return int(mask["size"][1]), int(mask["size"][0])
    return None


def _as_coco(
    each: dict[str, Any], number: Callable[[Label], int], size: tuple[int, int], label: int, where: str
) -> dict[str, Any]:
    """An object as an annotation of COCO: pixels, with the box in units of the image kept beside it."""
    width, height = size
    said = each.get("label", each.get("category", _UNSAID))
    if said is _UNSAID and "category_id" in each:
        raise ValueError("an object has category_id, which means nothing here: write label")
    found = None if said is _UNSAID else label_of(said, where)
    if said is not _UNSAID:
        label = -1 if found is None else number(found)
    box = each.get("box")
    if (box is None) == (each.get("bbox") is None):
        raise ValueError(
            "an object has box (x0, y0, x1, y1 in the unit square) or bbox (x, y, w, h in pixels)"
        )
    if box is None:
        bbox = [*each["bbox"]]
    else:
        x0, y0, x1, y1 = (float(side) for side in box)
        if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
            raise ValueError(f"box {box} is not x0, y0, x1, y1 in the unit square")
        bbox = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
    found = {
        "bbox": bbox,
        "box": box,
        "category_id": label,
        "iscrowd": 1 if each.get("iscrowd") else 0,
        "segmentation": each.get("segmentation"),
    }
    found |= {name: each[name] for name in ("area", "score") if each.get(name) is not None}
    return found


def _exact(found: Objects | None, boxes: list[Any], annotations: list[dict]) -> Objects | None:
    """Return objects with boxes, and the areas that follow from them, exactly as they were written in the
    unit square.
    """
    if found is None or any(box is None for box in boxes) or len(found) != len(boxes):
        return found
    unit = np.array(boxes, np.float32).reshape(-1, 4)
    if not np.allclose(unit, found.boxes, atol=1e-5):  # turned
        return found
    areas = found.areas.copy()
    own = (unit[:, 2:] - unit[:, :2]).prod(1)
    plain = np.array(["area" not in each for each in annotations])
    areas[plain] = own[plain]
    return Objects(unit, areas, found.labels, found.masks, found.scores)


# -- writing ------------------------------------------------------------------------------------------------


def described(sample: Sample, size: tuple[int, int], name: str | None) -> dict[str, Any]:
    """Return the JSON of a sample whose image is of `size` (width, height): what `read_objects` and the index
    read back as it was. Empty where there is nothing to say; `name` where it does not follow from the key.
    """
    tree: dict[str, Any] = {} if name is None else {"name": name}
    if sample.labels is not None:
        tree["labels"] = [int(label) for label in sample.labels]
    listed = [
        _described(each, row, crowd, size)
        for crowd, each in ((0, sample.objects), (1, sample.crowds))
        if each is not None
        for row in range(len(each))
    ]
    if listed:
        tree |= {"width": size[0], "height": size[1], "objects": listed}
    return tree


def _described(objects: Objects, row: int, crowd: int, size: tuple[int, int]) -> dict[str, Any]:
    box = objects.boxes[row]
    found: dict[str, Any] = {"box": [float(str(side)) for side in box]}
    known = objects.labels is not None and objects.labels[row] >= 0
    found["label"] = int(objects.labels[row]) if known else None  # type: ignore[index]
    mask = None if objects.masks is None else objects.masks[row]
    if mask is not None:
        found["segmentation"] = _written_mask(mask)
    if objects.areas[row] != (box[2:] - box[:2]).prod():
        found["area"] = float(objects.areas[row]) * (size[0] * size[1])
    if objects.scores is not None:
        found["score"] = float(str(objects.scores[row]))
    return found | ({"iscrowd": 1} if crowd else {})


def _written_mask(mask: Any) -> Any:
    if isinstance(mask, np.ndarray):
        return rle_of(mask)
    if "polygons" in mask:
        return mask["polygons"]
    counts = mask["counts"]
    return {"size": [int(side) for side in mask["size"]],
            "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}  # fmt: skip


def mapped_objects(values: np.ndarray, ignore: int | None, label: int) -> Objects | None:
    """Return the objects of a map whose values tell them apart; 0 and `ignore` are none."""
    found = [value for value in np.unique(values) if value not in (0, ignore)]
    if not found:
        return None
    return mask_objects([values == value for value in found], np.full(len(found), label))
