"""Own boxes in tables: CSV with one of the usual headers or without, and JSON."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from foveola.data.annotations import read_json
from foveola.data.listing import read_lines
from foveola.data.sample import DataError

NAME_COLUMNS = (
    "name",
    "filename",
    "file_name",
    "file",
    "image",
    "image_name",
    "image_path",
    "path",
    "filepath",
)
LABEL_COLUMNS = ("label", "class", "category", "class_name", "category_name", "label_name")
CORNERS = (
    *(("x0", "y0", "x1", "y1"), ("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max")),
    *(("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom")),
)
STARTS = (("x", "y"), ("xmin", "ymin"), ("x_min", "y_min"), ("left", "top"), ("bbox_x", "bbox_y"))
SIZE_COLUMNS = (("w", "h"), ("width", "height"), ("bbox_w", "bbox_h"), ("bbox_width", "bbox_height"))
LabelledBox = tuple[float, float, float, float, str]
WITHOUT = "name, x0, y0, x1, y1 and perhaps a label"


def read_boxes(path: Path) -> dict[str, list[LabelledBox]]:
    """Read own boxes in pixels by image name, from CSV or JSON. Raises DataError with what is wrong, and
    where.

    CSV: with a header, its names say what the columns are (corners, or a corner with width and height), and
    columns of other names are left out; without one, lines are `name,x0,y0,x1,y1[,label]`. JSON:
    {"name": [[x0, y0, x1, y1], ...]} with the label as fifth. x1 and y1 are where the box ends: over the
    whole of a 640x480 image it is 0,0,640,480.
    """
    if not path.is_file():
        raise DataError(f"no file of boxes {path}")
    found: dict[str, list[LabelledBox]] = {}
    highest = 0.0
    for where, name, fields, sized in _json_boxes(path) if path.suffix == ".json" else _csv_boxes(path):
        try:
            x0, y0, x1, y1 = (float(value) for value in fields[:4])
        except (OverflowError, TypeError, ValueError):
            raise DataError(f"{where}: a box is x0, y0, x1, y1 and perhaps a label, not {fields}") from None
        box = (x0, y0, x0 + x1, y0 + y1) if sized else (x0, y0, x1, y1)
        _check(box, where, sized)
        highest = max(highest, *box[2:])
        found.setdefault(name, []).append((*box, str(fields[4]) if len(fields) > 4 else ""))
    if not found:
        raise DataError(f"{path}: holds no box")
    if highest <= 1:
        raise DataError(f"{path}: boxes are in pixels, but none here reaches beyond 1")
    return found


def _check(box: tuple[float, float, float, float], where: str, sized: bool) -> None:
    x0, y0, x1, y1 = box
    text = f"{where}: box {x0:g}, {y0:g}, {x1:g}, {y1:g}"
    if not sized and (x1 < x0 or y1 < y0):
        raise DataError(
            f"{text} ends before it begins: are these x, y, width, height? A CSV file says so in a header "
            "name,x,y,w,h"
        )
    if not (max(x0, 0) < x1 < float("inf") and max(y0, 0) < y1 < float("inf")):
        raise DataError(f"{text} has no area inside the image")


def _csv_boxes(path: Path) -> Iterator[tuple[str, str, Sequence[Any], bool]]:
    """Where a box stands, its image, its four numbers and label, and whether these are width and height."""
    columns, sized, started = None, False, False
    for number, line in enumerate(csv.reader(f"{line}\n" for line in read_lines(path)), start=1):
        fields = [field.strip() for field in line]
        if not any(fields):
            continue
        where = f"{path}, line {number}"
        _check_separator(fields, where)
        if not started and not any(_is_number(field) for field in fields):
            columns, sized = _understand(fields, where)
        elif columns is not None:
            if len(fields) <= max(columns):
                raise DataError(f"{where}: {len(fields)} fields, fewer than the header names")
            name, *values = (fields[column] for column in columns)
            yield where, name, values, sized
        else:
            if len(fields) > 6:
                raise DataError(f"{where}: {len(fields)} fields without a header; a line is {WITHOUT}")
            yield where, fields[0], fields[1:], False
        started = True


def _check_separator(fields: list[str], where: str) -> None:
    if len(fields) == 1 and any(mark in fields[0] for mark in ";\t"):
        mark = "semicolons" if ";" in fields[0] else "tabs"
        raise DataError(f"{where}: fields are separated by {mark}; write commas")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _understand(header: list[str], where: str) -> tuple[list[int], bool]:
    """Columns of name, four numbers and label, if any; whether the last two are width and height."""
    names = [name.lower().replace(" ", "_") for name in header]
    if len(set(names)) < len(names):
        raise DataError(f"{where}: the header names a column twice")
    image = [name for name in NAME_COLUMNS if name in names]
    corners = [four for four in CORNERS if set(four) <= set(names)]
    sizes = [(*a, *b) for a, b in product(STARTS, SIZE_COLUMNS) if {*a, *b} <= set(names)]
    numbers = (corners or sizes)[:1]
    if not image or not numbers:
        raise DataError(
            f"{where}: header {','.join(header)} is not understood; name the columns name,x0,y0,x1,y1,label "
            "or name,x,y,w,h,label"
        )
    label = [name for name in LABEL_COLUMNS if name in names][:1]
    return [names.index(name) for name in (image[0], *numbers[0], *label)], not corners


def _json_boxes(path: Path) -> Iterable[tuple[str, str, Sequence[Any], bool]]:
    tree = read_json(path)
    if not isinstance(tree, dict) or not all(isinstance(boxes, list) for boxes in tree.values()):
        raise DataError(f'{path}: must be {{"image name": [[x0, y0, x1, y1], ...], ...}}')
    for name, boxes in tree.items():
        for box in boxes:
            yield f"{path}, {name}", name, box if isinstance(box, list) else [box], False
