"""Sheets of nearest neighbours: queries, and what an encoder finds most alike, with and without masks."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import normalize

from foveola.config import UserError
from foveola.data.identity import identity_of
from foveola.data.sample import BadImage
from foveola.data.shown import ShownAs, rgb_of, shown_alike
from foveola.data.sources import Source
from foveola.drawing.overlays import outline
from foveola.drawing.sheet import Pixels, Row, Sheet
from foveola.evaluation.features.table import (
    ExtractConfig,
    FeatureTable,
    RowsCut,
    extract_tables,
    mask_modes,
    object_tokens,
)
from foveola.evaluation.images import choose_images, identity_for
from foveola.figures.tiles import FULL, TILE_SIDE, Encoders, encoders_by_name, head_of
from foveola.models.encoder import Encoder
from foveola.models.transform import resize

REFERENCE_LIMIT = 2000  # images of the reference set, where nobody says how many


@dataclasses.dataclass(frozen=True, eq=False)
class _Query:
    """One row of features: the image as it is encoded, and what its object token reads."""

    pixels: Tensor
    mask: Bool[Tensor, "N"]
    has_mask: bool
    label: int
    right: frozenset[int]  # labels that count as right: several where a set says so (ReaL)
    content: bytes  # of its file, by which it is known in the reference set


def neighbour_sheet(
    encoders: Encoders,
    references: Source,
    queries: Source,
    chosen: Sequence[int],
    found: int = 5,
    masks: Literal["both"] | bool = "both",
    config: ExtractConfig | None = None,
    progress: bool = False,
) -> Sheet:
    """Return images of `queries` and the `found` rows of `references` whose features have the highest cosine
    with them.

    Args:
        chosen: indices of query images; of rows="objects" the largest object of each is the query.
        masks: class tokens of whole images (False), object tokens that read the objects (True), or both,
            one row each; without annotated objects only the former.
        config: which rows and how they are encoded; by default 2,000 reference images, one row each.

    Green frames have the query's label (or another right answer of it), red ones another. The query's own
    image is never found. Tiles are what the network saw. Raises UserError as
    `evaluation.features.table.extract`.
    """
    config = config or ExtractConfig(limit=REFERENCE_LIMIT)
    contents = identity_for(references, config).contents
    chosen_of = choose_images(len(references), config.limit, config.seed)
    rows = []
    names = encoders_by_name(encoders)
    least = next((e for e in names.values() if e.wrapped), next(iter(names.values())))
    modes, notes = mask_modes(masks, references, queries, least, config.pool)
    tables = {n: extract_tables(e, references, modes, config, progress=progress)[0] for n, e in names.items()}
    for image in chosen:
        for name, encoder in names.items():
            encoder = encoder.pooled(config.pool)
            query = _query(encoder, queries, int(image), config)
            for masked, table in zip(modes, tables[name], strict=True):
                own = contents[np.searchsorted(chosen_of, table.image_indices.numpy())] == query.content
                near = _nearest(encoder, query, masked, table, found, torch.from_numpy(own), config)
                what = ("with mask" if masked else "without mask") if len(modes) > 1 else ""
                rows.append(
                    _row(
                        encoder,
                        (references, queries),
                        query,
                        table,
                        near,
                        masked,
                        head_of(name, what),
                        config,
                    )
                )
    columns = ["query", *(f"nearest {i + 1}" for i in range(found))]
    return Sheet("Nearest neighbours by cosine of features", columns, rows, "\n".join(notes))


def neighbour_panel(
    encoders: Encoders, references: Source, queries: Source, chosen: Sequence[int], **settings: Any
) -> Pixels:
    """Return `neighbour_sheet`, drawn."""
    return neighbour_sheet(encoders, references, queries, chosen, **settings).draw(TILE_SIDE)


def _query(encoder: Encoder, source: Source, image: int, config: ExtractConfig) -> _Query:
    try:
        sample = source[image]
        rows = RowsCut(encoder.config.transform, encoder.patch_size, config)(sample, image)
    except BadImage as error:
        raise UserError(f"{source.name}, image {image}: {error}") from error
    row = int(rows.masks.sum(dim=1).argmax())
    if sample.objects is not None and rows.objects[0] >= 0:
        row = int(np.argmax(sample.objects.areas))
    label = int(rows.labels[row])
    answers = getattr(source, "answers", None) if config.rows == "images" else None
    return _Query(
        rows.images[rows.image_of[row]],
        rows.masks[row],
        bool(rows.has_mask[row]),
        label,
        frozenset([label] if answers is None else map(int, answers(image))),
        bytes(identity_of(source, np.array([image])).contents[0]),
    )


def _nearest(
    encoder: Encoder,
    query: _Query,
    masked: bool,
    table: FeatureTable,
    found: int,
    own: Bool[Tensor, "R"],
    config: ExtractConfig,
) -> list[int]:
    """Rows of the table, nearest first, without the query's `own`."""
    pixels = encoder.normalise(query.pixels[None].to(encoder.device))
    feature = object_tokens(encoder, pixels, query.mask[None] if masked else None, config.precision)
    cosines = (normalize(table.features, dim=1) @ normalize(feature, dim=1).T)[:, 0]
    cosines = cosines.masked_fill(own, -torch.inf)
    order = cosines.argsort(descending=True, stable=True)[:found]
    return order[cosines[order] > -torch.inf].tolist()


def _row(
    encoder: Encoder,
    sources: tuple[Source, Source],
    query: _Query,
    table: FeatureTable,
    near: list[int],
    masked: bool,
    title: str,
    config: ExtractConfig,
) -> Row:
    references, queries = sources
    cut = RowsCut(encoder.config.transform, encoder.patch_size, config)
    grid, (shown, shown_query) = encoder.grid, shown_alike(references, queries)
    with_mask = masked and query.has_mask
    tiles = [_tile(query.pixels, query.mask if with_mask else None, grid, shown_query)]
    captions = [_name(queries, query.label)]
    right: list[bool | None] = [None]
    for row in near:
        image, number = int(table.image_indices[row]), int(table.objects[row])
        rows = cut(references[image], image)
        own = int((rows.objects == number).nonzero()[0])
        with_mask = masked and bool(rows.has_mask[own])
        mask = rows.masks[own] if with_mask else None
        tiles.append(_tile(rows.images[rows.image_of[own]], mask, grid, shown))
        label = int(table.labels[row])
        captions.append(_name(references, label))
        known = label >= 0 and query.label >= 0 and references.classes == queries.classes
        right.append(label in query.right if known else None)
    return Row(title, tiles, captions, right)


def _tile(
    pixels: Tensor, mask: Bool[Tensor, "N"] | None, grid: tuple[int, int], shown: ShownAs | None
) -> Pixels:
    image = pixels.permute(1, 2, 0).contiguous().numpy()
    times = max(-(-FULL // len(image)), 1)
    image = resize(image, times * len(image), times * image.shape[1]).permute(1, 2, 0).numpy()
    image = rgb_of(image, shown)
    return image if mask is None else outline(image, mask.view(grid).numpy())


def _name(source: Source, label: int) -> str:
    return source.classes[label] if source.classes is not None and label >= 0 else ""
