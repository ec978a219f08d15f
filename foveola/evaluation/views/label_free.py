"""Numbers without labels: how features fill their space, and what stays the same in other views."""

from time import perf_counter

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from foveola.config import UserError
from foveola.data.sources import Source
from foveola.evaluation.features.table import check_finite
from foveola.evaluation.images import facts_of_bad
from foveola.evaluation.metrics import bootstrap, interval, partner_ranks, percent, recall_at
from foveola.evaluation.paired import packed
from foveola.evaluation.protocol import At, Metric, Outcome, Protocol
from foveola.evaluation.views.feature_space import (
    Moments,
    alignments,
    first_fraction,
    mean_cosine,
    moments,
    nearest_other,
    rankme,
    spread,
    uniformity,
)
from foveola.evaluation.views.other_views import LabelFreeConfig, ViewFeatures, watch
from foveola.evaluation.views.retrieval import choose_targets, identity_of_targets
from foveola.models.encoder import Encoder

__all__ = ["LabelFree", "LabelFreeConfig"]

COLLAPSED = 0.99  # mean cosine of features of different images from which the notes say so


class LabelFree(Protocol):
    """Measures how the features of `test` fill their space, and what stays the same in other views.

    Of the evaluation view: `rankme_image` (vector of an image), `rankme_average` (mean of its patches),
    `rankme_patches` (all patches of all images), `rankme_within` (patches of one image, mean); fractions in
    percent of the first component's variance; `spread`, `mean_cosine`, `duplicates` in percent. Of two views
    of each image: `alignment`, `uniformity`, `rank1_views`, `recall5_views`; of two views of an object of
    each: `rank1_objects_plain`, `rank1_objects_masks`, ... in percent. `_low` and `_high` are 95 % bootstrap
    intervals over images, of what is a mean over images.
    """

    name = "label_free"
    title = "label-free"
    help = "numbers without labels: rank, alignment, uniformity, other views found again"
    Config = LabelFreeConfig
    metrics = (
        Metric("rank1_views", "image found again in another crop and colours", "higher",
               chance="chance_rank1_views", main=True),
        Metric("rank1_objects_*", "object found again in another crop ({})", "higher",
               chance="chance_rank1_objects"),
        Metric("recall*_views", "label-free recall@{} (views)", "higher", chance="chance_recall{}_views"),
        Metric("recall*_objects_*", "label-free recall@{} (objects {})", "higher",
               chance="chance_recall{}_objects"),
        Metric("rankme_image", "Effective rank of images (RankMe)", "neither", ""),
        Metric("rankme_average", "Effective rank of mean patches (RankMe)", "neither", ""),
        Metric("rankme_patches", "Effective rank of all patches (RankMe)", "neither", ""),
        Metric("rankme_within", "Effective rank of the patches of one image (RankMe)", "neither", ""),
        Metric("first_component_image", "Variance of images in one direction", "neither"),
        Metric("first_component_patches", "Variance of patches in one direction", "neither"),
        Metric("spread", "Spread of images: 0 one point, 1 all directions", "neither", ""),
        Metric("mean_cosine", "Mean cosine of the encoder's features of two test images", "neither", ""),
        Metric("duplicates", "Images that another one equals", "neither"),
        Metric("alignment", "Distance of two views of an image (alignment)", "neither", ""),
        Metric("uniformity", "Uniformity: lower is more even", "neither", ""),
        Metric("chance_rank1_*", "label-free: chance rank-1 {}"),
        Metric("chance_recall*_*", "label-free: chance recall{} {}"),
    )  # fmt: skip

    def measure(self, at: At, config: LabelFreeConfig) -> Outcome:
        """Encode each image as it is evaluated, and in two views."""
        encoder, test = at.encoder.pooled(config.pool), at.test
        targets = choose_targets(test, min(config.limit, len(test)), 0.0, config.seed)
        began = perf_counter()
        seen, patches, bad = watch(encoder, test, targets, config, at.progress)
        facts = facts_of_bad(torch.tensor(bad, dtype=torch.int64), len(targets), test)
        count = len(seen.image_indices)
        if count < 2:
            raise UserError(f"{test.name}: {count} images, at least 2 are needed")
        for columns in (seen.features, seen.views.flatten(1)):
            check_finite(columns, seen.image_indices, test)
        check_finite(seen.objects.flatten(1), seen.owners, test)
        metrics = {
            **space_metrics(encoder, seen, patches, config),
            **view_metrics(seen, config),
            **object_metrics(seen, config),
        }
        scores = {}
        for name, first, second, owners in _pairs(seen):
            ranks = _ranks(first, second)
            k = min(config.recall, len(first))
            scores[f"rank1_{name}"] = packed(ranks == 0, owners.repeat(2))
            scores[f"recall{k}_{name}"] = packed(ranks < k, owners.repeat(2))
        facts |= {"rows": count, "objects": len(seen.owners), "width": encoder.width}
        named = {
            "name": test.name,
            "fingerprint": identity_of_targets(test, targets).digest,
            "images": len(targets),
        }
        data = {"test": named | facts, "extract_seconds": round(perf_counter() - began, 2)}
        return Outcome(metrics, data, _notes(metrics, seen, encoder, test, config), scores=scores)


