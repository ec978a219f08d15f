"""Which of the objects that were found are kept: by score and area, none twice, no more than a number."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from foveola.config import UserError, key
from foveola.proposals.proposal import Proposals


@dataclass(frozen=True)
class FilterConfig:
    """What is kept of an image's proposals."""

    min_score: float | None = key(None, "objects of a lower score are left out; null = none")
    min_area: float = key(0.0, "smallest fraction of the image that an object may cover", at_least=0, below=1)
    max_area: float = key(1.0, "largest fraction of the image that an object may cover", above=0, at_most=1)
    duplicate_iou: float | None = key(
        0.9,
        "IoU (of masks, or of boxes) above which only the surer of two objects stays; null = both stay",
        above=0,
        at_most=1,
    )
    max_objects: int | None = key(None, "largest number of objects of an image; null = all", at_least=1)
    prefer: Literal["score", "area"] = key(
        "score", "which objects max_objects keeps: those of highest score, or of largest area"
    )

    def __post_init__(self) -> None:
        if self.min_area >= self.max_area:
            raise ValueError(f"min_area={self.min_area:g} is not below max_area={self.max_area:g}")

    def unread(self) -> dict[str, str]:
        """Return keys that change nothing, and why."""
        return {"prefer": "without max_objects all are kept"} if self.max_objects is None else {}


def filtered(found: Proposals, size: tuple[int, int], config: FilterConfig) -> Proposals:
    """Return what is kept of an image of `size` (rows, columns): surest first, boxes cut off at its border.

    Objects without a pixel are left out, whatever the settings. Raises UserError for numbers that are not
    finite, and for masks of another size.
    """
    if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        raise UserError("the model found boxes or scores that are no finite numbers")
    if found.masks is not None and found.masks.shape[1:] != size:
        raise UserError(f"the model found masks of {found.masks.shape[1:]} in an image of {size}")
    boxes = found.boxes.reshape(-1, 2, 2).clip(0, (size[1], size[0])).reshape(-1, 4).astype(np.float32)
    found = Proposals(boxes, found.scores, found.labels, found.masks)
    areas = areas_of(found)
    sides = boxes[:, 2:] - boxes[:, :2]
    fractions = areas / (size[0] * size[1])
    keep = (areas > 0) & (sides > 0).all(1) & (fractions >= config.min_area) & (fractions <= config.max_area)
    if config.min_score is not None:
        keep &= found.scores >= config.min_score
    order = np.argsort(-found.scores, kind="stable")
    order = order[keep[order]]
    if config.duplicate_iou is not None:
        order = _without_duplicates(found, areas, order, config.duplicate_iou)
    if config.max_objects is not None and config.prefer == "area":
        largest = np.argsort(-areas[order], kind="stable")[: config.max_objects]
        order = order[np.sort(largest)]
    return found.chosen(order[: config.max_objects])


def areas_of(found: Proposals) -> Float64[np.ndarray, "K"]:
    """Return the pixels that each object covers: its mask, or its box where there are no masks."""
    if found.masks is not None:
        return found.masks.sum((1, 2), dtype=np.int64).astype(np.float64)
    return (found.boxes[:, 2:] - found.boxes[:, :2]).clip(0).astype(np.float64).prod(1)


def _without_duplicates(
    found: Proposals, areas: Float64[np.ndarray, "K"], order: Int64[np.ndarray, "n"], iou: float
) -> Int64[np.ndarray, "k"]:
    """Those of `order` that overlap no earlier one that stays by as much as `iou`."""
    kept: list[int] = []
    for i in order.tolist():
        # An IoU is at most the smaller area over the larger one: few pairs have to be compared.
        near = (j for j in kept if min(areas[i], areas[j]) >= iou * max(areas[i], areas[j]))
        if not any(_iou(found, areas, i, j) >= iou for j in near):
            kept.append(i)
    return np.array(kept, np.int64)


def _iou(found: Proposals, areas: Float64[np.ndarray, "K"], i: int, j: int) -> float:
    if found.masks is None:
        shared = _shared_box(found.boxes[i], found.boxes[j])
    else:
        shared = _shared_pixels(found.masks[i], found.masks[j])
    return shared / (areas[i] + areas[j] - shared)


def _shared_box(a: Float32[np.ndarray, "4"], b: Float32[np.ndarray, "4"]) -> float:
    sides = np.minimum(a[2:], b[2:]).astype(np.float64) - np.maximum(a[:2], b[:2])
    return float(sides.clip(0).prod())


def _shared_pixels(a: Bool[np.ndarray, "H W"], b: Bool[np.ndarray, "H W"]) -> float:
    return float(np.count_nonzero(a & b))
