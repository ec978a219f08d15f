"""The file of what was found: COCO's JSON with masks as RLE, scores, and where all of it comes from."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import foveola
from foveola import files
from foveola.config import UserError
from foveola.data.coco import rle_of
from foveola.data.instances import AGNOSTIC
from foveola.proposals.filter import areas_of
from foveola.proposals.journal import ImageRecord
from foveola.proposals.proposal import Proposals

PIXELS, SCORE = 3, 6  # digits of boxes and scores after the point
OBJECTS = "objects.json"


@dataclass
class Summary:
    """What a file holds, in numbers: of each image that could be read how many objects, of each of these the
    fraction of its image and the score; of the others the names and why.
    """

    counts: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def add(self, record: ImageRecord) -> None:
        """Count an image."""
        if "unreadable" in record:
            self.unreadable.append((record["file_name"], record["unreadable"]))
            return
        pixels = record["width"] * record["height"]
        self.counts.append(len(record["found"]))
        self.areas += [each["area"] / pixels for each in record["found"]]
        self.scores += [each["score"] for each in record["found"]]

    def plain(self) -> dict[str, Any]:
        """Return what a file says of itself."""
        return {
            "images": len(self.counts),
            "objects": sum(self.counts),
            "images_without_objects": self.counts.count(0),
            "unreadable": [f"{name}: {reason}" for name, reason in self.unreadable],
        }


def record_of(index: int, name: str, size: tuple[int, int], found: Proposals) -> ImageRecord:
    """Return the record of an image of `size` (rows, columns): what its annotations hold but for ids.

    Boxes are x, y, width, height in pixels; the area is that of the mask, or of the box where there is none.
    """
    areas = areas_of(found)
    objects = []
    for k, (x0, y0, x1, y1) in enumerate(found.boxes.astype(np.float64).tolist()):
        box = [round(side, PIXELS) for side in (x0, y0, x1 - x0, y1 - y0)]
        one = {
            "category_id": int(found.labels[k]) + 1,
            "bbox": box,
            "area": round(float(areas[k]), PIXELS),
            "iscrowd": 0,
            "score": round(float(found.scores[k]), SCORE),
        }
        if found.masks is not None:
            one["segmentation"] = rle_of(found.masks[k])
        objects.append(one)
    height, width = size
    return {"index": index, "file_name": name, "width": width, "height": height, "found": objects}


def write_objects(
    path: Path,
    about: dict[str, Any],
    classes: tuple[str, ...],
    records: Callable[[], Iterator[ImageRecord]],
) -> Summary:
    """Write the records of images, which are gone through several times, as one file; returns its summary.

    `about` are plain values that tell the work from other work. The same records give the same bytes. Ids of
    images are their indices in the data + 1, those of categories their labels + 1. A last class "object",
    behind others, is left out where it has no object.
    """
    summary, used = Summary(), set()
    for record in records():
        summary.add(record)
        used |= {each["category_id"] for each in record.get("found", ())}
    if len(classes) > 1 and classes[-1:] == AGNOSTIC and len(classes) not in used:
        classes = classes[:-1]
    info = {
        "description": "objects that foveola found; score: how sure it was",
        "version": foveola.__version__,
        **summary.plain(),
        "work": about,
    }
    categories = [{"id": k + 1, "name": name, "supercategory": ""} for k, name in enumerate(classes)]
    with files.whole(path) as part, part.open("w", encoding="utf-8") as file:
        file.write('{"info": ' + _line(info) + ',\n"licenses": [],\n"categories": ' + _line(categories))
        for name, rows in (("images", _images(records())), ("annotations", _annotations(records()))):
            file.write(f',\n"{name}": [')
            for number, row in enumerate(rows):
                file.write((",\n" if number else "\n") + _line(row))
            file.write("\n]")
        file.write("}\n")
    return summary


def read_about(path: Path) -> dict[str, Any] | None:
    """Return what tells the work of a file that `write_objects` wrote; None for any other file."""
    try:
        with path.open(encoding="utf-8") as file:
            info = json.loads(file.readline().removeprefix('{"info": ').rstrip().removesuffix(","))
        work = info["work"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return work if isinstance(work, dict) else None


def read_summary(path: Path) -> Summary:
    """Return the summary of a file that `write_objects` wrote. Raises UserError for one that is damaged."""
    try:
        tree = json.loads(path.read_bytes())
        pixels = {image["id"]: image["width"] * image["height"] for image in tree["images"]}
        counts = dict.fromkeys(pixels, 0)
        for each in tree["annotations"]:
            counts[each["image_id"]] += 1
        areas = [each["area"] / pixels[each["image_id"]] for each in tree["annotations"]]
        scores = [each["score"] for each in tree["annotations"]]
        unreadable = [tuple(text.split(": ", 1)) for text in tree["info"]["unreadable"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): give another out=, or remove it"
        ) from error
    return Summary(list(counts.values()), areas, scores, unreadable)


def _images(records: Iterator[ImageRecord]) -> Iterator[dict[str, Any]]:
    for record in records:
        if "unreadable" not in record:
            sides = {name: record[name] for name in ("file_name", "width", "height")}
            yield {"id": record["index"] + 1} | sides


def _annotations(records: Iterator[ImageRecord]) -> Iterator[dict[str, Any]]:
    number = 0
    for record in records:
        for each in record.get("found", ()):
            number += 1
            yield {"id": number, "image_id": record["index"] + 1} | each


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
