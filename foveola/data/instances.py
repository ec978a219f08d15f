"""A file of COCO's instances: which images it names, what is annotated in each, and what its classes are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from foveola.data.annotations import CocoObjects, read_json
from foveola.data.coco import check_size, listed_part
from foveola.data.listing import check_inside
from foveola.data.sample import DataError

AGNOSTIC = ("object",)  # the classes of a file that tells no classes apart


@dataclass(frozen=True, eq=False)
class InstancesFile:
    """What such a file says. Images are in the order of their ids, and classes too; both are arrays or
    tuples in that order.

    `annotations` are those of each image, with `labels` from category ids to labels from 0.
    """

    path: Path
    files: list[str]
    sizes: Int64[np.ndarray, "N 2"]  # width, height
    annotations: list[list[dict[str, Any]]]
    labels: dict[int, int]
    classes: tuple[str, ...]
    image_ids: np.ndarray
    category_ids: np.ndarray

    @property
    def annotated(self) -> int:
        """The number of images with an object."""
        return sum(any(not each.get("iscrowd") for each in of_image) for of_image in self.annotations)

    def reader(self, labels: dict[int, int] | None = None) -> CocoObjects:
        """Return what finds the objects of an image by its row; `labels` in place of the file's own.

        Raises DataError for annotations that no such image can have.
        """
        try:
            return CocoObjects(self.sizes, self.annotations, self.labels if labels is None else labels)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(_misfit(self.path, error)) from error
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from error


def read_instances(path: Path, chosen: Path | None = None) -> InstancesFile:
    """Read a file of COCO's instances, from whatever program. Raises DataError, in one line, for any other.

    `chosen` lists the images that are taken, a name or path a line. Names of images that lead out of their
    folder are refused.
    """
    tree = read_json(path)
    for part in ("images", "annotations", "categories"):
        if not isinstance(tree, dict) or not isinstance(tree.get(part), list):
            raise DataError(f"{path}: has no list {part!r}; is it an instances file of COCO?")
    if not tree["images"]:
        raise DataError(f"{path}: lists no images")
    try:
        if chosen is not None:
            tree |= listed_part(tree, chosen)
        images = sorted(tree["images"], key=lambda image: image["id"])
        row_of = {image["id"]: row for row, image in enumerate(images)}
        categories = sorted(tree["categories"], key=lambda category: category["id"])
        per_image: list[list[dict]] = [[] for _ in images]
        for annotation in tree["annotations"]:
            per_image[row_of[annotation["image_id"]]].append(annotation)
        for image in images:
            check_size(image)
        found = InstancesFile(
            path,
            [image["file_name"] for image in images],
            np.array([[image["width"], image["height"]] for image in images], np.int64),
            per_image,
            {category["id"]: label for label, category in enumerate(categories)},
            tuple(category["name"] for category in categories),
            np.array([image["id"] for image in images]),
            np.array([category["id"] for category in categories]),
        )
        check_inside(path, found.files)
    except DataError as error:
        raise DataError(f"{path}: {error}".replace(f"{path}: {path}", str(path))) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(_misfit(path, error)) from error
    return found


def note_missing_objects(where: Path, annotated: int, images: int) -> tuple[str, ...]:
    """Return a note where most images have no object; each of them then counts as one."""
    if 2 * annotated >= images:
        return ()
    return (f"{where}: objects in {annotated:,} of {images:,} images; each of the others counts as one",)


def _misfit(path: Path, error: Exception) -> str:
    return f"{path}: not as COCO instances are: {type(error).__name__} {error}"
