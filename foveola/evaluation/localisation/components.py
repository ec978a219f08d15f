"""Connected components of a map at all of its thresholds at once, and the boxes around them.

A threshold by itself would be a flood fill; 255 of them would be 255. Here a map is cut once into basins, the
pixels from which steepest ascent leads to one peak. At any threshold a basin's pixels above it are connected
through its peak, and two basins are connected from their highest pass on. So the components of every
threshold are unions of a few basins, and their boxes follow from tables.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

GREY_LEVELS = 255  # thresholds 0 to 254 of maps of 256 grey levels
FAR = 2**15 - 1

Sides = tuple[np.ndarray, ...]  # of each node at each level: x0, y0, x1, y1 (half open), number of pixels


class Components(NamedTuple):
    """A row for each component of each threshold L: the pixels with level > L that are connected."""

    levels: Int64[np.ndarray, "m"]  # the threshold
    boxes: Int64[np.ndarray, "m 4"]  # x0, y0, x1, y1 of its pixels, half open
    areas: Int64[np.ndarray, "m"]  # its pixels


def components(heights: Float32[np.ndarray, "H W"], levels: UInt8[np.ndarray, "H W"]) -> Components:
    """Return the 8-connected components of `levels` > L for all L from 0 to 254.

    `levels` must rise with `heights`, which only make basins few: quantised, a slope is a staircase of flats.
    """
    return _tree(heights, levels, -np.inf, diagonal=True)


def holes(heights: Float32[np.ndarray, "H W"], levels: UInt8[np.ndarray, "H W"]) -> Components:
    """Return the 4-connected components of `levels` <= L that do not touch the border, for all L from 0 to
    254.
    """
    # levels <= L is 255 - levels > 254 - L; what touches the border is connected by a frame around the map.
    found = _tree(-heights, 255 - levels, np.inf, diagonal=False)
    return found._replace(levels=GREY_LEVELS - 1 - found.levels)


def _tree(
    heights: Float32[np.ndarray, "H W"], levels: UInt8[np.ndarray, "H W"], frame: float, *, diagonal: bool
) -> Components:
    """Components of `levels` > L, but for those connected to a frame of height `frame` (inf or -inf)."""
    heights = np.pad(heights, 1, constant_values=frame)
    framed = np.pad(levels, 1, constant_values=255 if frame > 0 else 0)
    basins, tops = _basins(heights, diagonal)
    passes = _passes(basins, framed, len(tops), diagonal)
    peaks = framed.ravel()[tops].astype(np.int64)
    sides = _sides(basins[1:-1, 1:-1], levels, len(tops))
    lows, highs, outside, sides = _merge(passes, peaks, sides)
    lows = np.where(outside, highs, lows)  # nowhere
    lengths = np.maximum(highs - lows, 0)
    nodes = np.repeat(np.arange(len(lows)), lengths)
    at = np.arange(len(nodes)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + lows[nodes]
    boxes = np.stack([side[nodes, at] for side in sides[:4]], axis=1).astype(np.int64)
    return Components(at, boxes, sides[4][nodes, at].astype(np.int64))


def _window(diagonal: bool) -> list[tuple[int, int]]:
    """A pixel and its neighbours in the order of their index: of equals the first is taken, and none in a
    circle.
    """
    every = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return every if diagonal else [step for step in every if 0 in step]


def _basins(
    heights: Float32[np.ndarray, "h w"], diagonal: bool
) -> tuple[Int64[np.ndarray, "h w"], Int64[np.ndarray, "n"]]:
    """The number of each pixel's basin, and the index of the top of each; the frame is basin 0."""
    rows, columns = heights.shape
    best = np.full((rows - 2, columns - 2), -np.inf, np.float32)
    uphill = np.zeros((rows, columns), np.int64)  # index of the highest neighbour; 0 of the frame
    inner, index = uphill[1:-1, 1:-1], np.arange(rows * columns).reshape(rows, columns)
    for dy, dx in _window(diagonal):
        window = slice(1 + dy, rows - 1 + dy), slice(1 + dx, columns - 1 + dx)
        higher = heights[window] > best
        np.copyto(best, heights[window], where=higher)
        np.copyto(inner, index[window], where=higher)
    flat = uphill.ravel()
    while True:
        further = flat[flat]
        if np.array_equal(further, flat):
            break
        flat = further
    tops = np.flatnonzero(flat == index.ravel())
    number = np.zeros(flat.size, np.int64)
    number[tops] = np.arange(len(tops))
    return number[flat].reshape(rows, columns), tops


