"""What a fine-tuned detector finds, held against annotated objects: the protocol `detect`."""

from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

from foveola import distributed
from foveola.config import UserError, again, key
from foveola.data.sample import have_masks
from foveola.data.sources import Source
from foveola.evaluation.detection.average_precision import CocoScores, Kind, ap_interval, of_kind, score
from foveola.evaluation.detection.truth import Annotated, AnnotatedCut, data_set, met_by_name, rle_of
from foveola.evaluation.heads import HeadImages, head_for
from foveola.evaluation.images import ChosenConfig
from foveola.evaluation.protocol import At, Metric, Outcome, Protocol
from foveola.models.encoder import Encoder
from foveola.tasks.detection import DetectionHead
from foveola.tasks.task import Detections

FILE = "detections.json"  # in the folder beside the result
DIGITS = 3  # of boxes, in pixels
SCORE_DIGITS = 6


@dataclass(frozen=True)
class DetectConfig(ChosenConfig):
    """Settings of `detect`."""

    batch_size: int = again(ChosenConfig, "batch_size", 8)
    resamples: int = key(
        200, "times that images are drawn again for the interval of AP; 0 = no interval", at_least=0
    )


class Searched(NamedTuple):
    """What was found in images, and what there is, with indices in the source as ids of images."""

    sizes: dict[int, tuple[int, int]]  # rows, columns
    annotations: list[dict[str, Any]]
    detections: list[dict[str, Any]]


class Detect(Protocol):
    """Asks the head of a fine-tuned encoder for the objects of each test image: COCO's AP and AR.

    Numbers in percent, of boxes and, where both head and data have them, of masks: `box_ap` with its 95 %
    interval over images, `box_ap50`, `box_ap75`, `box_ap_small` (below 32 x 32 pixels), `box_ap_medium`,
    `box_ap_large` (from 96 x 96), `box_ar1`, `box_ar10`, `box_ar100` and AR by size, `box_ap_class_C` (AP of
    class C). Classes are met by name: objects of a class that the head does not know are missed, what it
    finds of a class that the data lack is left out. Crowds count as nothing. All detections are kept in
    COCO's format of results, in `results/detect/detections.json`.
    """

    name = "detect"
    help = "objects that the head of a fine-tuned encoder finds: COCO's AP of boxes and masks"
    Config = DetectConfig
    metrics = (
        Metric("box_ap", "box AP", "higher", main=True),
        Metric("box_ap*", "box AP{}", "higher"),
        Metric("box_ar*", "box AR{}", "higher"),
        Metric("box_ap_class_*", "box AP of {}", "higher", column="box AP"),
        Metric("mask_ap", "mask AP", "higher"),
        Metric("mask_ap*", "mask AP{}", "higher"),
        Metric("mask_ar*", "mask AR{}", "higher"),
        Metric("mask_ap_class_*", "mask AP of {}", "higher", column="mask AP"),
    )

    def measure(self, at: At, config: DetectConfig) -> Outcome:
        """Find the objects of all images of the test data, each process in its part of them, and count."""
        head, began = detector_of(at.encoder), perf_counter()
        if not at.test.has_objects:
            raise UserError(f"test: {at.test.name} has no objects, which detect needs (annotations=, boxes=)")
        shared = met_by_name(head.classes, at.test)
        masks = bool(head.config.masks) and have_masks(at.test)
        batches: HeadImages[Annotated] = HeadImages(at, config, AnnotatedCut(masks), self.name, parcel=4)
        found = search_images(batches, head, masks, shared)
        facts = batches.facts() | {"seconds": round(perf_counter() - began, 2)}
        return distributed.on_main(lambda: _outcome(at.test, head.config.names, config, found, masks, facts))


def detector_of(encoder: Encoder) -> DetectionHead:
    """Return the head of an encoder. Raises UserError where it has none, or one for another task."""
    instead = "localisation measures encoders without a head"
    return head_for(encoder, DetectionHead, "detect", "detect", instead)


