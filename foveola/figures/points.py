"""Sheets about single patches: what one reads, what is like it, and pairs that find each other."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from foveola.data.sample import Sample
from foveola.drawing.overlays import cool_to_warm, cosine_bar, heat_bar, link, magnify, mark
from foveola.drawing.sheet import Pixels, Row, Sheet
from foveola.figures.dense import patch_map
from foveola.figures.maps import centre_of, correspondences, query_attention, similarity
from foveola.figures.tiles import (
    LIGHT,
    TILE,
    Encoders,
    Tile,
    encoded,
    grid_of,
    head_of,
    images_of,
    light,
    named,
    row_of,
    shown,
    size_of,
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
    """What the patch under a red dot reads, averaged over heads; with `heads` also of each head."""
    columns, names = ["image"], named(encoders)
    for name, encoder in names.items():
        columns.append(head_of(name, "all heads"))
        if heads:
            columns += [head_of(name, f"head {i + 1}") for i in range(encoder.config.model.shape[2])]

    def tiles(encoder: Encoder, image: Pixels, point: Point) -> list[Tile]:
        images, base = encoded(encoder, image, size), shown(encoder, image, size)
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
    """Cosine of the features of all patches with those of the patch under a red dot."""
    names = named(encoders)

    def tiles(encoder: Encoder, image: Pixels, point: Point) -> list[Tile]:
        features = patch_map(encoder, image, size_of(encoder, size), tile)
        height, width = shown(encoder, image, size).shape[:2]
        cosines = similarity(features, point)
        low = float(cosines.min())
        colors = magnify(cool_to_warm(cosines, low, 1.0), height, width)
        return [(mark(colors, centre_of(point, cosines.shape)), f"{low:.2f} to 1")]

    rows = _rows_of_points(names, samples, points, size, tiles)
    note = "Cosine similarity of patch features, from the lowest of the tile (blue) to 1 (red)."
    columns = ["image", *(n or "cosine" for n in names)]
    return Sheet("Like the patch under the dot", columns, rows, note, cosine_bar())


def similarity_panel(encoders: Encoders, samples: Sequence[Sample], **settings: Any) -> Pixels:
    """`similarity_sheet`, drawn."""
    return similarity_sheet(encoders, samples, **settings).draw(TILE)


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
            row: list[Tile] = [(mark(shown(first, image, size), dot), "")]
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
    """Pairs of images with lines between the patches that are each other's nearest, the best `count`."""
    names, rows = named(encoders), []
    for pair in pairs:
        images, tiles = images_of(pair), []
        for encoder in names.values():
            maps = [patch_map(encoder, image, size_of(encoder, size), tile) for image in images]
            found = correspondences(maps[0], maps[1], count)
            bases = [shown(encoder, image, size) for image in images]
            centres = [
                (places[:, ::-1] + 0.5) / (features.shape[1], features.shape[0])
                for places, features in zip(found[:2], maps, strict=True)
            ]
            tiles.append(link(bases[0], bases[1], centres[0], centres[1]))
        rows.append(Row("", tiles))
    return Sheet("Patches that find each other", [n or "pairs" for n in names], rows)
