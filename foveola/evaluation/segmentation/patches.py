"""Segmentation by frozen patch features, as in CAPI: k nearest patches, and logistic regression."""

from abc import abstractmethod
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
from foveola.evaluation.paired import packed_areas
from foveola.evaluation.protocol import At, Outcome
from foveola.evaluation.search import QUERY_BLOCK, Distance, nearest_rows
from foveola.evaluation.segmentation.choice import choose_setting, hold_out
from foveola.evaluation.segmentation.iou import (
    mean_iou,
    named_iou,
    region_areas,
    rounded,
    summary,
    summary_metrics,
)
from foveola.evaluation.segmentation.reading import (
    DenseConfig,
    DensePass,
    DenseProtocol,
    PatchTable,
    collect,
    label_counts,
    patch_modes,
    patch_pixels,
)

VOTES = 2**25  # votes in memory at a time: 64 MiB


# -- pure functions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scaler:
    """Mean and population standard deviation of each channel over rows; a constant channel has 1."""

    mean: Float32[Tensor, "D"]
    std: Float32[Tensor, "D"]

    @classmethod
    def fit(cls, rows: Float[Tensor, "R D"]) -> "Scaler":
        """Return statistics in float64."""
        return cls(*standardiser(rows))

    def __call__(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        return ((rows.float() - self.mean) / self.std).to(rows.dtype)


def transplant(
    pixels: UInt8[Tensor, "R Q"], indices: Int64[Tensor, "m k"], classes: int, void_votes: bool = False
) -> UInt8[Tensor, "m Q"]:
    """Return the label of each pixel of each query: the most frequent one there among its k neighbours'
    patches.

    A neighbour gives its whole patch of labels, pixel by pixel, at the same position. The smallest of equals
    wins. Pixels of no class do not vote, unless `void_votes` (CAPI's code); where nothing else was found, the
    result is IGNORE.
    """
    m, k = indices.shape
    if k == 1:
        return pixels[indices[:, 0]]
    out = torch.empty(m, pixels.shape[1], dtype=torch.uint8)
    rows = max(1, VOTES // (pixels.shape[1] * (classes + 1)))
    one = torch.ones((), dtype=torch.int16)
    for into, block in zip(out.split(rows), indices.split(rows), strict=True):
        labels = pixels[block].transpose(1, 2).long().clamp_(max=classes)  # [n, Q, k]
        votes = torch.zeros(len(block), pixels.shape[1], classes + 1, dtype=torch.int16)
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
        None, "largest number of training patches, the same number of each image; null = all", at_least=1
    )
    standardise: bool = key(True, "divide by the training patches' standard deviation, after their mean")
    holdout: float = key(0.1, "fraction of the training images that choose the settings", above=0, below=1)


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
# Patches that teach, the most frequent label of each, and how many classes there are.
Labelled = tuple[PatchTable, Int64[Tensor, "R"], int]


class Learned(NamedTuple):
    """What was learned, for each setting."""

    predict: Predict
    # Mean cross-entropy of each setting over patches, whose most frequent labels are given.
    losses: Callable[[Float[Tensor, "m D"], Int64[Tensor, "m"]], list[float]]


class PatchSegmentation(DenseProtocol):
    """What both protocols share: settings are chosen on held-out images, then all patches teach."""

    @abstractmethod
    def grid(self, config: Any) -> list[dict[str, Any]]:
        """Return the settings to try."""

    @abstractmethod
    def learn(self, at: At, config: Any, references: Labelled, settings: Sequence[dict[str, Any]]) -> Learned:
        """Return what labels patches with each of these settings, learned from reference patches."""

    def segment(self, at: At, classes: tuple[str, ...], config: PatchSegmentationConfig) -> Outcome:
        """Choose a setting on held-out images, learn from all, measure on test."""
        c = len(classes)
        began = perf_counter()
        passing = DensePass(at.encoder, at.train, config, progress=at.progress, feed=at.feed)
        table = collect(passing, c, config.memory, "uniform", config.seed)
        facts = passing.facts()
        modes = patch_modes(label_counts(table.pixels, c))
        usable = modes < c
        held = hold_out(table.image_indices, table.pixels, c, config.holdout, config.seed)
        fitted = usable & ~held
        if not fitted.any():
            raise UserError(f"{at.train.name}: no patch whose most frequent label is a class")
        scaler = Scaler.fit(table.features[fitted]) if config.standardise else None
        if scaler is not None:
            for into in table.features.split(65536):  # in place: a large reference set is not copied
                into.copy_(scaler(into))
        seconds = {"extract_seconds": round(perf_counter() - began, 2)}
        began = perf_counter()
        grid = self.grid(config)
        chosen, tried = grid[0], []
        if len(grid) > 1:
            learned = self.learn(at, config, (table.select(fitted), modes[fitted], c), grid)
            scores = _held_out(learned.predict, table.select(held), c, len(grid))
            judges = held & usable
            chosen = grid[
                choose_setting(scores, lambda: learned.losses(table.features[judges], modes[judges]))
            ]
            tried = [s | {"miou": rounded(score)} for s, score in zip(grid, scores, strict=True)]
        predict = self.learn(at, config, (table.select(usable), modes[usable], c), [chosen]).predict
        seconds["fit_seconds"] = round(perf_counter() - began, 2)
        began = perf_counter()
        passing = DensePass(at.encoder, at.test, config, progress=at.progress, feed=at.feed)
        areas, images = map(distributed.gather_rows, _measure(passing, predict, scaler, c))
        test_facts = passing.facts()
        seconds["test_seconds"] = round(perf_counter() - began, 2)
        data = {
            "train": facts | {"reference_patches": int(usable.sum())},
            "test": test_facts,
            "class_iou": named_iou(areas, classes),
            **seconds,
        }
        metrics, scores = summary(areas, config.seed), {"miou": packed_areas([areas], images)}
        return Outcome(metrics, data, (), {self.name: chosen}, {self.name: tried}, scores)


class KnnSegmentation(PatchSegmentation):
    """Gives every pixel the majority of its patch's nearest patches at the same position."""

    name = "knn_segmentation"
    title = "k-NN segmentation"
    help = "segmentation by the labels of the nearest patches"
    Config = KnnSegmentationConfig
    metrics = summary_metrics(title)

    def grid(self, config: KnnSegmentationConfig) -> list[dict[str, Any]]:
        """Return each distance with each number of neighbours."""
        return [{"distance": distance, "k": k} for distance in config.distance for k in config.k]

    def learn(
        self, at: At, config: KnnSegmentationConfig, references: Labelled, settings: Sequence[dict[str, Any]]
    ) -> Learned:
        """Do nothing but check: nothing is learned, patches are looked up. Raises UserError for more
        neighbours than patches.
        """
        table, _, classes = references
        largest = max(setting["k"] for setting in settings)
        if largest > len(table.image_indices):
            raise UserError(
                f"k={largest} is more than the {len(table.image_indices)} patches of train with a class"
            )

        def predict(queries: Tensor) -> list[Tensor]:
            found = {
                d: nearest_rows(queries, table.features, largest, distance=d, device=at.encoder.device)[1]
                for d in dict.fromkeys(setting["distance"] for setting in settings)
            }
            return [
                transplant(table.pixels, found[s["distance"]][:, : s["k"]], classes, config.void_votes)
                for s in settings
            ]

        return Learned(predict, lambda queries, labels: [0.0] * len(settings))  # votes have none


class LogisticSegmentation(PatchSegmentation):
    """Gives every pixel the class of its patch, by logistic regression on the patches' main labels."""

    name = "logistic_segmentation"
    help = "segmentation by logistic regression on patches"
    Config = LogisticSegmentationConfig
    metrics = summary_metrics("logistic segmentation")

    def grid(self, config: LogisticSegmentationConfig) -> list[dict[str, Any]]:
        """Return each C, ascending."""
        return [{"c": c} for c in sorted(config.c)]

    def learn(
        self,
        at: At,
        config: LogisticSegmentationConfig,
        references: Labelled,
        settings: Sequence[dict[str, Any]],
    ) -> Learned:
        """Fit a regression for each C, each started from the one before."""
        table, modes, classes = references
        models = path(
            table.features,
            modes,
            classes,
            [setting["c"] for setting in settings],
            max_iterations=config.max_iterations,
            tolerance=config.tolerance,
            progress=at.progress,
            device=at.encoder.device,
            dtype=getattr(torch, config.arithmetic),
        )
        pixels = table.pixels.shape[1]

        def predict(queries: Tensor) -> list[Tensor]:
            best = [model.predict(queries) for model in models]  # never a class that train lacks
            return [block.to(torch.uint8)[:, None].expand(-1, pixels) for block in best]

        def losses(queries: Tensor, labels: Tensor) -> list[float]:
            known = torch.isin(labels, modes)  # of others the loss is infinite for all
            return [_cross_entropy(model, queries[known], labels[known]) for model in models]

        return Learned(predict, losses)


def _held_out(predict: Predict, table: PatchTable, classes: int, settings: int) -> list[float]:
    """Mean IoU of each setting over the pixels of held-out patches."""
    areas = np.zeros((settings, 3, classes + 1), np.int64)
    for part in _parts(table):
        for total, labels in zip(areas, predict(part.features), strict=True):
            total += region_areas(labels, part.pixels, classes).numpy()
    scores = [float(mean_iou(total)) for total in areas]
    if np.isnan(scores).all():
        raise UserError("no pixel of the held-out images has a class: hold out more of them")
    return scores


def _cross_entropy(model: LogisticModel, rows: Float[Tensor, "m D"], labels: Int64[Tensor, "m"]) -> float:
    """Mean cross-entropy of rows under a model, in float64."""
    total = 0.0
    for x, y in zip(rows.split(QUERY_BLOCK), labels.split(QUERY_BLOCK), strict=True):
        total += float(cross_entropy(model.logits(x).double().cpu(), y, reduction="sum"))
    return total / max(len(labels), 1)


def _parts(table: PatchTable, rows: int = QUERY_BLOCK) -> Iterator[PatchTable]:
    for part in torch.arange(len(table.image_indices)).split(rows):
        yield table.select(part)


def _measure(
    passing: DensePass, predict: Predict, scaler: Scaler | None, classes: int
) -> tuple[Int64[Tensor, "P 3 C1"], Int64[Tensor, "P"]]:
    """Areas of each image of the pass, and which images these are."""
    areas, images = [torch.zeros(0, 3, classes + 1, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for batch in passing:
        features = batch.features.flatten(0, 1)
        labels = predict(features if scaler is None else scaler(features))[0]
        truth = patch_pixels(batch.maps, passing.encoder.patch_size)
        for found, true in zip(labels.split(truth.shape[1]), truth, strict=True):
            areas.append(region_areas(found, true, classes)[None])
        images.append(batch.image_indices)
    return torch.cat(areas), torch.cat(images)
