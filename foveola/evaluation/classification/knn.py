"""k-NN classification by DINO's weighted vote, and the protocol `knn`."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foveola import distributed
from foveola.config import UserError, key
from foveola.data.sources import Source
from foveola.evaluation.features.need import Need, need
from foveola.evaluation.features.overlap import content_groups
from foveola.evaluation.features.table import (
    ExtractConfig,
    FeatureTable,
    extract_tables,
    mask_modes,
    without_objects,
)
from foveola.evaluation.images import identity_for, slice_of_rank
from foveola.evaluation.metrics import (
    GroundTruth,
    effective_rank,
    ground_truth,
    interval,
    percent,
    shared_labels,
)
from foveola.evaluation.paired import packed
from foveola.evaluation.protocol import At, Metric, Needs, Outcome, Protocol, Reading
from foveola.evaluation.search import QUERY_BLOCK, nearest_rows
from foveola.models.encoder import Encoder

# -- vote ----------------------------------------------------------------------------------------------------


def vote(
    similarities: Float[Tensor, "n k"], labels: Int64[Tensor, "n k"], classes: int, temperature: float
) -> Float[Tensor, "n {classes}"]:
    """Return the weighted vote (DINO's k-NN): score of class c = sum over its neighbours j of exp(s_j /
    temperature).

    Scores are divided by the largest weight of their row, so that no temperature overflows; the ranking
    stays. A similarity of -inf (no neighbour) has no vote. Labels lie in [0, classes).
    """
    best = similarities.amax(dim=1, keepdim=True)
    present = similarities > -torch.inf
    weights = torch.where(present, ((similarities - best) / temperature).exp(), 0.0)
    scores = torch.zeros(similarities.shape[0], classes, device=similarities.device)
    return scores.scatter_add_(1, labels, weights)


def ranking(scores: Float[Tensor, "n C"], top: int) -> Int64[Tensor, "n r"]:
    """Return the r = min(top, C) classes of highest score, best first; -1 where no score is left above
    zero.
    """
    values, classes = scores.topk(min(top, scores.shape[1]), dim=1)
    return torch.where(values > 0, classes, -1)


def predict(
    queries: Float[Tensor, "m D"],
    references: Float[Tensor, "N D"],
    labels: Int64[Tensor, "N"],
    *,
    k: Sequence[int],
    classes: int,
    temperature: float = 0.07,
    top: int = 5,
    query_groups: Int64[Tensor, "m"] | None = None,
    reference_groups: Int64[Tensor, "N"] | None = None,
    device: torch.device | str = "cpu",
) -> dict[int, Int64[Tensor, "m r"]]:
    """Return, for each k, the r = min(top, classes) best classes of each query, best first (-1: no vote
    left).

    `labels` in [0, classes) belong to the references. Queries are read in blocks, so memory is that of the
    two inputs plus a constant. Each k must be at most N.
    """
    if not 0 < min(k) <= max(k) <= len(references):
        raise ValueError(f"k={tuple(k)} with {len(references)} references")
    ranked: dict[int, list[Tensor]] = {each: [] for each in k}
    for start in range(0, len(queries), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        own = None if query_groups is None else query_groups[block]
        similarities, indices = nearest_rows(
            queries[block],
            references,
            max(k),
            query_groups=own,
            reference_groups=reference_groups,
            device=device,
        )
        for each in k:
            for s, i in zip(similarities[:, :each].split(512), indices[:, :each].split(512), strict=True):
                ranked[each].append(ranking(vote(s, labels[i], classes, temperature), top))
    empty = torch.zeros(0, min(top, classes), dtype=torch.int64)
    return {each: torch.cat(parts) if parts else empty for each, parts in ranked.items()}


# -- protocol ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnnConfig(ExtractConfig):
    """Settings of `knn`. Defaults: DINO, iBOT and ODIS."""

    masks: Literal["both"] | bool = key(
        "both",
        "object tokens read only their object's patches: true, false, both; discover, detect or segment: "
        "both, of the object that this finds in each image (docs/evaluation/encoding.md)",
    )
    k: tuple[int, ...] = key(
        (10, 20, 100, 200), "numbers of neighbours to try; the best is reported", at_least=1
    )
    temperature: float = key(0.07, "temperature of the vote, exp(cosine / temperature)", above=0)
    image_size: int | None = key(
        None,
        "pixels a side of the square that is encoded, instead of the encoder's crop; images are resized in "
        "proportion, positions are interpolated",
        at_least=1,
    )
    exclude_self: bool = key(
        False, "features of a query's own image (same contents) do not vote; for test images that train holds"
    )
    store: Literal["float32", "float16"] = key(
        "float32", "number format of stored features; features are stored with cache= or several protocols"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k or len(set(self.k)) < len(self.k):
            raise ValueError(f"k: needs different numbers of neighbours, got {list(self.k)}")


class Knn(Protocol):
    """Classifies each test row by its neighbours in train.

    Numbers, in percent, for `plain` (whole image) and `masks` (object token): `top1_*` and `top5_*` at the
    best k, `top1_*_low` and `_high` (95 % interval over test images), `best_k_*`, `top1_*_k20` and so on
    for every k.
    """

    name = "knn"
    title = "k-NN"
    help = "k-NN classification by weighted vote, with and without object masks"
    Config = KnnConfig
    train = "needed"
    metrics = (
        Metric("top1_*", "k-NN top-1 ({})", "higher", chance=1, main=True),
        Metric("top5_*", "k-NN top-5 ({})", "higher", chance=5),
        Metric("best_k_*", "k-NN: best k {}", unit="", digits=0),
        Metric("effective_rank_*", "k-NN: effective rank {}", unit=""),
    )

    def needs(self, config: KnnConfig, encoder: Encoder) -> Needs:
        """Return one vector of each image, read once; of objects the shared pass has none."""
        wanted = wanted_of(config, encoder)
        read = () if wanted is None else (Reading(wanted, once=True),)
        return Needs(read, read)

    def measure(self, at: At, config: KnnConfig) -> Outcome:
        """Extract the features of both sources, and let the neighbours vote."""
        modes, notes = mask_modes(config.masks, at.train, at.test, at.encoder, config.pool)
        began = perf_counter()
        wanted = wanted_of(config, at.encoder)

        def tables(source: Source) -> tuple[Sequence[FeatureTable], dict[str, Any]]:
            if at.feed is None or wanted is None:
                side = config.image_size
                encoder = at.encoder if side is None else at.encoder.sized(side, "image_size")
                return extract_tables(encoder, source, modes, config, progress=at.progress)
            store = at.open(source, config, wanted)
            plain = config.pool or at.encoder.config.pool
            return [store.table("masked" if masked else plain) for masked in modes], store.facts

        references, train_facts = tables(at.train)
        same = identity_for(at.train, config).digest == identity_for(at.test, config).digest
        queries, test_facts = (references, train_facts) if same else tables(at.test)
        seconds = {"extract_seconds": round(perf_counter() - began, 2)}
        began, metrics, scores = perf_counter(), {}, {}
        for masked, reference, query in zip(modes, references, queries, strict=True):
            name = "masks" if masked else "plain"
            found = _measure(name, reference, query, (at.train, at.test), config, at.encoder.device, notes)
            metrics |= found[0]
            scores |= found[1]
        seconds["search_seconds"] = round(perf_counter() - began, 2)
        data = {"train": train_facts, "test": test_facts, **seconds}
        return Outcome(metrics, data, tuple(dict.fromkeys(notes)), scores=scores)


def wanted_of(config: KnnConfig, encoder: Encoder) -> Need | None:
    """Return what of an image the protocol reads; None where the shared pass does not have it."""
    pool = config.pool or encoder.config.pool
    plain = config.masks is False or without_objects(encoder, config.pool, config.masks)
    if config.rows != "images" or (pool != "token" and not plain):
        return None
    wanted = need(pool) if plain else need("token", "masked")
    return wanted.at(encoder, config.image_size)


def _measure(
    name: str,
    reference: FeatureTable,
    query: FeatureTable,
    sources: tuple[Source, Source],
    config: KnnConfig,
    device: torch.device,
    notes: list[str],
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics, and the score of each row for those that are fractions of rows."""
    reference, query = _labelled(reference, "train", config, notes), _labelled(query, "test", config, notes)
    truth = _truth(reference, query, sources, config, notes)
    if truth.candidates is not None:  # rows of classes that cannot be right have no vote
        reference = reference.select(truth.candidates[reference.labels])
    ks = tuple(dict.fromkeys(min(k, len(reference.labels)) for k in sorted(config.k)))
    if ks != tuple(sorted(config.k)):
        notes.append(
            f"the reference set has {len(reference.labels)} rows: k = {', '.join(map(str, ks))} "
            f"instead of {list(config.k)}"
        )
    classes = int(reference.labels.max()) + 1
    mine = slice_of_rank(len(query.labels))
    groups = (
        content_groups(*sources, config, reference.image_indices, query.image_indices)
        if config.exclude_self
        else None
    )
    ranked = predict(
        query.features[mine],
        reference.features,
        reference.labels,
        k=ks,
        classes=classes,
        temperature=config.temperature,
        query_groups=None if groups is None else groups[1][mine],
        reference_groups=None if groups is None else groups[0],
        device=device,
    )
    ranked = {k: distributed.gather_rows(rows) for k, rows in ranked.items()}
    correct = {k: truth.among(rows[:, :1]) for k, rows in ranked.items()}
    best = max(ks, key=lambda k: percent(correct[k]))  # the smallest of equals
    top5 = truth.among(ranked[best])
    low, high = interval(correct[best], query.image_indices, seed=config.seed)
    hits = {f"top1_{name}": correct[best], f"top5_{name}": top5}
    hits |= {f"top1_{name}_k{k}": correct[k] for k in ks}
    return {
        f"top1_{name}": percent(correct[best]),
        f"top1_{name}_low": 100 * low,
        f"top1_{name}_high": 100 * high,
        f"top5_{name}": percent(top5),
        f"best_k_{name}": float(best),
        **{f"top1_{name}_k{k}": percent(correct[k]) for k in ks},
        f"effective_rank_{name}": effective_rank(query.features),
    }, {metric: packed(hit, query.image_indices) for metric, hit in hits.items()}


def _truth(
    reference: FeatureTable,
    query: FeatureTable,
    sources: tuple[Source, Source],
    config: KnnConfig,
    notes: list[str],
) -> GroundTruth:
    """What is right: the labels, and what the test set says of whole images besides."""
    train, test = sources
    labels = shared_labels(query.labels, test.classes, reference.labels, train.classes, notes)
    if config.rows == "objects" and test.has_objects:  # `answers` of a source are of images
        return GroundTruth(labels, query.image_indices)
    classes = max(int(reference.labels.max()) + 1, len(train.classes or ()))
    return ground_truth(test, train.classes, labels, query.image_indices, classes)


def _labelled(table: FeatureTable, which: str, config: KnnConfig, notes: list[str]) -> FeatureTable:
    known = table.labels >= 0
    if not known.any():
        kind = "objects" if config.rows == "objects" else "images"
        other = "rows=images" if kind == "objects" else "rows=objects"
        raise UserError(f"{which}: no labels on its {kind}, which k-NN needs; other data, or {other}")
    if missing := int((~known).sum()):
        notes.append(f"{which}: {missing} rows without a label are left out")
    return table.select(known) if missing else table  # no copy of a large table for nothing
