"""MaxBoxAccV2: boxes around what maps light up at a threshold, against annotated boxes. Pure functions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from foveola.evaluation.localisation.components import GREY_LEVELS, components, holes

SIDE = 224  # pixels a side to which maps are enlarged, as published, whatever the encoder sees
IOUS = (0.3, 0.5, 0.7)
ROUNDING = 1e-6  # relative to the greatest value: differences below are noise of float32
STEPS = 56  # sides of centred squares tried, up to the whole image; steps of 4 pixels of 224


def enlarge(
    maps: Float[Tensor, "n h w"], side: int = SIDE
) -> tuple[Float32[np.ndarray, "n {side} {side}"], UInt8[np.ndarray, "n {side} {side}"]]:
    """Return maps as [0, 1] and as 0 to 255 on a square: bicubic, each by its own least and greatest value.

    A map that is constant, but for what float32 rounds, becomes zero. 255 times the value is cut off, not
    rounded, as published.
    """
    large = interpolate(maps[:, None].float(), (side, side), mode="bicubic", align_corners=False)[:, 0]
    low = large.amin(dim=(1, 2), keepdim=True)
    large = large - low
    high = large.amax(dim=(1, 2), keepdim=True)
    least, most = maps.flatten(1).aminmax(dim=1)
    flat = most - least <= ROUNDING * torch.maximum(least.abs(), most.abs())
    heights = torch.where((high > 0) & ~flat[:, None, None], large / high, 0.0)
    return heights.numpy(), (255 * heights).to(torch.uint8).numpy()


def overlaps(
    heights: Float32[np.ndarray, "S S"],
    levels: UInt8[np.ndarray, "S S"],
    boxes: Float[np.ndarray, "k 4"],
    official: bool = True,
) -> tuple[Float64[np.ndarray, "255"], Float64[np.ndarray, "255"]]:
    """Return the best IoU at each threshold 0 to 254 of an enlarged map: of any of its boxes, and of
    its largest part's.

    The pixels above a threshold give a box for each 8-connected part; the largest part is that of most
    pixels. `boxes` are in the unit square. `official` repeats the published measure in pixels: ends of boxes
    one too far (x + w) and cut at S - 1, boxes of holes too, annotated boxes cut to whole pixels, sides one
    longer in the IoU, and (0, 0, 0, 0) where nothing is above. Otherwise parts alone are boxes, and geometry
    is exact.
    """
    side = len(levels)
    parts = components(heights, levels)
    found, at = parts.boxes, parts.levels
    if official:
        inner = holes(heights, levels)
        grown = inner.boxes + np.array((-1, -1, 1, 1))
        found, at = np.concatenate((found, grown)), np.concatenate((at, inner.levels))
    best = best_iou(found, boxes, side, official)
    nothing = best_iou(np.zeros((1, 4), np.int64), boxes, side, official)[0]
    every, largest = np.full(GREY_LEVELS, nothing), np.full(GREY_LEVELS, nothing)
    values = np.unique(at)
    every[values] = 0
    np.maximum.at(every, at, best)
    order = np.lexsort((-parts.areas, parts.levels))
    present, first = np.unique(parts.levels[order], return_index=True)
    largest[present] = best[order[first]]
    return every, largest


def best_iou(
    found: Int64[np.ndarray, "m 4"], boxes: Float[np.ndarray, "k 4"], side: int, official: bool
) -> Float64[np.ndarray, "m"]:
    """Return, of half-open boxes in pixels, the best IoU with any of `boxes` (in the unit square); see
    `overlaps`.
    """
    if official:
        one = 1.0
        found = np.minimum(found, (side, side, side - 1, side - 1))
        # A ten-thousandth of a pixel: 50 / 224 in float32 must not become 49.
        truth = np.trunc(boxes.astype(np.float64) * side + 1e-4)
    else:
        one, truth = 0.0, boxes.astype(np.float64) * side
    a, b = found[:, None].astype(np.float64), truth[None]
    shared = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + one).clip(0).prod(-1)
    sizes = [(x[..., 2:] - x[..., :2] + one).prod(-1) for x in (a, b)]
    whole = sizes[0] + sizes[1] - shared
    return (shared / np.where(whole > 0, whole, 1.0)).max(axis=1, initial=0.0)


def image_hits(
    heights: Float32[np.ndarray, "S S"],
    levels: UInt8[np.ndarray, "S S"],
    boxes: Float[np.ndarray, "k 4"],
    ious: Sequence[float],
    official: bool,
) -> Bool[np.ndarray, "D1 255"]:
    """Return whether an image is found: a row for each IoU asked for, the last for the largest part at
    0.5.
    """
    every, largest = overlaps(heights, levels, boxes, official)
    return np.concatenate((every >= np.array(ious)[:, None], largest[None] >= 0.5))


def square_hits(
    boxes: Float[np.ndarray, "k 4"], ious: Sequence[float], side: int, official: bool
) -> Bool[np.ndarray, "D1 56"]:
    """Return the same for a centred square of each of `STEPS` sides, the last one the whole image."""
    sides = np.rint(np.arange(1, STEPS + 1) * side / STEPS).astype(np.int64)
    start = (side - sides) // 2
    squares = np.stack((start, start, start + sides, start + sides), axis=1)
    best = best_iou(squares, boxes, side, official)
    return best >= np.array([*ious, 0.5])[:, None]


@dataclass(frozen=True, eq=False)
class BoxAccuracy:
    """Fractions of images found, in percent. Options are thresholds (or, of centred squares, sides)."""

    score: float  # MaxBoxAccV2: the mean of `best`
    best: tuple[float, ...]  # at each IoU, by the option best for it on these very images
    chosen: tuple[float, ...]  # these options; the lowest of equals
    largest: float  # MaxBoxAcc: the largest part alone, at IoU 0.5, by its best option
    curves: Float64[np.ndarray, "D T"]


def accuracy(hits: Bool[np.ndarray, "n D1 T"], options: Sequence[float]) -> BoxAccuracy:
    """Return the summary of `image_hits` (or `square_hits`) of n images, T of them kept as `options`."""
    percents = 100 * hits.mean(axis=0)
    first = percents[:-1].argmax(axis=1)
    best = percents[:-1].max(axis=1)
    chosen = tuple(float(options[i]) for i in first)
    return BoxAccuracy(
        float(best.mean()), tuple(best.tolist()), chosen, float(percents[-1].max()), percents[:-1]
    )


def distinct(thresholds: Sequence[float]) -> tuple[Int64[np.ndarray, "T"], tuple[float, ...]]:
    """Return the grey levels that thresholds in [0, 1) stand for, each once, and the lowest threshold of
    each.

    Above level L means above floor(255 t): a thousand thresholds are 255 different ones.
    """
    levels, first = np.unique([int(t * 255) for t in thresholds], return_index=True)
    return levels, tuple(float(thresholds[i]) for i in first)


def max_box_acc(
    maps: Float[Tensor, "n h w"],
    boxes: Sequence[Float[np.ndarray, "_ 4"]],
    thresholds: Sequence[float] | None = None,
    levels: Sequence[float] = IOUS,
    *,
    side: int = SIDE,
    official: bool = True,
) -> BoxAccuracy:
    """Return MaxBoxAccV2 (Choe et al., 2020) of n maps of images squashed to squares.

    An image is found at (t, IoU) if any box of its map at threshold t has that IoU with any of its annotated
    `boxes` (k >= 1, in the unit square). For each IoU in `levels` the best t for all images is taken, and
    the mean over IoUs is the score. `thresholds` lie in [0, 1), by default 0, 0.001, ..., 0.999. For
    `official` see `overlaps`. Raises ValueError without maps, and for numbers of maps and boxes that differ.
    """
    if not len(maps) or len(maps) != len(boxes):
        raise ValueError(f"{len(maps)} maps and boxes of {len(boxes)} images")
    steps, options = distinct(np.arange(0, 1, 0.001).tolist() if thresholds is None else thresholds)
    found = [image_hits(h, grey, some, levels, official) for h, grey, some in _each(maps, boxes, side)]
    return accuracy(np.stack(found)[:, :, steps], options)


def _each(
    maps: Tensor, boxes: Sequence[np.ndarray], side: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for start in range(0, len(maps), 64):
        heights, grey = enlarge(maps[start : start + 64], side)
        yield from zip(heights, grey, boxes[start : start + 64], strict=True)


def locate(score: Float[Tensor, "h w"], threshold: float = 0.5, side: int = SIDE) -> Float64[np.ndarray, "4"]:
    """Return the box (x0, y0, x1, y1), in the unit square, of the largest part of a map above a threshold in
    [0, 1).

    The map runs from 0 to 1 between its own least and greatest value. All zero for a constant map.
    """
    heights, grey = enlarge(score[None], side)
    parts = components(heights[0], grey[0])
    here = np.flatnonzero(parts.levels == int(threshold * 255))
    if not len(here):
        return np.zeros(4)
    return parts.boxes[here[parts.areas[here].argmax()]] / side
