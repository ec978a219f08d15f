"""Segmentation by frozen patch features, as in CAPI: k nearest patches, and logistic regression."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveola import distributed
from foveola.config import UserError, key
from foveola.data.segmentation import IGNORE
from foveola.evaluation.classification.logistic import LogisticModel, path, standardiser
from foveola.evaluation.features.cache import Feed
from foveola.evaluation.metrics import Outcome
from foveola.evaluation.paired import packed_areas
from foveola.evaluation.search import QUERY_BLOCK, Distance, nearest
from foveola.evaluation.segmentation.choice import choose, hold_out
from foveola.evaluation.segmentation.iou import mean_iou, named_iou, region_areas, rounded, summary
from foveola.evaluation.segmentation.reading import (
    DenseConfig,
    DensePass,
    PatchTable,
    collect,
    label_counts,
    patch_modes,
    patch_pixels,
    pixel_sources,
)
from foveola.models.encoder import Encoder

VOTES = 2**25  # votes in memory at a time: 64 MiB


# -- pure functions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scaler:
    """Mean and population standard deviation of each channel of some rows; a constant channel has 1."""

    mean: Float32[Tensor, "D"]
    std: Float32[Tensor, "D"]

    @classmethod
    def fit(cls, rows: Float[Tensor, "R D"]) -> "Scaler":
        """Statistics in float64."""
        return cls(*standardiser(rows))

    def __call__(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        return ((rows.float() - self.mean) / self.std).to(rows.dtype)


def transplant(
    pixels: UInt8[Tensor, "R Q"], indices: Int64[Tensor, "m k"], classes: int, void_votes: bool = False
) -> UInt8[Tensor, "m Q"]:
    """The label of each pixel of each query: the most frequent one there among its k neighbours' patches.

    A neighbour gives its whole patch of labels, pixel by pixel, at the same place. The smallest of equals
    wins. Pixels of no class do not vote, unless `void_votes` (CAPI's code); where nothing else was found, the
    result is IGNORE.
    """
    m, k = indices.shape
    if k == 1:
        return pixels[indices[:, 0]]
    out = torch.empty(m, pixels.shape[1], dtype=torch.uint8)
    rows = max(1, VOTES // (pixels.shape[1] * (classes + 1)))
    one = torch.ones((), dtype=torch.int16)
    for into, some in zip(out.split(rows), indices.split(rows), strict=True):
        labels = pixels[some].transpose(1, 2).long().clamp_(max=classes)  # [n, Q, k]
        votes = torch.zeros(len(some), pixels.shape[1], classes + 1, dtype=torch.int16)
        votes.scatter_add_(2, labels, one.expand(labels.shape))
        if not void_votes:
            votes[:, :, classes] = 0
        found, label = votes.max(dim=2)
        into.copy_(torch.where((found > 0) & (label < classes), label, IGNORE))
    return out


# -- protocols --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchSegmentationConfig(DenseConfig):
    """What both protocols share."""

    memory: int | None = key(
        None, "training patches at most, as many of each picture; null = all", at_least=1
    )
    standardise: bool = key(True, "divide by the training patches' standard deviation, after their mean")
    holdout: float = key(0.1, "share of the training pictures that choose the settings", above=0, below=1)


@dataclass(frozen=True)
class KnnSegmentationConfig(PatchSegmentationConfig):
    """Settings of `knn_segmentation`. Defaults: CAPI."""

    k: tuple[int, ...] = key((1, 3, 10, 30), "numbers of neighbours to try", at_least=1)
    distance: tuple[Distance, ...] = key(("l2", "cosine"), "distances to try: l2, cosine")
    void_votes: bool = key(False, "pixels of no class vote like a class, as in CAPI's code")

    def __post_init__(self) -> None:
        for name, values in (("k", self.k), ("distance", self.distance)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: needs different values, got {list(values)}")


@dataclass(frozen=True)
class LogisticSegmentationConfig(PatchSegmentationConfig):
    """Settings of `logistic_segmentation`. Defaults: CAPI."""

    c: tuple[float, ...] = key(
        tuple(float(10**e) for e in np.linspace(-6, 5, 8)),
        "inverse strengths of the L2 penalty to try, C sum(cross-entropy) + |W|^2 / 2",
        above=0,
    )
    max_iterations: int = key(1000, "iterations of L-BFGS for each C", at_least=1)
    tolerance: float = key(1e-6, "L-BFGS stops when no entry of the gradient is larger", above=0)
    arithmetic: Literal["float32", "float64"] = key("float32", "numbers in which L-BFGS computes")

    def __post_init__(self) -> None:
        if not self.c or len(set(self.c)) < len(self.c):
            raise ValueError(f"c: needs different values, got {list(self.c)}")


# Labels the pixels of patches, for each of the settings that it was made for.
Predict = Callable[[Float[Tensor, "m D"]], list[Tensor]]


class Learned(NamedTuple):
    """What was learned with each of some settings."""

    predict: Predict
    # Mean cross-entropy of each setting over patches, whose most frequent labels are given.
    losses: Callable[[Float[Tensor, "m D"], Int64[Tensor, "m"]], list[float]]


def run_knn(
    encoder: Encoder,
    train: Any,
    test: Any,
    config: KnnSegmentationConfig,
    progress: bool = True,
    feed: Feed | None = None,
) -> Outcome:
    """k-NN segmentation: every pixel gets the majority of its patch's nearest patches at the same place."""
    grid = [(distance, k) for distance in config.distance for k in config.k]

    def make(bank: PatchTable, modes: Tensor, settings: Sequence[Any], classes: int) -> Learned:
        most = max(k for _, k in settings)
        if most > len(bank.pictures):
            raise UserError(f"k={most} is more than the {len(bank.pictures)} patches of train with a class")

        def predict(queries: Tensor) -> list[Tensor]:
            found = {
                d: nearest(queries, bank.features, most, distance=d, device=encoder.device)[1]
                for d in dict.fromkeys(d for d, _ in settings)
            }
            return [transplant(bank.pixels, found[d][:, :k], classes, config.void_votes) for d, k in settings]

        return Learned(predict, lambda queries, labels: [0.0] * len(settings))  # votes have none

    def words(setting: Any) -> dict[str, Any]:
        return {"distance": setting[0], "k": setting[1]}

    return _run("knn_segmentation", encoder, (train, test), config, progress, feed, grid, make, words)


def run_logistic(
    encoder: Encoder,
    train: Any,
    test: Any,
    config: LogisticSegmentationConfig,
    progress: bool = True,
    feed: Feed | None = None,
) -> Outcome:
    """Logistic regression of the most frequent label of each patch, given to all of its pixels."""
    grid = sorted(config.c)

    def make(bank: PatchTable, modes: Tensor, settings: Sequence[Any], classes: int) -> Learned:
        models = path(
            bank.features,
            modes,
            classes,
            settings,
            max_iterations=config.max_iterations,
            tolerance=config.tolerance,
            progress=progress,
            device=encoder.device,
            dtype=getattr(torch, config.arithmetic),
        )
        pixels = bank.pixels.shape[1]

        def predict(queries: Tensor) -> list[Tensor]:
            best = [model.predict(queries) for model in models]  # never a class that train lacks
            return [some.to(torch.uint8)[:, None].expand(-1, pixels) for some in best]

        def losses(queries: Tensor, labels: Tensor) -> list[float]:
            known = torch.isin(labels, modes)  # of others the loss is infinite for all
            return [_cross_entropy(model, queries[known], labels[known]) for model in models]

        return Learned(predict, losses)

    name = "logistic_segmentation"
    return _run(name, encoder, (train, test), config, progress, feed, grid, make, lambda c: {"c": c})


def _run(
    name: str,
    encoder: Encoder,
    sources: tuple[Any, Any],
    config: PatchSegmentationConfig,
    progress: bool,
    feed: Feed | None,
    grid: Sequence[Any],
    make: Callable[[PatchTable, Tensor, Sequence[Any], int], Learned],
    words: Callable[[Any], dict[str, Any]],
) -> Outcome:
    """Choose a setting on held-out pictures, learn from all, measure on test."""
    train, test, classes = pixel_sources(*sources)
    c = len(classes)
    began = perf_counter()
    passing = DensePass(encoder, train, config, progress=progress, feed=feed)
    table = collect(passing, c, config.memory, "uniform", config.seed)
    facts = passing.facts()
    modes = patch_modes(label_counts(table.pixels, c))
    usable = modes < c
    held = hold_out(table.pictures, table.pixels, c, config.holdout, config.seed)
    fitted = usable & ~held
    if not fitted.any():
        raise UserError(f"{train.name}: no patch whose most frequent label is a class")
    scaler = Scaler.fit(table.features[fitted]) if config.standardise else None
    if scaler is not None:
        for into in table.features.split(65536):  # in place: there is no second copy of a large bank
            into.copy_(scaler(into))
    seconds = {"extract_seconds": round(perf_counter() - began, 2)}
    began = perf_counter()
    chosen, tried = grid[0], []
    if len(grid) > 1:
        learned = make(table.select(fitted), modes[fitted], grid, c)
        scores = _held_out(learned.predict, table.select(held), c, len(grid))
        judges = held & usable
        chosen = grid[choose(scores, lambda: learned.losses(table.features[judges], modes[judges]))]
        tried = [words(s) | {"miou": rounded(score)} for s, score in zip(grid, scores, strict=True)]
    predict = make(table.select(usable), modes[usable], [chosen], c).predict
    seconds["fit_seconds"] = round(perf_counter() - began, 2)
    began = perf_counter()
    passing = DensePass(encoder, test, config, progress=progress, feed=feed)
    areas, images = map(distributed.gather_rows, _measure(passing, predict, scaler, c))
    test_facts = passing.facts()
    seconds["test_seconds"] = round(perf_counter() - began, 2)
    data = {
        "train": facts | {"bank": int(usable.sum())},
        "test": test_facts,
        "class_iou": named_iou(areas, classes),
        **seconds,
    }
    metrics, scores = summary(areas, config.seed), {"miou": packed_areas([areas], images)}
    return Outcome(metrics, data, (), {name: words(chosen)}, {name: tried}, scores)


def _held_out(predict: Predict, table: PatchTable, classes: int, settings: int) -> list[float]:
    """Mean IoU of each setting over the pixels of held-out patches."""
    areas = np.zeros((settings, 3, classes + 1), np.int64)
    for part in _parts(table):
        for total, labels in zip(areas, predict(part.features), strict=True):
            total += region_areas(labels, part.pixels, classes).numpy()
    scores = [float(mean_iou(total)) for total in areas]
    if np.isnan(scores).all():
        raise UserError("no pixel of the held-out pictures has a class: hold out more of them")
    return scores


def _cross_entropy(model: LogisticModel, rows: Float[Tensor, "m D"], labels: Int64[Tensor, "m"]) -> float:
    """Mean cross-entropy of rows under a model, in float64."""
    total = 0.0
    for x, y in zip(rows.split(QUERY_BLOCK), labels.split(QUERY_BLOCK), strict=True):
        total += float(cross_entropy(model.logits(x).double().cpu(), y, reduction="sum"))
    return total / max(len(labels), 1)


def _parts(table: PatchTable, rows: int = QUERY_BLOCK) -> Iterator[PatchTable]:
    for part in torch.arange(len(table.pictures)).split(rows):
        yield table.select(part)


def _measure(
    passing: DensePass, predict: Predict, scaler: Scaler | None, classes: int
) -> tuple[Int64[Tensor, "P 3 C1"], Int64[Tensor, "P"]]:
    """Areas of each picture of the pass, and which pictures these are."""
    areas, images = [torch.zeros(0, 3, classes + 1, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for batch in passing:
        features = batch.features.flatten(0, 1)
        labels = predict(features if scaler is None else scaler(features))[0]
        truth = patch_pixels(batch.maps, passing.encoder.patch_size)
        for found, true in zip(labels.split(truth.shape[1]), truth, strict=True):
            areas.append(region_areas(found, true, classes)[None])
        images.append(batch.pictures)
    return torch.cat(areas), torch.cat(images)
