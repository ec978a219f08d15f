"""Dense nearest-neighbour retrieval: segment images by looking up their patches among labelled ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16, Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from foveola import distributed
from foveola.config import UserError, key
from foveola.data.segmentation import IGNORE
from foveola.evaluation.images import choose_images
from foveola.evaluation.paired import packed_areas
from foveola.evaluation.protocol import At, Metric, Outcome
from foveola.evaluation.search import nearest_rows
from foveola.evaluation.segmentation.iou import Absent, bootstrap_iou, mean_iou, named_iou, region_areas
from foveola.evaluation.segmentation.reading import (
    ComparedConfig,
    DenseBatch,
    DensePass,
    DenseProtocol,
    collect,
    label_counts,
    patch_pixels,
)

QUERIES = 8192  # patches looked up at once: one pass over the reference set for each such block
GATHERED = 2**24  # numbers of neighbours' labels in memory at a time: 64 MiB


# -- pure functions ---------------------------------------------------------------------------------------


def attend(
    similarities: Float32[Tensor, "m K"],
    indices: Int64[Tensor, "m K"],
    counts: Int16[Tensor, "R C"],
    pixels: int,
    k: int,
    temperature: float,
) -> Float32[Tensor, "m C"]:
    """Return the class fractions of each query: those of its k nearest patches, weighted by softmax(cosine /
    temperature).

    This is cross-attention whose keys are patches and whose values are their labels (Hummingbird). A patch's
    label is the mean of the one-hot labels of its `pixels` pixels, so one of no class has no weight.
    """
    k = min(k, similarities.shape[1])
    weights = (similarities[:, :k] / temperature).softmax(dim=1)
    rows = max(1, GATHERED // (k * counts.shape[1]))
    found = [torch.zeros(0, counts.shape[1])]
    for w, i in zip(weights.split(rows), indices[:, :k].split(rows), strict=True):
        found.append(torch.einsum("mk,mkc->mc", w, counts[i].float() / pixels))
    return torch.cat(found)


def own_fractions(counts: Int16[Tensor, "m C"]) -> Float32[Tensor, "m C"]:
    """Return the class fractions of each patch, among its pixels that have a class.

    As fractions of all pixels they would be small in a patch that is partly void, and its neighbours would
    win its pixels.
    """
    counts = counts.float()
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def label_pixels(
    fractions: Float[Tensor, "N C"], grid: int, size: tuple[int, int]
) -> UInt8[Tensor, "{size[0]} {size[1]}"]:
    """Return the class of each pixel: fractions of an image's patches, enlarged bilinearly, and the largest
    taken.
    """
    field = fractions.T.reshape(1, -1, grid, grid)
    return interpolate(field, size, mode="bilinear", align_corners=False)[0].argmax(dim=0).to(torch.uint8)


# -- protocol ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseRetrievalConfig(ComparedConfig):
    """Settings of `dense_retrieval`. Defaults: open-hummingbird, without its mistakes."""

    k: tuple[int, ...] = key((30, 50), "numbers of neighbours to try; the best is reported", at_least=1)
    temperature: float = key(
        0.02, "temperature of the attention over neighbours, softmax(cosine / temperature)", above=0
    )
    memory: int = key(
        10_240_000,
        "largest number of patches in the reference set, the same number of each image",
        at_least=1,
    )
    subsample: tuple[int, ...] = key(
        (1,), "the reference set takes one in this many train images; each is measured", at_least=1
    )
    repeats: int = key(1, "draws of a subsampled reference set, whose mIoU is averaged", at_least=1)
    sampling: Literal["rare", "uniform"] = key(
        "rare",
        "how patches of an image are chosen where not all fit: those of rare classes first, or at random",
    )
    void: Literal["drop", "first"] = key(
        "drop", "pixels of no class in the reference set: left out, or taken for class 0 (open-hummingbird)"
    )
    absent: Absent = key("skip", "classes neither true nor predicted: left out of the mean, or zero")

    def __post_init__(self) -> None:
        for name, values in (("k", self.k), ("subsample", self.subsample)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: needs different numbers, got {list(values)}")


@dataclass(frozen=True, eq=False)
class ReferencePatches:
    """Patches to look up, and how many of their pixels have each class."""

    features: Float[Tensor, "R D"]
    counts: Int16[Tensor, "R C"]
    subsample: int


class DenseRetrieval(DenseProtocol):
    """Labels every pixel of `test` by its patch's neighbours in `train`.

    Numbers, in percent: `miou` at the best k with `miou_low` and `miou_high` (95 % bootstrap over images),
    `best_k`, `miou_k30` and so on; with references of 1 in n images `miou_1of8` ... And `miou_ceiling`: what
    perfect class fractions of the labelled pixels of every patch would get, or the best that was measured.
    """

    name = "dense_retrieval"
    help = "segmentation by attention to the nearest labelled patches"
    Config = DenseRetrievalConfig
    metrics = (
        Metric("miou", "dense retrieval mIoU", "higher", main=True),
        Metric("miou_*", "dense retrieval mIoU ({})", "higher"),
        Metric("miou_ceiling", "dense retrieval mIoU (ceiling)"),
        Metric("miou_*_sd", "dense retrieval mIoU ({} sd)"),
        Metric("best_k", "dense retrieval: best k", unit="", digits=0),
        Metric("best_k_*", "dense retrieval: best k {}", unit="", digits=0),
    )

    def segment(self, at: At, classes: tuple[str, ...], config: DenseRetrievalConfig) -> Outcome:
        """Fill the reference sets from `train`, look up the patches of `test`, and compare."""
        began = perf_counter()
        sets, train_facts = _reference_sets(at, config, len(classes))
        reference_seconds = round(perf_counter() - began, 2)
        smallest = min(len(one.features) for one in sets)
        if max(config.k) > smallest:
            raise UserError(f"k={max(config.k)} is more than the {smallest} patches in the reference set")
        began = perf_counter()
        passing = DensePass.compared(at, config)
        settings = [(b, k) for b in range(len(sets)) for k in config.k]
        areas: dict[Any, list[Tensor]] = {setting: [] for setting in (*settings, "ceiling")}
        images = [torch.zeros(0, dtype=torch.int64)]
        pixels = at.encoder.patch_size**2
        for batch in _blocks(passing, QUERIES):
            images.append(batch.image_indices)
            own = label_counts(patch_pixels(batch.maps, at.encoder.patch_size).flatten(0, 1), len(classes))[
                :, :-1
            ]
            areas["ceiling"] += _compare(own_fractions(own), passing.grid, batch.truth, len(classes))
            for b, one in enumerate(sets):
                s, i = nearest_rows(
                    batch.features.flatten(0, 1), one.features, max(config.k), device=at.encoder.device
                )
                for k in config.k:
                    fractions = attend(s, i, one.counts, pixels, k, config.temperature)
                    areas[b, k] += _compare(fractions, passing.grid, batch.truth, len(classes))
        test_facts = passing.facts()
        stacked = {
            setting: distributed.gather_rows(_stack(parts, len(classes))) for setting, parts in areas.items()
        }
        metrics, iou = _metrics(stacked, sets, config, classes)
        scores = _scores(stacked, sets, config, distributed.gather_rows(torch.cat(images)), metrics)
        data = {
            "train": train_facts,
            "test": test_facts,
            "class_iou": iou,
            "reference_seconds": reference_seconds,
            "search_seconds": round(perf_counter() - began, 2),
        }
        return Outcome(metrics, data, scores=scores)


def _reference_sets(
    at: At, config: DenseRetrievalConfig, classes: int
) -> tuple[list[ReferencePatches], dict[str, Any]]:
    """A reference set for each subsampling and repeat; without a feed each is encoded anew."""
    every = choose_images(len(at.train), config.limit, config.seed)
    sets, facts = [], {}
    for divisor in config.subsample:
        for repeat in range(config.repeats if divisor > 1 else 1):
            subset = choose_images(len(every), max(1, len(every) // divisor), config.seed + repeat)
            void = 0 if config.void == "first" else IGNORE
            passing = DensePass(
                at.encoder, at.train, config, every[subset], void=void, progress=at.progress, feed=at.feed
            )
            table = collect(passing, classes, config.memory, config.sampling, config.seed + repeat)
            counts = label_counts(table.pixels, classes)[:, :-1].contiguous()
            sets.append(ReferencePatches(table.features, counts, divisor))
            known = passing.facts()
            if not facts or known["images"] > facts["images"]:
                facts = known | {"reference_patches": len(table.image_indices)}
    return sets, facts


def _blocks(batches: DensePass, rows: int) -> Iterator[DenseBatch]:
    """Batches joined until they hold `rows` patches: a search costs a pass over the one."""
    waiting: list[DenseBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(part.features.shape[0] * part.features.shape[1] for part in waiting) >= rows:
            yield _join(waiting)
            waiting = []
    if waiting:
        yield _join(waiting)


def _join(parts: Sequence[DenseBatch]) -> DenseBatch:
    return DenseBatch(
        torch.cat([part.features for part in parts]),
        torch.cat([part.maps for part in parts]),
        tuple(labels for part in parts for labels in part.originals),
        torch.cat([part.image_indices for part in parts]),
    )


def _compare(
    fractions: Float[Tensor, "m C"], grid: int, truth: Sequence[UInt8[Tensor, "H W"]], classes: int
) -> list[Int64[Tensor, "3 C1"]]:
    """Areas of each image, from the class fractions of the patches of all."""
    parts = fractions.split(grid * grid)
    return [
        region_areas(label_pixels(part, grid, (labels.shape[0], labels.shape[1])), labels, classes)
        for part, labels in zip(parts, truth, strict=True)
    ]


def _stack(parts: list[Tensor], classes: int) -> Int64[Tensor, "P 3 C1"]:
    return torch.stack(parts) if parts else torch.zeros(0, 3, classes + 1, dtype=torch.int64)


def _scores(
    areas: dict[Any, Int64[Tensor, "P 3 C1"]],
    sets: Sequence[ReferencePatches],
    config: DenseRetrievalConfig,
    images: Int64[Tensor, "P"],
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Areas of each image for every mean IoU, of all draws of its one."""
    scores: dict[str, Any] = {}
    for divisor in config.subsample:
        end = _end(divisor)
        own = [b for b, one in enumerate(sets) if one.subsample == divisor]
        for k in config.k:
            each = packed_areas([areas[b, k] for b in own], images, config.absent)
            scores[f"miou{end}_k{k}"] = each
            if k == metrics[f"best_k{end}"]:
                scores[f"miou{end}"] = each
    return scores


