"""What a task draws while it trains: views of the last step, the truth, and what the head says of them."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from foveola.data.shown import drawn_rgb
from foveola.drawing.boxes import DrawnObjects, paint_objects
from foveola.drawing.classes import paint_classes, palette
from foveola.drawing.sheet import Pixels
from foveola.tasks.task import Detections

VIEWS_DRAWN = 4  # of a step that are kept to be looked at
SHOWN_FROM = 0.5  # score from which a detection is drawn
GAP = 2  # white pixels around a tile


def view_images(
    views: Float[Tensor, "V C H W"], mean: Sequence[float], std: Sequence[float]
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Return normalised views as images."""
    middle, spread = (torch.tensor(each, device=views.device)[:, None, None] for each in (mean, std))
    whole = drawn_rgb(views.float() * spread + middle)
    return list(whole.permute(0, 2, 3, 1).cpu().numpy())


def label_maps_figure(
    images: Sequence[Pixels], truth: UInt8[Tensor, "V H W"], predicted: UInt8[Tensor, "V H W"], classes: int
) -> Pixels:
    """Return a column for each view: as it is, its labels, and the prediction; without a label is black.

    The prediction is drawn only where there is a label.
    """
    colors = palette(classes)
    predicted = torch.where(truth < classes, predicted, truth)
    maps = [list(each.cpu().numpy()) for each in (truth, predicted)]
    painted = [[paint_classes(*pair, colors) for pair in zip(images, each, strict=True)] for each in maps]
    return mosaic([images, *painted])


def detections_figure(
    images: Sequence[Pixels], truth: Sequence[DrawnObjects], found: Sequence[DrawnObjects]
) -> Pixels:
    """Return a column for each view: with its objects, and with what was found."""
    rows = [[paint_objects(*pair) for pair in zip(images, each, strict=True)] for each in (truth, found)]
    return mosaic(rows)


def drawn_detections(
    found: Detections, view: tuple[int, int] | None = None, score: float = SHOWN_FROM
) -> DrawnObjects:
    """Return detections from a score on as they are drawn: on their image, or on a view of so many rows and
    columns in whose upper left it lies.
    """
    kept = (found.scores >= score).nonzero()[:, 0].tolist()
    masks = None
    if found.masks is not None:
        height, width = view or found.masks.shape[1:]
        beyond = (0, width - found.masks.shape[2], 0, height - found.masks.shape[1])
        masks = [pad(found.masks[k], beyond).numpy() for k in kept]
    names = tuple(found.names[found.labels[k]] for k in kept)
    texts = tuple(f"{name} {found.scores[k]:.2f}" for k, name in zip(kept, names, strict=True))
    return DrawnObjects(found.boxes[kept].double().numpy(), names, masks, texts)


def mosaic(rows: Sequence[Sequence[Pixels]]) -> Pixels:
    """Return images of one size in rows and columns, with white between them."""
    edges = ((GAP, GAP), (GAP, GAP), (0, 0))
    lines = [np.hstack([np.pad(tile, edges, constant_values=255) for tile in row]) for row in rows]
    return np.vstack(lines)
