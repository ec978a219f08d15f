"""Finished sheets of what encoders make of images: `*_sheet` to draw later, `*_panel` as pixels.

Every function takes one encoder or several by name; several become columns side by side.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from foveola.config import UserError
from foveola.data.sample import Sample
from foveola.data.values import ImagePixels
from foveola.drawing.overlays import heat_bar, magnify, outline, paint_heads
from foveola.drawing.sheet import Pixels, Row, Sheet
from foveola.figures.dense import patch_map
from foveola.figures.dictionary import Dictionary, dictionary_rgb
from foveola.figures.maps import (
    MASS,
    received_attention,
    strongest,
    token_attention,
)
from foveola.figures.nearest import neighbour_panel, neighbour_sheet
from foveola.figures.pca import Basis, pca_images
from foveola.figures.points import correspondence_sheet, query_sheet, similarity_panel, similarity_sheet
from foveola.figures.positions import position_panel, position_sheet
from foveola.figures.tiles import (
    LIGHT,
    MIN_COVERAGE,
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
    patches_of_object,
    row_of,
    shown_size,
)
from foveola.models.encoder import Encoder

__all__ = [
    "attention_panel",
    "attention_sheet",
    "correspondence_sheet",
    "dictionary_panel",
    "dictionary_sheet",
    "neighbour_panel",
    "neighbour_sheet",
    "objects_sheet",
    "pca_panel",
    "pca_sheet",
    "position_panel",
    "position_sheet",
    "query_sheet",
    "similarity_panel",
    "similarity_sheet",
]

FITTED = 65536  # patches that a dictionary is fitted to


# -- PCA -----------------------------------------------------------------------------------------------------


def pca_sheet(
    encoders: Encoders,
    samples: Sequence[Sample],
    size: int | None = None,
    joint: bool = False,
    foreground: bool = False,
    basis: Basis | None = None,
    tile: int | None = None,
) -> Sheet:
    """Return images, and the first three principal components of their patches as red, green and blue.

    `size` is in pixels of the longer side; None = twice that of each encoder's transform. The others are
    those of `pca_images`.
    """
    images, names = images_of(samples), encoders_by_name(encoders)
    columns = [[as_encoded(next(iter(names.values())), image, size) for image in images]]
    for encoder in names.values():
        drawn = pca_images(encoder, images, joint, shown_size(encoder, size), foreground, basis, tile)
        sizes = [as_encoded(encoder, image, size).shape[:2] for image in images]
        columns.append([magnify(plane, *shape) for plane, shape in zip(drawn, sizes, strict=True)])
    rows = [Row("", tiles) for tiles in zip(*columns, strict=True)]
    how = "one basis for all images" if joint or basis is not None else "a basis for each image"
    note = f"Red, green, blue: the first three principal components of the patch features, {how}."
    return Sheet("Patch features as colours", ["image", *(n or "features" for n in names)], rows, note)


def pca_panel(encoders: Encoders, samples: Sequence[Sample], **settings: Any) -> Pixels:
    """Return `pca_sheet`, drawn."""
    return pca_sheet(encoders, samples, **settings).draw(TILE_SIDE)


def dictionary_sheet(
    encoders: Encoders,
    samples: Sequence[Sample],
    size: int | None = None,
    components: int = 6,
    alpha: float = 1.0,
    joint: bool = False,
    tile: int | None = None,
) -> Sheet:
    """Return images, and a colour for each atom of a dictionary of their patch features, where it is used."""
    images, names = images_of(samples), encoders_by_name(encoders)
    columns = [[as_encoded(next(iter(names.values())), image, size) for image in images]]
    for encoder in names.values():
        maps = [patch_map(encoder, image, shown_size(encoder, size), tile) for image in images]
        groups = [maps] if joint else [[features] for features in maps]
        drawn = [plane for group in groups for plane in _dictionary_planes(group, components, alpha)]
        sizes = [as_encoded(encoder, image, size).shape[:2] for image in images]
        columns.append([magnify(plane, *shape) for plane, shape in zip(drawn, sizes, strict=True)])
    rows = [Row("", tiles) for tiles in zip(*columns, strict=True)]
    how = "one dictionary for all images" if joint else "a dictionary for each image"
    note = f"Each colour is one of {components} directions of the patch features, {how}; black: none."
    return Sheet("Dictionary of patch features", ["image", *(n or "atoms" for n in names)], rows, note)


def dictionary_panel(encoders: Encoders, samples: Sequence[Sample], **settings: Any) -> Pixels:
    """Return `dictionary_sheet`, drawn."""
    return dictionary_sheet(encoders, samples, **settings).draw(TILE_SIDE)


def _dictionary_planes(maps: Sequence[np.ndarray], components: int, alpha: float) -> list[Pixels]:
    """The colours of maps that share a dictionary, fitted to evenly spaced patches where there are many."""
    rows = np.concatenate([features.reshape(-1, features.shape[-1]) for features in maps])
    dictionary = Dictionary.fit(rows[:: -(-len(rows) // FITTED)], components, alpha)
    codes = [dictionary.codes(features) for features in maps]
    largest = max(float(np.abs(code).max()) for code in codes)
    return [np.rint(255 * dictionary_rgb(code, largest)).astype(np.uint8) for code in codes]


# -- attention of tokens -------------------------------------------------------------------------------------


def attention_sheet(
    encoders: Encoders,
    samples: Sequence[Sample],
    size: int | None = None,
    block: int = -1,
    mass: float = MASS,
    heads: bool = False,
    min_coverage: float = MIN_COVERAGE,
) -> Sheet:
    """Return what the class token reads, with and without the mask of the largest object; and its heads.

    Of an encoder without class token: what all patches read on average. `heads`: a column for each head.
    """
    images, names = images_of(samples), encoders_by_name(encoders)
    masks = any(sample.objects is not None for sample in samples)
    first = next(iter(names.values()))
    columns: list[str] = ["image"]
    rows: list[list[Tile]] = [[(as_encoded(first, image, size), "")] for image in images]
    for name, encoder in names.items():
        token = encoder.config.model.class_token
        columns.append(head_of(name, "class token" if token else "read by all patches"))
        if masks and token:
            columns.append(head_of(name, "token in mask"))
        columns.append(head_of(name, f"heads, {round(100 * mass)} %"))
        if heads:
            columns += [head_of(name, f"head {i + 1}") for i in range(encoder.config.model.shape[2])]
        for row, sample, image in zip(rows, samples, images, strict=True):
            inside = min_coverage if masks and token else None
            row += _attention_tiles(encoder, sample, image, inside, (size, block, mass, heads))
    return Sheet("Attention", columns, [row_of(tiles) for tiles in rows], LIGHT, heat_bar())


def attention_panel(encoders: Encoders, samples: Sequence[Sample], **settings: Any) -> Pixels:
    """Return `attention_sheet`, drawn."""
    return attention_sheet(encoders, samples, **settings).draw(TILE_SIDE)


def _attention_tiles(
    encoder: Encoder,
    sample: Sample,
    image: ImagePixels,
    min_coverage: float | None,
    how: tuple[int | None, int, float, bool],
) -> list[Tile]:
    """Tiles of one image; with `min_coverage` also of the token that reads its largest object alone."""
    size, block, mass, heads = how
    images, base = encoded(encoder, image, size), as_encoded(encoder, image, size)
    if encoder.config.model.class_token:
        weights = token_attention(encoder, images, None, block)[0, 0]
    else:
        weights = received_attention(encoder, images, block)[0]
    tiles = [light(base, weights.mean(dim=0))]
    if min_coverage is not None:
        grid = grid_of(encoder, image, size)
        patches = torch.ones(grid[0] * grid[1], dtype=torch.bool)
        if sample.objects is not None:
            patches = patches_of_object(sample, int(sample.objects.areas.argmax()), grid, min_coverage)
        inside = token_attention(encoder, images, patches[None, None].to(images.device), block)[0, 0]
        lit, peak = light(base, inside.mean(dim=0))
        tiles.append((outline(lit, patches.view(grid).numpy()), peak))
    strong = strongest(weights, mass)
    fraction = f"{100 * strong.float().mean():.0f} % of patches each"
    tiles.append((paint_heads(base, weights.cpu().numpy(), strong.cpu().numpy()), fraction))
    return tiles + ([light(base, head) for head in weights] if heads else [])


def objects_sheet(
    encoders: Encoders,
    samples: Sequence[Sample],
    size: int | None = None,
    block: int = -1,
    each: int = 3,
    min_coverage: float = MIN_COVERAGE,
) -> Sheet:
    """Draw the largest objects of each image, and what each head of the object token reads inside the
    mask.
    """
    images, names = images_of(samples), encoders_by_name(encoders)
    if not any(sample.objects is not None for sample in samples):
        raise UserError("objects: these images have neither boxes nor masks; see kind attention")
    first = next(iter(names.values()))
    columns, rows = ["object"], []
    for name, encoder in names.items():
        columns += [head_of(name, "all heads")]
        columns += [head_of(name, f"head {i + 1}") for i in range(encoder.config.model.shape[2])]
    for sample, image in zip(samples, images, strict=True):
        if sample.objects is None:
            continue
        for index in np.argsort(-sample.objects.areas, kind="stable")[:each].tolist():
            grid = grid_of(first, image, size)
            own = patches_of_object(sample, index, grid, min_coverage).view(grid).numpy()
            tiles: list[Tile] = [(outline(as_encoded(first, image, size), own), "")]
            for encoder in names.values():
                grid = grid_of(encoder, image, size)
                patches = patches_of_object(sample, index, grid, min_coverage)
                inputs, base = encoded(encoder, image, size), as_encoded(encoder, image, size)
                weights = token_attention(encoder, inputs, patches[None, None].to(inputs.device), block)[0, 0]
                tiles += [light(base, one) for one in (weights.mean(dim=0), *weights)]
            rows.append(row_of(tiles))
    return Sheet("Object tokens: attention inside the mask", columns, rows, LIGHT, heat_bar())
