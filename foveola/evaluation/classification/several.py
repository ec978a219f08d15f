"""Numbers of images that may have several classes: average precision of each class, and their mean."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

RESAMPLES = 200  # of the bootstrap: each sums over all images and classes


def average_precisions(
    scores: Float[Tensor, "n C"], right: Bool[Tensor, "n C"], weights: Float64[np.ndarray, "n"] | None = None
) -> Float64[np.ndarray, "C"]:
    """Return, for each class, the mean of the precision at each image that has it, best scores first.

    Images of one score count together, so that their order does not matter: the sum over different scores of
    the gain in recall times the precision there. NaN for a class that no image has. `weights` say how often
    each image counts.
    """
    values, truth = scores.double().numpy(), right.numpy()
    counted = np.ones(len(values)) if weights is None else weights
    found = np.full(values.shape[1], np.nan)
    for c in range(values.shape[1]):
        order = np.argsort(-values[:, c], kind="stable")
        ranked, hit = values[order, c], truth[order, c] * counted[order]
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        hits, all_ = hit.cumsum()[ends], counted[order].cumsum()[ends]
        if hits[-1]:
            precision = np.divide(hits, all_, out=np.zeros_like(hits), where=all_ > 0)
            found[c] = (np.diff(hits, prepend=0) * precision).sum() / hits[-1]
    return found


def mean_average_precision(
    scores: Float[Tensor, "n C"], right: Bool[Tensor, "n C"], seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean over the classes that any image has, and its 95 % bootstrap interval over images.

    In a sample of images a class that none of them has is left out. Raises ValueError where no image has a
    class.
    """
    if not bool(right.any()):
        raise ValueError("no image has a class")
    rng, count = np.random.default_rng(seed), len(scores)
    drawn = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)
        each = average_precisions(scores, right, times)
        if not np.isnan(each).all():
            drawn.append(np.nanmean(each))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.nanmean(average_precisions(scores, right))), float(low), float(high)


def in_classes(
    table: Bool[Tensor, "n K"], names: tuple[str, ...], wanted: tuple[str, ...]
) -> Bool[Tensor, "n C"]:
    """Return which of the `wanted` classes each image has, from a table of those of `names`."""
    index_of = {name: i for i, name in enumerate(names)}
    empty = torch.zeros(len(table), dtype=torch.bool)
    return torch.stack([table[:, index_of[name]] if name in index_of else empty for name in wanted], dim=1)
