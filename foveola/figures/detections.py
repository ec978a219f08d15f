"""What detectors find in images, beside what is annotated; the images in which they are best and worst."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from foveola.config import key
from foveola.data.sample import Sample, full_mask
from foveola.data.shown import rgb_of, shown_channels
from foveola.data.sources import Source
from foveola.data.values import ImagePixels
from foveola.drawing.boxes import DrawnObjects, paint_objects
from foveola.drawing.sheet import Sheet
from foveola.evaluation.detection.detect import detector_of
from foveola.figures.choice import image_numbers, samples_of
from foveola.figures.settings import SheetConfig
from foveola.figures.tiles import Tile, head_of, images_of, row_of
from foveola.models.encoder import Encoder
from foveola.tasks.drawn import drawn_detections

AGREES = 0.5  # IoU from which a detection is that object


@dataclass(frozen=True)
class DetectionsConfig(SheetConfig):
    """Keys that say which images are drawn, and which detections of them."""

    cell: int = key(280, "pixels a side of a tile in the sheet", at_least=32)
    count: int = key(8, "how many images to show", at_least=1)
    images: tuple[int, ...] | int | str | None = key(
        None, "indices of the images in the data instead, as in '0,5,9'"
    )
    score: float = key(0.5, "detections of lower scores are not shown", at_least=0, at_most=1)
    order: Literal["even", "worst", "best"] = key(
        "even", "evenly over the data, or those of `among` images in which the first model is worst or best"
    )
    among: int = key(100, "order=worst, best: images that are looked at, evenly over the data", at_least=1)

    def __post_init__(self) -> None:
        if self.images is not None and self.order != "even":
            raise ValueError(f"order={self.order} chooses images: leave out images=")


def detections_sheet(encoders: dict[str, Encoder], source: Source, config: DetectionsConfig) -> Sheet:
    """Return images with their annotated objects, and with what each detector finds.

    Raises UserError for an encoder without a detector.
    """
    for encoder in encoders.values():
        detector_of(encoder)
    if config.order == "even":
        chosen = image_numbers(source, config.count, config.images)
    else:
        chosen = _ordered(next(iter(encoders.values())), source, config)
    rows = []
    for number, sample in zip(chosen, samples_of(source, chosen), strict=True):
        (image,) = images_of([sample])
        truth, shown = annotated(sample, image, source), rgb_of(image, shown_channels(source))
        tiles: list[Tile] = [(paint_objects(shown, truth), f"{len(truth.boxes)} annotated")]
        for encoder in encoders.values():
            found = detected(encoder, image, config.score)
            tiles.append((paint_objects(shown, found), f"agreement {agreement(found, truth):.0%}"))
        rows.append(row_of(tiles, f"{number}: {sample.name}"))
    note = (
        f"Detections of a score of {config.score:g} and more. Agreement: 2 R / (F + A), of R that are right "
        f"(class, and IoU of {AGREES:g} or more), F found and A annotated."
    )
    return Sheet("Detections", ["annotated", *(head_of(name, "found") for name in encoders)], rows, note)


def annotated(sample: Sample, image: ImagePixels, source: Source) -> DrawnObjects:
    """Return the objects of a sample that have a class, in pixels of the image."""
    objects, (height, width) = sample.objects, image.shape[:2]
    if objects is None or objects.labels is None:
        return DrawnObjects(np.zeros((0, 4)), (), None)
    labels, classes = objects.labels.tolist(), tuple(source.classes or ())
    kept = [k for k, label in enumerate(labels) if 0 <= label < len(classes)]
    known = objects.masks or (None,) * len(objects)
    masks = [None if known[k] is None else full_mask(known[k]) for k in kept]
    names = tuple(classes[labels[k]] for k in kept)
    boxes = objects.boxes[kept].astype(np.float64) * (width, height, width, height)
    return DrawnObjects(boxes, names, masks)


def detected(encoder: Encoder, image: ImagePixels, score: float) -> DrawnObjects:
    """Return what a detector finds in an image, from a score on."""
    (found,) = detector_of(encoder).predict(encoder, [image])
    return drawn_detections(found, score=score)


def agreement(found: DrawnObjects, truth: DrawnObjects) -> float:
    """Return 2 R / (F + A): R of F detections are right, the best first, each with one of A objects alone.

    1 where there is nothing, and nothing is found.
    """
    if not len(found.boxes) + len(truth.boxes):
        return 1.0
    overlaps, free, right = _ious(found.boxes, truth.boxes), np.ones(len(truth.boxes), bool), 0
    for k, name in enumerate(found.names):
        fits = free & (overlaps[k] >= AGREES) & (np.array(truth.names, object) == name)
        if fits.any():
            free[np.where(fits, overlaps[k], -1).argmax()] = False
            right += 1
    return 2 * right / (len(found.boxes) + len(truth.boxes))


def _ious(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    shared = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    inside = shared.clip(0).prod(-1)
    sizes = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    return inside / np.maximum(sizes[0][:, None] + sizes[1][None] - inside, 1e-12)


def _ordered(encoder: Encoder, source: Source, config: DetectionsConfig) -> list[int]:
    """The worst images, or the best, of those that are looked at; of equals the first."""
    looked = image_numbers(source, config.among)
    agreements = []
    for sample in samples_of(source, looked):
        (image,) = images_of([sample])
        agreements.append(agreement(detected(encoder, image, config.score), annotated(sample, image, source)))
    order = np.argsort(agreements if config.order == "worst" else np.negative(agreements), kind="stable")
    return [looked[k] for k in order[: config.count].tolist()]
