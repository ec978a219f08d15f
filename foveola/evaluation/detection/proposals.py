"""Objects that were found held against those that people annotated, whatever their classes. Pure functions.

Images, annotations and proposals are in COCO's formats, as `truth` and `average_precision` have them. A
proposal takes the object with which it has the greatest IoU among those that no better one has taken, as
pycocotools matches them. What lies on a crowd, and on no object, counts as nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from pycocotools import mask as coco
from torch import Tensor

from foveola.evaluation.detection.average_precision import CocoScores, Kind, ap_interval, of_kind, score
from foveola.evaluation.detection.truth import data_set
from foveola.evaluation.metrics import interval
from foveola.evaluation.paired import PackedScores, packed
from foveola.evaluation.protocol import Metric

COCO_IOUS = np.linspace(0.5, 0.95, 10)  # COCO's; the first one is that of precision, recall and CorLoc
FIRST_PROPOSALS = (1, 10, 100)  # proposals of an image that AR reads
AREA_RANGES = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}  # areas, as COCO
NEARLY_ONE = 1 - 1e-10  # pycocotools' greatest IoU that is asked for
ONE_CLASS = ("object",)  # the only class

METRICS = (
    Metric("*_corloc", "{} CorLoc", "higher"),
    Metric("*_precision", "{} precision at IoU 0.5", "higher"),
    Metric("*_recall", "{} recall at IoU 0.5", "higher"),
    Metric("*_recall_*", "{} recall at IoU 0.5 ({})", "higher"),
    Metric("*_best_iou", "{} mean best IoU", "higher"),
    Metric("*_ap", "{} AP", "higher"),
    Metric("*_ap*", "{} AP{}", "higher"),
    Metric("*_ar*", "{} AR{}", "higher"),
    Metric("images_without", "images without any proposal", "lower"),
)


@dataclass(frozen=True, eq=False)
class Held:
    """The K proposals of one image, best first, held against its G objects."""

    image: int
    taken: Int64[np.ndarray, "10 K"]  # at each IoU the object that each takes; -1: none
    ignored: Bool[np.ndarray, "10 K"]  # takes none, but lies on a crowd
    best: Float64[np.ndarray, "G"]  # IoU of each object with the proposal that fits it best
    first: bool  # whether the best proposal that does not lie on a crowd has an IoU of 0.5 with any object
    areas: Float64[np.ndarray, "G"]  # in pixels

    def found(self, level: int, count: int | None = None) -> Bool[np.ndarray, "G"]:
        """Return which objects the first `count` proposals take at the IoU of this index."""
        return np.isin(np.arange(len(self.best)), self.taken[level, :count])


@dataclass(frozen=True, eq=False)
class Compared:
    """Numbers in percent with their intervals, the score of each row, and precision at each recall."""

    metrics: dict[str, float]
    scores: dict[str, PackedScores]
    curves: dict[str, dict[str, list[float]]]


def match(
    ious: Float[np.ndarray, "K G"], crowds: Float[np.ndarray, "K C"]
) -> tuple[Int64[np.ndarray, "10 K"], Bool[np.ndarray, "10 K"]]:
    """Return which object each proposal takes at each IoU (-1: none), and whether it lies on a crowd instead.

    `crowds` are fractions of each proposal that lie within each crowd. Proposals choose in their order; of
    objects with the same IoU the last one is taken, as pycocotools has it.
    """
    taken = np.full((len(COCO_IOUS), len(ious)), -1)
    ignored = np.zeros((len(COCO_IOUS), len(ious)), bool)
    on_crowd = crowds.max(axis=1, initial=-1.0)
    for level, wanted in enumerate(np.minimum(COCO_IOUS, NEARLY_ONE).tolist()):
        free = ious.astype(np.float64)
        for k in range(len(ious)):
            best = free.shape[1] - 1 - int(free[k, ::-1].argmax()) if free.shape[1] else -1
            if best >= 0 and free[k, best] >= wanted:
                taken[level, k] = best
                free[:, best] = -1.0
            else:
                ignored[level, k] = on_crowd[k] >= wanted
    return taken, ignored


def held_against(
    image: int, annotations: Sequence[dict[str, Any]], proposals: Sequence[dict[str, Any]], kind: Kind
) -> Held:
    """Hold the proposals of one image, in any order, against its annotations."""
    ranked = sorted(proposals, key=lambda each: -each["score"])  # equals stay in their order
    objects, crowds = ([a for a in annotations if bool(a["iscrowd"]) is crowd] for crowd in (False, True))
    ious = pairwise_iou(ranked, objects, kind)
    taken, ignored = match(ious, pairwise_iou(ranked, crowds, kind))
    counting = np.flatnonzero(~ignored[0])
    first = bool(len(counting)) and bool((ious[counting[0]] >= COCO_IOUS[0]).any())
    areas = np.array([annotation["area"] for annotation in objects], np.float64)
    return Held(image, taken, ignored, ious.max(axis=0, initial=0.0), first, areas)


def pairwise_iou(
    proposals: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]], kind: Kind
) -> Float64[np.ndarray, "K G"]:
    """Return the IoU of each proposal with each annotation; with a crowd, what of the proposal it holds."""
    if not proposals or not annotations:
        return np.zeros((len(proposals), len(annotations)))
    name = "bbox" if kind == "box" else "segmentation"
    found: Any = [each[name] for each in proposals]
    true: Any = [each[name] for each in annotations]
    if kind == "box":
        found, true = np.array(found, np.float64), np.array(true, np.float64)
    return np.asarray(coco.iou(found, true, [int(annotation["iscrowd"]) for annotation in annotations]))


def compare_proposals(
    sizes: dict[int, tuple[int, int]],
    annotations: Sequence[dict[str, Any]],
    proposals: Sequence[dict[str, Any]],
    kinds: Sequence[Kind],
    resamples: int = 200,
    seed: int = 0,
) -> Compared:
    """Return how well proposals find annotated objects, of boxes and of masks.

    Args:
        sizes: (rows, columns) of all images by id, also of those without objects, where every proposal is
            wrong.
        annotations: at least one that is no crowd, all of category 1, with what `kinds` reads: `bbox`,
            `segmentation` (RLE).
        proposals: the same, with a `score`.
        resamples: how often images are drawn again for the interval of AP; 0 = none.

    Numbers of each kind, in percent: `corloc`, of the images with an object those whose best proposal has an
    IoU of 0.5 with any of its objects; `precision` and `recall` of all proposals and objects at IoU 0.5,
    `recall_small`, ... by the areas of COCO; `best_iou`, the mean over objects of the greatest IoU of any
    proposal; COCO's `ap`, `ap50`, ..., `ar1`, `ar10`, `ar100`. `images_without` are the images without any
    proposal. Ends of 95 % intervals over images are `_low` and `_high`.
    """
    metrics: dict[str, float] = {}
    scores: dict[str, PackedScores] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    rows = MeanRows(metrics, scores, seed)
    true_of, found_of = _by_image(sizes, annotations), _by_image(sizes, proposals)
    truth = data_set(sizes, list(annotations), ONE_CLASS)
    for kind in kinds:
        _add_matches(
            rows,
            kind,
            [held_against(image, true_of[image], found_of[image], kind) for image in sorted(sizes)],
        )
        summary = score(truth, [of_kind(each, kind) for each in proposals], kind)
        metrics |= _average_precision(kind, summary, len(sizes), resamples, seed)
        curves[kind] = {level: [round(v, 4) for v in values] for level, values in summary.precision.items()}
    having = {each["image_id"] for each in proposals}
    ids = sorted(sizes)
    rows.add("images_without", torch.tensor([image not in having for image in ids]), torch.tensor(ids))
    return Compared(metrics, scores, curves)


class MeanRows:
    """Takes numbers from rows: their mean, its interval over images, and the rows themselves."""

    def __init__(self, metrics: dict[str, float], scores: dict[str, PackedScores], seed: int) -> None:
        self.metrics, self.scores, self.seed = metrics, scores, seed

    def add(self, name: str, values: Tensor, images: Int64[Tensor, "n"], keep: bool = True) -> None:
        """Add the mean of `values` in percent; nothing of no rows. `keep` the rows that others have, too."""
        if not len(values):
            return
        low, high = interval(values, images, seed=self.seed)
        found = {name: values.double().mean().item(), f"{name}_low": low, f"{name}_high": high}
        self.metrics |= {each: 100 * value for each, value in found.items()}
        if keep:
            self.scores[name] = packed(values, images)


def _add_matches(rows: MeanRows, kind: Kind, held: Sequence[Held]) -> None:
    """Everything that each image says by itself."""
    annotated = [each for each in held if len(each.best)]
    ids = torch.tensor([each.image for each in annotated])
    rows.add(f"{kind}_corloc", torch.tensor([each.first for each in annotated]), ids)
    proposals = np.concatenate([each.taken[0][~each.ignored[0]] >= 0 for each in held])
    of_image = _repeated(held, lambda each: int((~each.ignored[0]).sum()))
    rows.add(f"{kind}_precision", torch.from_numpy(proposals), of_image, keep=False)
    of_object = _repeated(annotated, lambda each: len(each.best))
    recalled = torch.from_numpy(_joined(each.found(0) for each in annotated))
    rows.add(f"{kind}_recall", recalled, of_object)
    areas = torch.from_numpy(_joined(each.areas for each in annotated))
    for size, (least, most) in AREA_RANGES.items():
        here = (areas >= least) & (areas < most)
        rows.add(f"{kind}_recall_{size}", recalled[here], of_object[here])
    rows.add(f"{kind}_best_iou", torch.from_numpy(_joined(each.best for each in annotated)), of_object)
    for count in FIRST_PROPOSALS:
        found = (np.mean([each.found(t, count) for t in range(len(COCO_IOUS))], axis=0) for each in annotated)
        rows.add(f"{kind}_ar{count}", torch.from_numpy(_joined(found)), of_object)


def _average_precision(
    kind: Kind, found: CocoScores, images: int, resamples: int, seed: int
) -> dict[str, float]:
    """COCO's AP of all kinds, and AR by size; AR of the first proposals has its rows elsewhere."""
    own = {f"ar{count}" for count in FIRST_PROPOSALS}
    numbers = {f"{kind}_{name}": 100 * value for name, value in found.summary.items() if name not in own}
    if resamples and images > 1:
        low, high = ap_interval(found.ranked, images, resamples, seed)
        numbers |= {f"{kind}_ap_low": 100 * low, f"{kind}_ap_high": 100 * high}
    return numbers


def _by_image(
    sizes: dict[int, tuple[int, int]], annotations: Iterable[dict[str, Any]]
) -> dict[int, list[dict[str, Any]]]:
    of_image: dict[int, list[dict[str, Any]]] = {image: [] for image in sizes}
    for each in annotations:
        of_image[each["image_id"]].append(each)
    return of_image


def _repeated(held: Sequence[Held], count: Callable[[Held], int]) -> Int64[Tensor, "n"]:
    """The image of each row, of which each image has so many."""
    return torch.tensor([each.image for each in held for _ in range(count(each))], dtype=torch.int64)


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(parts))
