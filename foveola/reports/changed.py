"""Neighbours before and after training, of the test images whose neighbours changed most."""

import numpy as np

from foveola.data.sources import Source
from foveola.drawing.sheet import Row, Sheet
from foveola.evaluation.features.table import ExtractConfig, extract
from foveola.figures.maps import neighbours
from foveola.figures.nearest import neighbour_sheet
from foveola.models.encoder import Encoder

NEIGHBOURS_COUNTED = 10  # nearest neighbours of an image whose change is counted
CHANGED_SHOWN = 3  # neighbours that are shown of each network


def changed_sheet(
    start: Encoder, end: Encoder, reference: Source, queries: Source, count: int, config: ExtractConfig
) -> Sheet:
    """Return the `count` queries that share the fewest neighbours in `reference` before and after training.

    Each line has the query, its 3 nearest at the start, and its 3 nearest at the end. Raises UserError as
    `neighbour_sheet`.
    """
    masks = config.rows == "objects"
    chosen = largest_changes(start, end, reference, queries, count, config)
    both = neighbour_sheet(
        {"start": start, "end": end}, reference, queries, chosen, CHANGED_SHOWN, masks=masks, config=config
    )
    rows = [_beside(*pair) for pair in zip(both.rows[::2], both.rows[1::2], strict=True)]
    found = max((len(row.tiles) - 1) // 2 for row in rows) if rows else 0
    heads = [f"{when}: nearest {i + 1}" for when in ("start", "end") for i in range(found)]
    title = "Neighbours before and after, of the images whose neighbours changed most"
    return Sheet(title, ["query", *heads], rows, both.note)


def largest_changes(
    start: Encoder, end: Encoder, reference: Source, queries: Source, count: int, config: ExtractConfig
) -> list[int]:
    """Return the queries of whose 10 nearest neighbours in `reference` the fewest stayed, these first.

    Of an image with several objects the mean over these counts. Of equals those come first whose nearest
    neighbour became right or wrong, then the earlier ones.
    """
    near, right = [], []
    masks = config.rows == "objects"
    for encoder in (start, end):
        known, own = (
            extract(encoder, s, masks=masks, config=config, progress=False) for s in (reference, queries)
        )
        found = neighbours(own.features, known.features, min(NEIGHBOURS_COUNTED, len(known.features)))
        near.append(found.numpy())
        right.append((known.labels[found[:, 0]] == own.labels).numpy())
        images = own.image_indices.numpy()
    stayed = np.array([len(np.intersect1d(a, b)) for a, b in zip(*near, strict=True)])
    same = right[0] == right[1]
    numbers = np.unique(images)
    order = sorted(numbers.tolist(), key=lambda i: (stayed[images == i].mean(), same[images == i].mean(), i))
    return order[:count]


def _beside(first: Row, second: Row) -> Row:
    """One line of two with the same query: the query, what the first found, what the second found."""
    return Row(
        "",
        [*first.tiles, *second.tiles[1:]],
        [*first.captions, *second.captions[1:]],
        [*first.right, *second.right[1:]],
    )
