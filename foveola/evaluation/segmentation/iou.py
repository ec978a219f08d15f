"""Pure functions on label maps: areas per class, mean intersection over union, its confidence interval."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64, Integer
from torch import Tensor

from foveola.config import UserError
from foveola.data.segmentation import IGNORE
from foveola.evaluation.metrics import wilson
from foveola.evaluation.protocol import Metric

Absent = Literal["skip", "zero"]


def region_areas(
    predicted: Integer[Tensor, "*shape"], truth: Integer[Tensor, "*shape"], classes: int
) -> Int64[Tensor, "3 {classes}+1"]:
    """Return pixels of each class that are right, predicted, and true; the last column: predicted as no
    class.

    Pixels whose truth is IGNORE count nowhere. A prediction of IGNORE elsewhere is a miss of the true class.
    Sums over images of these areas are all that a mean IoU needs, so no pixel has to be kept. Raises
    ValueError for other labels that are no class.
    """
    counted = truth != IGNORE
    p, t = predicted[counted].long(), truth[counted].long()
    for labels in (t, p[p != IGNORE]):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels beyond the {classes} classes")
    p = torch.where(p == IGNORE, classes, p)
    columns = [x.bincount(minlength=classes + 1) for x in (t[t == p], p, t)]
    return torch.stack(columns).cpu()


def class_iou(areas: Integer[np.ndarray, "*batch 3 C"]) -> Float64[np.ndarray, "*batch C"]:
    """Return the intersection over union of each class, in [0, 1]; NaN for one that is neither true nor
    predicted.
    """
    both, predicted, true = (areas[..., i, :].astype(np.float64) for i in range(3))
    union = predicted + true - both
    return np.divide(both, union, out=np.full_like(both, np.nan), where=union > 0)


def mean_iou(
    areas: Integer[np.ndarray, "*batch 3 C1"], absent: Absent = "skip", void_class: bool = False
) -> Float64[np.ndarray, "*batch"]:
    """Return the mean over classes of the IoU of areas summed over a whole set, in percent. NaN where nothing
    counts.

    Args:
        absent: a class that is neither true nor predicted is left out ("skip": CAPI, scikit-learn), or counts
            as 0 ("zero": open-hummingbird).
        void_class: whether "no class", where it was predicted, is one more class, whose IoU is then 0 (what
            comes out of CAPI's code).
    """
    iou = class_iou(areas)
    named = iou[..., :-1]
    if absent == "zero":
        named = np.nan_to_num(named, nan=0.0)
    count = (~np.isnan(named)).sum(-1).astype(np.float64)
    if void_class:
        count += areas[..., 1, -1] > 0
    total = np.nansum(named, axis=-1)
    total, count = np.asarray(total), np.asarray(count)
    return np.asarray(100 * np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))


def bootstrap_iou(
    runs: Sequence[Int64[Tensor, "P 3 C1"]],
    absent: Absent = "skip",
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean IoU over P images (the mean of several runs on the
    same).

    Images are drawn with replacement, because pixels of one are not independent; a resample's areas are
    summed before the ratio is taken. In percent, deterministic in `seed`. Where every image is all right, or
    all wrong, a bootstrap says nothing: then it is Wilson's interval of as many rows.
    """
    means = _resampled(runs, absent, samples, seed)
    low, high = np.nanquantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    if low == high and low in (0.0, 100.0):
        low, high = (100 * end for end in wilson(low / 100, len(runs[0]), confidence))
    return float(low), float(high)


def paired_iou(
    a: Sequence[Int64[Tensor, "P 3 C1"]],
    b: Sequence[Int64[Tensor, "P 3 C1"]],
    absent: Absent = "skip",
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return (difference, low, high) in percent of the mean IoU of `b` less that of `a`, of the same P
    images.

    As `bootstrap_iou`; each resample draws the same images for both.
    """
    whole = [np.mean([mean_iou(run.sum(dim=0).numpy(), absent) for run in runs]) for runs in (a, b)]
    change = _resampled(b, absent, samples, seed) - _resampled(a, absent, samples, seed)
    low, high = np.nanquantile(change, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(whole[1] - whole[0]), float(low), float(high)


def _resampled(
    runs: Sequence[Int64[Tensor, "P 3 C1"]], absent: Absent, samples: int, seed: int
) -> Float64[np.ndarray, "{samples}"]:
    """The mean IoU of each resample of the images, by a seed alone."""
    images = len(runs[0])
    if not images:
        raise ValueError("a bootstrap of no images")
    rng = np.random.default_rng(seed)
    flat = [run.numpy().reshape(images, -1).astype(np.float64) for run in runs]
    means = np.empty(samples)
    for i in range(samples):
        times = np.bincount(rng.integers(images, size=images), minlength=images)
        sums = [np.rint(times @ run).astype(np.int64).reshape(3, -1) for run in flat]
        means[i] = np.mean([mean_iou(total, absent) for total in sums])
    return means


def named_iou(areas: Int64[Tensor, "P 3 C1"], classes: Sequence[str]) -> dict[str, float | None]:
    """Return IoU in percent by class name, of areas of P images; None for a class neither true nor
    predicted.
    """
    iou = class_iou(areas.sum(dim=0).numpy())[:-1]
    return {name: rounded(100 * float(value)) for name, value in zip(classes, iou, strict=True)}


def rounded(percent: float) -> float | None:
    """Round to three digits after the point; None for NaN, which JSON does not have."""
    return None if np.isnan(percent) else round(percent, 3)


def summary_metrics(label: str) -> tuple[Metric, ...]:
    """Return what `summary` measures, under a name for people."""
    return (
        Metric("miou", f"{label} mIoU", "higher", main=True),
        Metric("miou_capi", f"{label} mIoU (capi)", "higher"),
        Metric("pixel_accuracy", f"{label}: pixel accuracy", "higher"),
    )


def summary(areas: Int64[Tensor, "P 3 C1"], seed: int) -> dict[str, float]:
    """Return `miou` with its bootstrap interval, pixel accuracy, and `miou_capi` (`void_class`), all in
    percent.

    Raises UserError where no pixel counts.
    """
    total = areas.sum(dim=0).numpy()
    miou = float(mean_iou(total))
    if np.isnan(miou):
        raise UserError("no pixel of test has a class: nothing can be compared")
    low, high = bootstrap_iou([areas], seed=seed)
    return {
        "miou": miou,
        "miou_low": low,
        "miou_high": high,
        "miou_capi": float(mean_iou(total, void_class=True)),
        "pixel_accuracy": 100 * float(total[0].sum() / total[2].sum()),
    }
