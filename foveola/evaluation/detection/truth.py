"""Images with their annotated objects, as COCO writes them down, made of any source."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from foveola.config import UserError
from foveola.data.coco import counts_text, rle_of
from foveola.data.sample import Objects, Sample, full_mask
from foveola.data.sources import Source, decode

PIXELS = (
    3  # digits of boxes after the point: boxes of COCO have 2, and float32 fractions of images give them back
)
AREA = 2


class Annotated(NamedTuple):
    """Some images with their objects as annotations, whose `image_id` is the index in the source."""

    indices: Int64[Tensor, "b"]
    images: tuple[Shaped[np.ndarray, "H W ch"], ...]
    annotations: tuple[list[dict[str, Any]], ...]


class AnnotatedCut:
    """Makes an `Annotated` of an image; with `masks` the masks of its objects, too.

    Without `classes` every object is of the first and only category, also one without a class.
    """

    def __init__(self, masks: bool, classes: bool = True) -> None:
        self.masks, self.classes = masks, classes

    def __call__(self, sample: Sample, index: int) -> Annotated:
        """Return one image. Raises BadImage."""
        image = decode(sample.image)
        found = all_annotations(sample, index, image.shape[:2], self.masks, self.classes)
        return Annotated(torch.tensor([index]), (image,), (found,))


def all_annotations(
    sample: Sample, image: int, size: tuple[int, int], masks: bool, classes: bool
) -> list[dict[str, Any]]:
    """Return objects and crowds of a sample as `annotations_of` gives them."""
    found = annotations_of(sample.objects, image, size, masks, crowd=False, classes=classes)
    return found + annotations_of(sample.crowds, image, size, masks, crowd=True, classes=classes)


def annotations_of(
    objects: Objects | None,
    image: int,
    size: tuple[int, int],
    masks: bool,
    crowd: bool,
    classes: bool = True,
) -> list[dict[str, Any]]:
    """Return objects as COCO annotations of an image of `size` (rows, columns).

    Categories are labels + 1, and objects without a class are left out; without `classes` all are of
    category 1. The mask of an object without one is its box.
    """
    if objects is None or (classes and objects.labels is None):
        return []
    height, width = size
    labels = np.zeros(len(objects), np.int64) if objects.labels is None or not classes else objects.labels
    found = []
    for k, label in enumerate(labels.tolist()):
        if label < 0:
            continue
        x0, y0, x1, y1 = (objects.boxes[k].astype(np.float64) * (width, height, width, height)).tolist()
        box = [round(float(side), PIXELS) for side in (x0, y0, x1 - x0, y1 - y0)]
        annotation = {
            "image_id": image,
            "category_id": label + 1,
            "bbox": box,
            "area": round(float(objects.areas[k]) * height * width, AREA),
            "iscrowd": int(crowd),
        }
        if masks:
            annotation["segmentation"] = _mask_of(objects, k, size)
        found.append(annotation)
    return found


def _mask_of(objects: Objects, index: int, size: tuple[int, int]) -> dict[str, Any]:
    mask = None if objects.masks is None else objects.masks[index]
    if isinstance(mask, dict) and isinstance(mask.get("counts"), bytes | str) and tuple(mask["size"]) == size:
        return {"size": list(size), "counts": counts_text(mask["counts"])}
    if mask is not None:
        return rle_of(_of_size(full_mask(mask), size))
    height, width = size
    x0, y0, x1, y1 = np.rint(objects.boxes[index] * np.array([width, height, width, height])).astype(int)
    whole = np.zeros(size, bool)
    whole[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
    return rle_of(whole)


def _of_size(mask: Bool[np.ndarray, "H W"], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """A mask at the size of its image, which may be another one: a cell has the value under its centre.

    pycocotools finds no overlap between masks of two sizes, without a word.
    """
    if mask.shape == size:
        return mask
    y, x = ((2 * np.arange(n) + 1) * side // (2 * n) for n, side in zip(size, mask.shape, strict=True))
    return mask[y[:, None], x]


def data_set(
    images: dict[int, tuple[int, int]], annotations: list[dict[str, Any]], classes: tuple[str, ...]
) -> dict[str, Any]:
    """Return a data set in COCO's format: (rows, columns) of images by their id, and annotations."""
    return {
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in images.items()],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(classes)],
        "annotations": [annotation | {"id": k + 1} for k, annotation in enumerate(annotations)],
    }


def met_by_name(found: tuple[str, ...], source: Source) -> dict[int, int]:
    """Return the test data's index of each class of a head that they have, too.

    Raises UserError where there is none.
    """
    there = {name: k for k, name in reversed(list(enumerate(source.classes or ())))}
    shared = {k: there[name] for k, name in enumerate(found) if name in there}
    if not shared:
        raise UserError(
            f"test: {source.name} has none of the classes of this head ({', '.join(found[:3])}, ...)"
        )
    return shared