def space_metrics(
    encoder: Encoder, seen: ViewFeatures, patches: Moments, config: LabelFreeConfig
) -> dict[str, float]:
    """Return the metrics of the evaluation view of each image."""
    found = moments(seen.features)
    metrics = {"rankme_image": rankme(found.singular_values()).item()}
    if encoder.config.pool != "average":  # else it is the same
        metrics["rankme_average"] = rankme(moments(seen.averages).singular_values()).item()
    nearest = nearest_other(seen.features) >= config.duplicate
    return {
        **metrics,
        "rankme_patches": rankme(patches.singular_values()).item(),
        **_mean("rankme_within", seen.within, config.seed),
        "first_component_image": first_fraction(found.variances()),
        "first_component_patches": first_fraction(patches.variances()),
        "spread": spread(seen.features),
        "mean_cosine": mean_cosine(seen.features),
        **_fraction("duplicates", nearest, None, config.seed),
    }


def view_metrics(seen: ViewFeatures, config: LabelFreeConfig) -> dict[str, float]:
    """Return the metrics of two views of each image."""
    first, second = seen.views.unbind(dim=1)
    return {
        **_mean("alignment", alignments(first, second), config.seed),
        "uniformity": (uniformity(first) + uniformity(second)) / 2,
        **_found("views", first, second, seen.image_indices, config),
        **_chances("views", len(first), config),
    }


def object_metrics(seen: ViewFeatures, config: LabelFreeConfig) -> dict[str, float]:
    """Return the metrics of two views of an object of each image that has one; nothing without two of
    them.
    """
    metrics: dict[str, float] = {}
    if len(seen.owners) < 2:
        return metrics
    for name, first, second, owners in _pairs(seen)[1:]:
        metrics |= _found(name, first, second, owners, config)
    return metrics | _chances("objects", len(seen.owners), config)


def _found(
    name: str,
    first: Float[Tensor, "n D"],
    second: Float[Tensor, "n D"],
    image_indices: Int64[Tensor, "n"],
    config: LabelFreeConfig,
) -> dict[str, float]:
    """How often a view's other view comes first among those of all, from both sides."""
    ranks = _ranks(first, second)
    k = min(config.recall, len(first))
    return {
        **_fraction(f"rank1_{name}", ranks == 0, image_indices.repeat(2), config.seed),
        f"recall{k}_{name}": recall_at(ranks, k),
    }


def _pairs(seen: ViewFeatures) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, first views, second views and images of everything of which two views were encoded."""
    found = [("views", seen.views[:, 0], seen.views[:, 1], seen.image_indices)]
    if len(seen.owners) > 1:
        for index, name in enumerate(("objects_plain", "objects_masks")):
            found.append((name, seen.objects[:, index, 0], seen.objects[:, index, 1], seen.owners))
    return found


def _ranks(first: Float[Tensor, "n D"], second: Float[Tensor, "n D"]) -> Int64[Tensor, "n2"]:
    """The rank of each second view for its first, then of each first view for its second."""
    return torch.cat((partner_ranks(first, second), partner_ranks(second, first)))


def _chances(name: str, count: int, config: LabelFreeConfig) -> dict[str, float]:
    k = min(config.recall, count)
    return {f"chance_rank1_{name}": 100 / count, f"chance_recall{k}_{name}": 100 * k / count}


def _fraction(name: str, hit: Bool[Tensor, "n"], owners: Tensor | None, seed: int) -> dict[str, float]:
    """A fraction of rows in percent, with its interval over images."""
    low, high = interval(hit, owners, seed=seed)
    return {name: percent(hit), f"{name}_low": 100 * low, f"{name}_high": 100 * high}


def _mean(name: str, values: Float64[Tensor, "n"], seed: int) -> dict[str, float]:
    """A mean over images, with its interval."""
    low, high = bootstrap(values, seed=seed)
    return {name: values.mean().item(), f"{name}_low": low, f"{name}_high": high}


def _notes(
    metrics: dict[str, float], seen: ViewFeatures, encoder: Encoder, test: Source, config: LabelFreeConfig
) -> tuple[str, ...]:
    count = len(seen.image_indices)
    notes = [f"rankme_image of {count} images is at most {min(count, encoder.width)}"]
    if metrics["mean_cosine"] > COLLAPSED:
        notes.append(
            f"features of different images have a mean cosine of {metrics['mean_cosine']:.4f}: collapsed, "
            "or all around one large mean (then rank1_views is far above chance)"
        )
    if config.objects and len(seen.owners) < 2:
        what = "has neither boxes nor masks" if not test.has_objects else "has too few objects"
        notes.append(f"{test.name} {what}: only numbers of images are given")
    return tuple(notes)
