"""Objects and masks of an image, cut with a part of it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from foveola.data.decoding import Window
from foveola.data.sample import Objects, full_mask


def cut_objects(objects: Objects | None, window: Window, size: tuple[int, int]) -> Objects | None:
    """Return what of the objects of an image of `size` (width, height) lies in a part of it; None for
    nothing.

    Boxes end at its border; masks are cut to its pixels, and an object whose mask has none there is left out.
    Areas are fractions of the part.
    """
    if objects is None:
        return None
    (x0, y0, x1, y1), (width, height) = window, size
    corners = objects.boxes.astype(np.float64) * (width, height, width, height)
    inside = np.minimum(corners[:, 2:], (x1, y1)) > np.maximum(corners[:, :2], (x0, y0))
    keep = np.flatnonzero(inside.all(axis=1))
    masks: list[Any] = [None] * len(keep)
    areas = np.full(len(keep), -1.0)
    if objects.masks is not None:
        for at, index in enumerate(keep.tolist()):
            if objects.masks[index] is not None:
                masks[at] = cut_mask(objects.masks[index], window, size)
                areas[at] = masks[at].mean()
    shown = areas != 0
    keep, masks, areas = keep[shown], [m for m, s in zip(masks, shown, strict=True) if s], areas[shown]
    if not len(keep):
        return None
    boxes = (corners[keep] - (x0, y0, x0, y0)) / (x1 - x0, y1 - y0, x1 - x0, y1 - y0)
    clipped = boxes.clip(0, 1)
    areas = np.where(areas < 0, (clipped[:, 2:] - clipped[:, :2]).prod(axis=1), areas)
    return Objects.from_boxes(
        boxes,
        None if objects.labels is None else objects.labels[keep],
        None if objects.masks is None else masks,
        areas.astype(np.float32),
        None if objects.scores is None else objects.scores[keep],
    )


def cut_mask(mask: Any, window: Window, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Return the part of a mask of any kind that `Objects.masks` may hold; only that part is drawn.

    Of a mask of another resolution than its image, all its pixels that the part touches.
    """
    tall, wide = mask.shape if isinstance(mask, np.ndarray) else mask["size"]
    part = _scaled(window, size, (wide, tall))
    x0, y0, x1, y1 = part
    if isinstance(mask, np.ndarray):
        return mask[y0:y1, x0:x1]
    if "polygons" in mask:
        return _cut_polygons(mask["polygons"], part, (wide, tall))
    return _cut_runs(_counts(mask["counts"]), part, tall)


def _scaled(window: Window, size: tuple[int, int], to: tuple[int, int]) -> Window:
    if size == to:
        return window
    x0, y0, x1, y1 = window
    across, down = to[0] / size[0], to[1] / size[1]
    return math.floor(x0 * across), math.floor(y0 * down), math.ceil(x1 * across), math.ceil(y1 * down)


def _cut_polygons(rings: Sequence[Sequence[float]], part: Window, size: tuple[int, int]) -> np.ndarray:
    """Rings drawn where they are, on no more pixels than they and the part have in common.

    Whole pixels are taken off their coordinates, and these stay positive: so each is rounded as in the whole
    image.
    """
    x0, y0, x1, y1 = part
    points = np.concatenate([np.asarray(ring, np.float64) for ring in rings]).reshape(-1, 2)
    left, top = (max(math.floor(low), 0) for low in points.min(axis=0))
    left, top = min(left, x1 - 1), min(top, y1 - 1)
    right, bottom = min(x1, size[0]), min(y1, size[1])
    out = np.zeros((y1 - y0, x1 - x0), bool)
    if (points.min(axis=0) < 0).any():  # these are rounded otherwise
        left, top = 0, 0
    if right <= left or bottom <= top:
        return out
    moved = [(np.asarray(ring, np.float64).reshape(-1, 2) - (left, top)).ravel().tolist() for ring in rings]
    drawn = full_mask({"size": [bottom - top, right - left], "polygons": moved})
    ys, xs = slice(max(y0 - top, 0), None), slice(max(x0 - left, 0), None)
    shown = drawn[ys, xs]
    down, across = max(top - y0, 0), max(left - x0, 0)
    out[down : down + shown.shape[0], across : across + shown.shape[1]] = shown
    return out


def _counts(counts: Any) -> Int64[np.ndarray, "n"]:
    """The lengths of the runs of COCO's RLE, beginning with one of zeros; from a list, or its text."""
    if isinstance(counts, list):
        return np.array(counts, np.int64)
    found: list[int] = []
    value = shift = 0
    for byte in counts.encode() if isinstance(counts, str) else counts:
        digit = byte - 48
        value |= (digit & 0x1F) << shift
        shift += 5
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << shift
        found.append(value + found[-2] if len(found) > 2 else value)
        value = shift = 0
    return np.array(found, np.int64)


def _cut_runs(counts: Int64[np.ndarray, "n"], part: Window, height: int) -> np.ndarray:
    """Runs go down the columns, from the left one on."""
    x0, y0, x1, y1 = part
    low, high = x0 * height, x1 * height
    ends = np.concatenate([[0], np.cumsum(counts)]).clip(low, high)
    lengths = np.diff(ends)
    filled = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    columns = np.zeros(high - low, bool)
    columns[: len(filled)] = filled
    return columns.reshape(x1 - x0, height).T[y0:y1]