def _end(divisor: int) -> str:
    """Return the end of a metric's name, which says the part of the reference set that was used."""
    return "" if divisor == 1 else f"_1of{divisor}"


def _metrics(
    areas: dict[Any, Int64[Tensor, "P 3 C1"]],
    sets: Sequence[ReferencePatches],
    config: DenseRetrievalConfig,
    classes: Sequence[str],
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Named numbers, and the IoU of each class (first reference set, its best k)."""

    def miou(setting: Any) -> float:
        return float(mean_iou(areas[setting].sum(dim=0).numpy(), config.absent))

    known = miou("ceiling")
    if np.isnan(known):
        raise UserError("no pixel of test has a class: nothing can be compared")
    metrics: dict[str, float] = {}
    best_of: list[int] = []
    for divisor in config.subsample:
        end = _end(divisor)
        own = [b for b, one in enumerate(sets) if one.subsample == divisor]
        means = {k: float(np.mean([miou((b, k)) for b in own])) for k in config.k}
        best = max(config.k, key=lambda k: means[k])
        best_of.append(best)
        low, high = bootstrap_iou([areas[b, best] for b in own], config.absent, seed=config.seed)
        metrics |= {f"miou{end}": means[best], f"miou{end}_low": low, f"miou{end}_high": high}
        metrics |= {f"best_k{end}": float(best), **{f"miou{end}_k{k}": means[k] for k in config.k}}
        if len(own) > 1:
            metrics[f"miou{end}_sd"] = float(np.std([miou((b, best)) for b in own], ddof=1))
    # What was reached can be reached: enlarged, other fractions may do better at borders than the true ones.
    ceiling = max(known, *(miou((b, k)) for b in range(len(sets)) for k in config.k))
    return metrics | {"miou_ceiling": ceiling}, named_iou(areas[0, best_of[0]], classes)
