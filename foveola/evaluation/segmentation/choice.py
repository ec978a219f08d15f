"""What segmentation protocols choose their settings on: held-out images, alike in their classes; and ties."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from foveola.config import UserError
from foveola.evaluation.classification.task import held_out

LABELS_AT_ONCE = 2**22  # labels looked at: 32 MiB


def hold_out(
    image_indices: Int64[Tensor, "R"], labels: UInt8[Tensor, "R Q"], classes: int, fraction: float, seed: int
) -> Bool[Tensor, "R"]:
    """Return which rows belong to the held-out images: a fraction of them, at least one, drawn by seed.

    Each image counts for the rarest class among its labels (that of the fewest images; the smallest of
    equals; images without a class are a group of their own). Each group gives its part and keeps one image,
    as classes do for classification probes. Where groups have too few images for that, images are drawn
    without regard to groups.
    """
    names, which = image_indices.unique(return_inverse=True)
    if len(names) < 2:
        raise UserError("train needs at least two images: some are held out to choose settings")
    every = torch.arange(len(names))
    shown = _shown(which, labels, len(names), classes)
    for groups in (_rarest(shown), torch.zeros_like(every)):
        _, held = held_out(every, fraction, seed, groups)
        if len(held) >= max(1, int(fraction * len(names))):
            break
    return torch.isin(which, held)


def _shown(
    which: Int64[Tensor, "R"], labels: UInt8[Tensor, "R Q"], images: int, classes: int
) -> Bool[Tensor, "P C"]:
    """Whether each image has a label of each class."""
    shown = torch.zeros(images * (classes + 1), dtype=torch.bool)
    rows = max(1, LABELS_AT_ONCE // labels.shape[1])
    for image, part in zip(which.split(rows), labels.split(rows), strict=True):
        shown[image[:, None] * (classes + 1) + part.long().clamp_(max=classes)] = True
    return shown.view(images, classes + 1)[:, :classes]


def _rarest(shown: Bool[Tensor, "P C"]) -> Int64[Tensor, "P"]:
    """The class of each image that the fewest images show; C for an image without a class."""
    images, classes = shown.shape
    counts = torch.where(shown, shown.sum(dim=0), images + 1)
    return torch.where(shown.any(dim=1), counts.argmin(dim=1), classes)


def choose_setting(scores: Sequence[float], losses: Callable[[], Sequence[float]]) -> int:
    """Return the setting of the highest score on the hold-out; of equals that of the lowest loss there, the
    first.

    Scores may be NaN (nothing to score), but not all; a loss that is no number is the highest.
    """
    best = np.flatnonzero(np.array(scores) == np.nanmax(scores))
    if len(best) == 1:
        return int(best[0])
    return int(best[np.nan_to_num(np.array(losses())[best], nan=np.inf).argmin()])
