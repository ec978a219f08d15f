"""Sheets about single patches: what one reads, what is like it, and pairs that find each other."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from foveola.data.sample import Sample
from foveola.data.values import ImagePixels
from foveola.drawing.overlays import cool_to_warm, cosine_bar, heat_bar, link, magnify, mark
from foveola.drawing.sheet import Pixels, Row, Sheet
from foveola.figures.dense import patch_map
from foveola.figures.maps import centre_of, correspondences, query_attention, similarity
from foveola.figures.tiles import (
    LIGHT,
    TILE_SIDE,
    Encoders,
    Tile,
    as_encoded,
    encoded,
    encoders_by_name,
    grid_of,
    head_of,
    images_of,
    light,
    row_of,
    shown_size,
)
from foveola.models.encoder import Encoder

Point = tuple[float, float]
MIDDLE = ((0.5, 0.5),)


def query_sheet(
    encoders: Encoders,
    samples: Sequence[Sample],
    points: Sequence[Point] = MIDDLE,
    size: int | None = None,
    block: int = -1,
    heads: bool = False,
) -> Sheet:
    """Return what the patch under a red dot reads, averaged over heads; with `heads` also of each head."""
    columns, names = ["image"], encoders_by_name(encoders)
    for name, encoder in names.items():
        columns.append(head_of(name, "all heads"))
        if heads:
            columns += [head_of(name, f"head {i + 1}") for i in range(encoder.config.model.shape[2])]

    def tiles(encoder: Encoder, image: ImagePixels, point: Point) -> list[Tile]:
        images, base = encoded(encoder, image, size), as_encoded(encoder, image, size)
        weights = query_attention(encoder, images, torch.tensor([point]), block)[0]
        maps = (weights.mean(dim=0), *(weights if heads else ()))
        lit = [light(base, one) for one in maps]
        return [(mark(tile, centre_of(point, maps[0].shape)), peak) for tile, peak in lit]

    rows = _rows_of_points(names, samples, points, size, tiles)
    return Sheet("What the patch under the dot reads", columns, rows, LIGHT, heat_bar())


def similarity_sheet(
    encoders: Encoders,
    samples: Sequence[Sample],
    points: Sequence[Point] = MIDDLE,
    size: int | None = None,
    tile: int | None = None,
) -> Sheet:
    """Return the cosine of the features of all patches with those of the patch under a red dot."""
    names = encoders_by_name(encoders)

    def tiles(encoder: Encoder, image: ImagePixels, point: Point) -> list[Tile]:
        features = patch_map(encoder, image, shown_size(encoder, size), tile)
        height, width = as_encoded(encoder, image, size).shape[:2]
        cosines = similarity(features, point)
        low = float(cosines.min())
        colors = magnify(cool_to_warm(cosines, low, 1.0), height, width)
        return [(mark(colors, centre_of(point, cosines.shape)), f"{low:.2f} to 1")]

    rows = _rows_of_points(names, samples, points, size, tiles)
    note = "Cosine similarity of patch features, from the lowest of the tile (blue) to 1 (red)."
    columns = ["image", *(n or "cosine" for n in names)]
    return Sheet("Like the patch under the dot", columns, rows, note, cosine_bar())


def similarity_panel(encoders: Encoders, samples: Sequence[Sample], **settings: Any) -> Pixels:
    """Return `similarity_sheet`, drawn."""
    return similarity_sheet(encoders, samples, **settings).draw(TILE_SIDE)


def _rows_of_points(
    names: dict[str, Encoder],
    samples: Sequence[Sample],
    points: Sequence[Point],
    size: int | None,
    tiles: Callable[[Encoder, Pixels, Point], list[Tile]],
) -> list[Row]:
    """A row for each point of each image, which starts with the image and its dot."""
    first, rows = next(iter(names.values())), []
    for image in images_of(samples):
        for point in points:
            dot = centre_of(point, grid_of(first, image, size))
            row: list[Tile] = [(mark(as_encoded(first, image, size), dot), "")]
            for encoder in names.values():
                row += tiles(encoder, image, point)
            rows.append(row_of(row))
    return rows


def correspondence_sheet(
    encoders: Encoders,
    pairs: Sequence[tuple[Sample, Sample]],
    size: int | None = None,
    count: int = 12,
    tile: int | None = None,
) -> Sheet:
    """Return pairs of images with lines between the patches that are each other's nearest, the best
    `count`.
    """
    names, rows = encoders_by_name(encoders), []
    for pair in pairs:
        images, tiles = images_of(pair), []
        for encoder in names.values():
            maps = [patch_map(encoder, image, shown_size(encoder, size), tile) for image in images]
            found = correspondences(maps[0], maps[1], count)
            bases = [as_encoded(encoder, image, size) for image in images]
            centres = [
                (positions[:, ::-1] + 0.5) / (features.shape[1], features.shape[0])
                for positions, features in zip(found[:2], maps, strict=True)
            ]
            tiles.append(link(bases[0], bases[1], centres[0], centres[1]))
        rows.append(Row("", tiles))
    return Sheet("Patches that find each other", [n or "pairs" for n in names], rows)