def _passes(
    basins: Int64[np.ndarray, "h w"], levels: UInt8[np.ndarray, "h w"], count: int, diagonal: bool
) -> list[tuple[int, int, int]]:
    """(level, basin, basin) of the highest pass between each two neighbouring basins, the highest first."""
    codes, heights = [], []
    steps = [(0, 1), (1, 0), (1, 1), (1, -1)] if diagonal else [(0, 1), (1, 0)]
    rows, columns = basins.shape
    for dy, dx in steps:
        here = slice(0, rows - dy), slice(max(0, -dx), columns - max(0, dx))
        there = slice(dy, rows), slice(max(0, dx), columns + min(0, dx))
        border = basins[here] != basins[there]
        a, b = basins[here][border], basins[there][border]
        codes.append(np.minimum(a, b) * count + np.maximum(a, b))
        heights.append(np.minimum(levels[here][border], levels[there][border]))
    code, height = np.concatenate(codes), np.concatenate(heights)
    order = np.argsort(255 - height, kind="stable")
    pairs, first = np.unique(code[order], return_index=True)
    tops = height[order][first]
    falling = np.argsort(255 - tops, kind="stable")
    pairs = pairs[falling]
    return list(zip(tops[falling].tolist(), (pairs // count).tolist(), (pairs % count).tolist(), strict=True))


def _sides(basins: Int64[np.ndarray, "H W"], levels: UInt8[np.ndarray, "H W"], count: int) -> Sides:
    """Box and size of each basin's pixels above each level."""
    cell = basins * 256 + levels
    where = np.indices(basins.shape, np.int16)
    y, x = where[0], where[1]
    sides = []
    # Where an index is repeated, numpy keeps the last value: the pixels come so that it is the outermost one.
    for values, at, start, running in (
        (x.T[::-1], cell.T[::-1], FAR, np.minimum.accumulate),
        (y[::-1], cell[::-1], FAR, np.minimum.accumulate),
        (x.T + 1, cell.T, 0, np.maximum.accumulate),
        (y + 1, cell, 0, np.maximum.accumulate),
    ):
        table = np.full(count * 256, start, np.int16)
        table[at.ravel()] = values.ravel()
        sides.append(_above(running(table.reshape(count, 256)[:, ::-1], axis=1)))
    sizes = np.bincount(cell.ravel(), minlength=count * 256).astype(np.int32).reshape(count, 256)
    return (*sides, _above(np.cumsum(sizes[:, ::-1], axis=1, dtype=np.int32)))


def _above(falling: np.ndarray) -> np.ndarray:
    """Return, of values accumulated from level 255 down, those of the levels above 0, 1, ..., 254."""
    return falling[:, ::-1][:, 1:]


def _merge(
    passes: list[tuple[int, int, int]], peaks: Int64[np.ndarray, "n"], sides: Sides
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Sides]:
    """The nodes of the tree: basins, and at each pass that connects two components their union.

    Returns, of each node, the levels [low, high) at which it is a component of its own, whether it is
    connected to the frame, and its `sides`.
    """
    count = len(peaks)
    rows = [list(side) for side in sides]
    lows, highs, outside = [0] * count, peaks.tolist(), [True] + [False] * (count - 1)
    parent, node = list(range(count)), list(range(count))

    def find(basin: int) -> int:
        while parent[basin] != basin:
            parent[basin] = parent[parent[basin]]
            basin = parent[basin]
        return basin

    for level, first, second in passes:
        a, b = find(first), find(second)
        if a == b:
            continue
        left, right = node[a], node[b]
        lows[left] = lows[right] = level
        for side, join in zip(rows, (np.minimum, np.minimum, np.maximum, np.maximum, np.add), strict=True):
            side.append(join(side[left], side[right]))
        lows.append(0)
        highs.append(level)
        outside.append(outside[left] or outside[right])
        parent[b], node[a] = a, len(lows) - 1
    joined = tuple(np.array(side) for side in rows)
    return np.array(lows), np.array(highs), np.array(outside), joined