def search_images(
    batches: HeadImages[Annotated], head: DetectionHead, masks: bool, shared: dict[int, int]
) -> Searched:
    """Return what is found in the chosen images by all processes, and what there is."""
    sizes, annotations, detections = {}, [], []
    for batch in batches:
        for index, image, known in zip(batch.indices.tolist(), batch.images, batch.annotations, strict=True):
            with batches.reduced():
                (prediction,) = head.predict(batches.at.encoder, [image])
            sizes[index] = image.shape[:2]
            annotations += known
            detections += coco_results(prediction, index, shared, masks)
    gathered = distributed.gather_objects((sizes, annotations, detections))
    return Searched(
        {index: size for part in gathered for index, size in part[0].items()},
        [each for part in gathered for each in part[1]],
        [each for part in gathered for each in part[2]],
    )


def coco_results(found: Detections, image: int, shared: dict[int, int], masks: bool) -> list[dict[str, Any]]:
    """Return detections of an image in COCO's format of results; `shared` gives the categories, less one."""
    results = []
    for k, (box, label, certain) in enumerate(
        zip(found.boxes.double().tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
    ):
        if label in shared:
            x0, y0, x1, y1 = box
            result: dict[str, Any] = {
                "image_id": image,
                "category_id": shared[label] + 1,
                "bbox": [round(side, DIGITS) for side in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(certain, SCORE_DIGITS),
            }
            if masks and found.masks is not None:
                result["segmentation"] = rle_of(found.masks[k].numpy())
            results.append(result)
    return results


def _outcome(
    source: Source,
    names: tuple[str, ...],
    config: DetectConfig,
    found: Searched,
    masks: bool,
    facts: dict[str, Any],
) -> Outcome:
    classes = tuple(source.classes or ())
    truth = data_set(found.sizes, found.annotations, classes)
    if not any(not annotation["iscrowd"] for annotation in found.annotations):
        raise UserError(f"test: {source.name} has no object with a class in {len(found.sizes)} images")
    metrics: dict[str, float] = {}
    curves: dict[str, Any] = {}
    kinds: tuple[Kind, ...] = ("box", "mask") if masks else ("box",)
    for kind in kinds:
        scores = score(truth, [of_kind(each, kind) for each in found.detections], kind)
        metrics |= _numbers(kind, scores, classes)
        curves[kind] = {level: [round(v, 4) for v in values] for level, values in scores.precision.items()}
        if config.resamples and len(found.sizes) > 1:
            low, high = ap_interval(scores.ranked, len(found.sizes), config.resamples, config.seed)
            metrics |= {f"{kind}_ap_low": 100 * low, f"{kind}_ap_high": 100 * high}
    objects = [annotation for annotation in found.annotations if not annotation["iscrowd"]]
    told = {
        **facts,
        "rows": len(found.sizes),
        "objects": len(objects),
        "crowds": len(found.annotations) - len(objects),
        "detections": len(found.detections),
    }
    notes = _notes(classes, names, masks)
    beside = {FILE: official(source, found.detections)}
    return Outcome(metrics, {"test": told}, notes, grid={"precision": curves}, beside=beside)


def _numbers(kind: str, scores: CocoScores, classes: tuple[str, ...]) -> dict[str, float]:
    numbers = {f"{kind}_{name}": 100 * value for name, value in scores.summary.items()}
    return numbers | {
        f"{kind}_ap_class_{classes[category - 1]}": 100 * value for category, value in scores.classes.items()
    }


def _notes(classes: tuple[str, ...], names: Iterable[str], masks: bool) -> tuple[str, ...]:
    notes = []
    known = set(names)
    if missing := [name for name in classes if name not in known]:
        notes.append(
            f"test: {len(missing)} of {len(classes)} classes are not known to the head, their objects are "
            f"missed: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
        )
    if unused := known - set(classes):
        notes.append(f"what is found of {len(unused)} classes that test lacks is left out")
    if not masks:
        notes.append("boxes alone are measured: head or data have no masks")
    return tuple(notes)


def official(source: Any, detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return detections with the ids of the annotation file, where the source has one of COCO.

    Elsewhere images are numbered as in the source, from 0, and categories as its classes, from 1.
    """
    images, categories = (getattr(source, name, None) for name in ("image_ids", "category_ids"))
    if images is None or categories is None:
        return detections
    image_of, category_of = images[source.rows].tolist(), categories.tolist()
    return [
        each | {"image_id": image_of[each["image_id"]], "category_id": category_of[each["category_id"] - 1]}
        for each in detections
    ]
