"""Average precision of detections by pycocotools, its intervals over images, and precision at each recall."""

import copy
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Kind = Literal["box", "mask"]
COCO_TYPES: dict[Kind, Any] = {"box": "bbox", "mask": "segm"}  # by pycocotools' names
SUMMARY = (  # in the order of pycocotools' `stats`
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
NONE = -1.0  # what pycocotools gives where there is no object
RECALLS = 101


@dataclass(frozen=True, eq=False)
class Ranked:
    """Detections of one class in all images, best first, and which of them are right."""

    images: Int64[np.ndarray, "D"]  # rows of images
    right: Bool[np.ndarray, "10 D"]  # at each IoU
    wrong: Bool[np.ndarray, "10 D"]  # neither: matched to a crowd
    objects: Int64[np.ndarray, "images"]  # of each image, crowds left out


@dataclass(frozen=True, eq=False)
class CocoScores:
    """What pycocotools says of detections, as fractions in [0, 1]."""

    summary: dict[str, float]  # by the names of `SUMMARY`; without those for which there is no object
    classes: dict[int, float]  # AP of each category that has an object
    precision: dict[str, list[float]]  # at 101 recalls, the mean over classes: at IoU 0.5, 0.75, and all
    ranked: list[Ranked]


def score(truth: dict[str, Any], detections: Sequence[dict[str, Any]], kind: Kind) -> CocoScores:
    """Return AP and AR of detections in COCO's format of results, for a data set in its format of instances.

    Every image of `truth` counts, also one without objects.
    """
    with redirect_stdout(io.StringIO()):
        true: Any = COCO()
        true.dataset = copy.deepcopy(truth)  # it adds keys of its own
        true.createIndex()
        measured: Any = COCOeval(true, _loaded(true, detections), COCO_TYPES[kind])
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    summary = {
        name: float(value) for name, value in zip(SUMMARY, measured.stats, strict=True) if value > NONE
    }
    precision = measured.eval["precision"][:, :, :, 0, -1]  # of all sizes: [IoU, recall, class]
    there = (precision > NONE).any(axis=(0, 1))
    ids = [int(category) for category in measured.params.catIds]
    classes = {ids[k]: float(precision[:, :, k].mean()) for k in np.flatnonzero(there).tolist()}
    curves = {}
    if there.any():
        mean = precision[:, :, there].mean(axis=2)
        curves = {"50": mean[0].tolist(), "75": mean[5].tolist(), "all": mean.mean(axis=0).tolist()}
    return CocoScores(summary, classes, curves, _ranked(measured))


def of_kind(result: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """Return a result with what is measured: pycocotools makes boxes of masks where both are there."""
    left = "segmentation" if kind == "box" else "bbox"
    return {name: value for name, value in result.items() if name != left}


def _loaded(true: Any, detections: Sequence[dict[str, Any]]) -> COCO:
    """Results as pycocotools reads them, which fails on an empty list."""
    if detections:
        return true.loadRes(copy.deepcopy(list(detections)))
    none: Any = COCO()
    none.dataset = {
        "images": true.dataset["images"],
        "categories": true.dataset["categories"],
        "annotations": [],
    }
    none.createIndex()
    return none


def _ranked(measured: Any) -> list[Ranked]:
    """Return what is right and wrong in each class that has an object, as pycocotools matched all sizes."""
    ids = measured.params.imgIds
    sizes = len(measured.params.areaRng)
    found = []
    for k in range(len(measured.params.catIds)):
        start = k * sizes * len(ids)  # ordered by class, size (all come first), image
        each = measured.evalImgs[start : start + len(ids)]
        objects = np.array([0 if e is None else int((np.array(e["gtIgnore"]) == 0).sum()) for e in each])
        parts = [(row, e) for row, e in enumerate(each) if e is not None]
        if not objects.any():
            continue
        scores = np.concatenate([e["dtScores"] for _, e in parts])
        order = np.argsort(-scores, kind="mergesort")
        images = np.concatenate([np.full(len(e["dtScores"]), row) for row, e in parts]).astype(np.int64)
        matched = np.concatenate([e["dtMatches"] for _, e in parts], axis=1) > 0
        counts = ~np.concatenate([e["dtIgnore"] for _, e in parts], axis=1).astype(bool)
        right, wrong = (matched & counts)[:, order], (~matched & counts)[:, order]
        found.append(Ranked(images[order], right, wrong, objects))
    return found


def weighted_ap(ranked: Sequence[Ranked], weights: Float64[np.ndarray, "images"]) -> float:
    """Return AP where each image counts as often as its weight says; with all weights 1 it is pycocotools'.

    The mean over classes with an object, IoUs and 101 recalls of the greatest precision at that recall or
    more.
    """
    levels, total = np.linspace(0, 1, RECALLS), []
    for each in ranked:
        objects = float(weights @ each.objects)
        if not objects:
            continue
        own = weights[each.images]
        right, wrong = (each.right * own).cumsum(axis=1), (each.wrong * own).cumsum(axis=1)
        recall, precision = right / objects, right / (right + wrong + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
        indices = [np.searchsorted(row, levels, side="left") for row in recall]
        total.append(np.mean([row[at] for row, at in zip(best, indices, strict=True)]))
    return float(np.mean(total)) if total else 0.0


def ap_interval(
    ranked: Sequence[Ranked], images: int, samples: int, seed: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of AP over images, which are drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        times = np.bincount(rng.integers(images, size=images), minlength=images)
        drawn.append(weighted_ap(ranked, times.astype(np.float64)))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
