"""What counts as right on a test set, how much of it there is, and how sure the number is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foveola.config import UserError
from foveola.data.sources import Source

# -- what is right -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """What counts as right on the rows of a test set, in the numbering of the training classes."""

    labels: Int64[Tensor, "m"]  # -1: a class that train lacks, always wrong
    image_indices: Int64[Tensor, "m"]
    others: tuple[Int64[Tensor, "_"], ...] | None = None  # all right answers of each row (ReaL)
    candidates: Bool[Tensor, "C"] | None = None  # classes that may be predicted (ImageNet-A, ObjectNet)

    @cached_property
    def right(self) -> Int64[Tensor, "m a"]:
        """The right classes of each row, filled up with -1."""
        if self.others is None:
            return self.labels[:, None]
        return pad_sequence(list(self.others), batch_first=True, padding_value=-1)

    def among(self, found: Int64[Tensor, "*G m r"], rows: slice = slice(None)) -> Bool[Tensor, "*G m"]:
        """Return whether any of the classes found for each row is a right class of it; -1 is no class."""
        right = self.right[rows][:, None]
        return ((found[..., None] == right) & (right >= 0)).flatten(-2).any(dim=-1)

    def hits(self, logits: Float[Tensor, "*G m C"], rows: slice = slice(None)) -> Bool[Tensor, "*G m"]:
        """Return whether the best (candidate) class of each row is right."""
        return self.among(self.best(logits)[..., None], rows)

    def best(self, logits: Float[Tensor, "*G m C"]) -> Int64[Tensor, "*G m"]:
        """Return the (candidate) class of highest score of each row, on the CPU."""
        return self._allowed(logits).argmax(dim=-1).cpu()

    def top5(self, logits: Float[Tensor, "m C"]) -> Bool[Tensor, "m"]:
        """Return whether a right class is among the five (candidate) classes of highest score."""
        scores, classes = self._allowed(logits).topk(min(5, logits.shape[1]), dim=1)
        return self.among(torch.where(scores == -torch.inf, -1, classes).cpu())

    def _allowed(self, logits: Tensor) -> Tensor:
        if self.candidates is None:
            return logits
        return logits.masked_fill(~self.candidates.to(logits.device), -torch.inf)


def ground_truth(
    test: Source,
    names: tuple[str, ...] | None,
    labels: Int64[Tensor, "m"],
    image_indices: Int64[Tensor, "m"],
    classes: int,
) -> GroundTruth:
    """Return rows with these labels (`shared_labels`), and what some test sets of ImageNet's say besides a
    label.

    `names` are those of the `classes` that training knows. `data.imagenet.Variant` has both:
    `answers(index)`, all right answers, and `candidates`.
    """
    names = names or ()
    index_of = {name: i for i, name in enumerate(names)}
    matched = test.classes is not None and bool(names)
    named = [index_of.get(name, -1) for name in test.classes or ()] if matched else range(classes)
    number = dict(enumerate(named))  # of a class of test, in train; a class that train lacks has -1
    others = candidates = None
    all_right: Callable[[int], Any] | None = getattr(test, "answers", None)
    if all_right is not None:
        lists = [[number.get(int(label), -1) for label in all_right(i)] for i in image_indices.tolist()]
        if any(len(row_labels) != 1 for row_labels in lists):
            others = tuple(
                torch.tensor([n for n in row_labels if n >= 0], dtype=torch.int64) for row_labels in lists
            )
    if allowed := getattr(test, "candidates", None):
        candidates = torch.zeros(classes, dtype=torch.bool)
        candidates[[number[label] for label in allowed if number.get(label, -1) >= 0]] = True
    return GroundTruth(labels, image_indices, others, candidates)


def shared_labels(
    labels: Int64[Tensor, "m"],
    classes: tuple[str, ...] | None,
    reference_labels: Int64[Tensor, "N"],
    reference_classes: tuple[str, ...] | None,
    notes: list[str],
    whose: str = "train",
) -> Int64[Tensor, "m"]:
    """Return test labels in the numbering of the references, matched by class name where both name their
    classes.

    A class that the references lack gets -1: its rows can only be wrong, and stay in the count. `whose` says
    for people where the classes of the references are from. Raises UserError when no class is shared.
    """
    if classes is not None and reference_classes is not None and classes != reference_classes:
        number = {name: i for i, name in enumerate(reference_classes)}
        labels = torch.tensor([number.get(name, -1) for name in classes], dtype=torch.int64)[labels]
    known = torch.isin(labels, reference_labels) & (labels >= 0)
    if not known.any():
        raise UserError(
            f"{whose} and test share no class "
            f"({_examples(reference_labels, reference_classes)} against {_examples(labels, classes)})"
        )
    if missing := int((~known).sum()):
        notes.append(
            f"test: {missing} of {len(labels)} rows are of classes that {whose} lacks, and count as wrong"
        )
    return torch.where(known, labels, -1)


def _examples(labels: Tensor, classes: tuple[str, ...] | None) -> str:
    names = classes[:3] if classes else tuple(str(int(label)) for label in labels.unique()[:3])
    return ", ".join(names) + ", ..."


# -- how much of it, and how sure ----------------------------------------------------------------------------


def unit_rows(x: Tensor) -> Float[Tensor, "n D"]:
    """Return rows of length one in float32; a row of zeros stays zero.

    Each row is divided by its largest entry first: squares of 1e-30 or 1e30 leave the range of float32, and a
    positive factor must change nothing.
    """
    x = x.to(torch.float32)
    if x.shape[1] == 0:
        return x
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12))


def partner_ranks(
    queries: Float[Tensor, "n D"], gallery: Float[Tensor, "n D"], chunk: int = 1024
) -> Int64[Tensor, "n"]:
    """Return, for each query, how many gallery rows besides its own (the one of the same index) are at least
    as near.

    0 = found first. Cosine similarity. Ties count against the query: an encoder that gives the same feature
    for everything finds nothing.
    """
    queries, gallery = unit_rows(queries), unit_rows(gallery)
    ranks = []
    for start in range(0, len(queries), chunk):
        similarities = queries[start : start + chunk] @ gallery.T
        own = similarities.diagonal(start)[:, None]
        ranks.append((similarities >= own).sum(dim=1) - 1)  # its own partner is one of them
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def recall_at(ranks: Int64[Tensor, "n"], k: int) -> float:
    """Return the fraction of ranks below k, in percent."""
    return percent(ranks < k)


def percent(hit: Bool[Tensor, "n"]) -> float:
    """Return the fraction of True, in percent. Raises ValueError for no row at all."""
    if not len(hit):
        raise ValueError("a fraction of no rows")
    return 100.0 * hit.double().mean().item()


def bootstrap(
    values: Tensor,
    groups: Int64[Tensor, "n"] | None = None,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values` [n]: what it might be on other rows of
    the kind.

    `groups` names what is drawn with replacement: rows of one group (objects of one image) come and go
    together, because they are not independent. Without it, rows are drawn. Deterministic in `seed`.
    """
    x = values.detach().cpu().double().numpy()
    if not len(x):
        raise ValueError("a bootstrap of no rows")
    if groups is None:
        totals, counts = x, np.ones_like(x)
    else:
        _, index = np.unique(groups.cpu().numpy(), return_inverse=True)
        totals, counts = np.bincount(index, weights=x), np.bincount(index).astype(np.float64)
    rng, n = np.random.default_rng(seed), len(totals)
    means = np.empty(samples)
    for i in range(samples):
        times = np.bincount(rng.integers(n, size=n), minlength=n)  # one resample at a time: memory stays n
        means[i] = (times @ totals) / (times @ counts)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson(fraction: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a fraction in [0, 1] of `count` independent rows (Wilson, 1927).

    It holds what it promises near 0 and 1, too, where a bootstrap of equal values has no width: all right of
    100 gives (0.963, 1).
    """
    if count < 1 or not 0 <= fraction <= 1:
        raise ValueError(f"an interval of a fraction of {fraction} of {count} rows")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre, half = (
        fraction + z2 / (2 * count),
        sqrt(z2 * (fraction * (1 - fraction) / count + z2 / (4 * count**2))),
    )
    low, high = ((centre + sign * half) / (1 + z2 / count) for sign in (-1, 1))
    return (0.0 if fraction == 0 else max(0.0, low)), (1.0 if fraction == 1 else min(1.0, high))


def interval(
    values: Tensor, groups: Int64[Tensor, "n"] | None = None, *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of the mean of `values` [n] in [0, 1], in the way that fits them.

    Wilson's where each value is true or false and no two rows belong to one group. Otherwise a bootstrap over
    groups (see `bootstrap`); where all values are 0, or all are 1, of which a bootstrap says nothing,
    Wilson's of as many rows as there are groups.
    """
    count = len(values) if groups is None else len(groups.unique())
    x = values.detach().cpu().double()
    if not len(x):
        raise ValueError("an interval of no rows")
    alone = count == len(x) and values.dtype == torch.bool
    if alone or bool((x == 0).all()) or bool((x == 1).all()):
        return wilson(x.mean().item(), count, confidence)
    return bootstrap(values, groups, confidence=confidence, seed=seed)


def paired_interval(
    a: Tensor,
    b: Tensor,
    groups: Int64[Tensor, "n"] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return (difference, low, high) of mean(b) - mean(a), where `a` and `b` [n] are of the same n rows.

    Rows that both have right, or both wrong, say nothing: this interval is far narrower than two intervals of
    their own. Where both are true or false and no two rows belong to one group: Tango's score interval
    (1998), which leaves out 0 exactly where McNemar's test rejects. Otherwise a bootstrap of b - a.

    Args:
        a, b: hits (bool), or numbers of any kind, such as fractions of rows.
        groups: rows of one group (objects of one image) are not independent; see `bootstrap`.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a paired interval of {len(a)} and {len(b)} rows")
    alone = groups is None or len(groups.unique()) == len(groups)
    if alone and a.dtype == b.dtype == torch.bool:
        gained, lost = int((b & ~a).sum()), int((a & ~b).sum())
        return (gained - lost) / len(a), *tango(gained, lost, len(a), confidence)
    change = b.detach().cpu().double() - a.detach().cpu().double()
    return change.mean().item(), *bootstrap(change, groups, confidence=confidence, seed=seed)


def tango(gained: int, lost: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of (gained - lost) / count, of `count` pairs of which so many differ (Tango,
    1998).

    Its ends are the differences D with (gained - lost - n D)^2 = z^2 n (2 q + D (1 - D)), where q is the most
    likely fraction of lost pairs if D is the true difference.
    """
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2

    def beyond(d: float) -> bool:
        linear = (2 * count - gained + lost) * d - gained - lost
        root = sqrt(max(0.0, linear**2 + 8 * count * lost * d * (1 - d)))
        q = (root - linear) / (4 * count)
        return (gained - lost - count * d) ** 2 > z2 * count * max(0.0, 2 * q + d * (1 - d))

    ends = []
    for outside in (-1.0, 1.0):
        inside = (gained - lost) / count
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if beyond(middle) else (middle, outside)
        ends.append(inside)
    return ends[0], ends[1]


def effective_rank(features: Float[Tensor, "n D"], chunk: int = 65536) -> float:
    """Return exp(entropy) of the normalised singular values of the centred features (Roy and Vetterli, 2007).

    Between 1 and D for features that vary at all: 1 = all on a line, D = spread alike in all directions; 0
    when every row is the same (collapse). Accumulated in float64 through the D x D covariance.
    """
    if len(features) < 2:
        return 0.0
    mean = torch.stack([part.double().sum(dim=0) for part in features.split(chunk)]).sum(dim=0) / len(
        features
    )
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for part in features.split(chunk):
        centred = part.double() - mean
        covariance += centred.T @ centred
    # Centred constants leave rounding noise of float32 features: it is no direction.
    floor = len(features) * (1e-6 * mean.abs().amax()) ** 2
    eigenvalues = torch.linalg.eigvalsh(covariance)
    singular = torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt()
    total = singular.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(singular / total).sum().exp().item()


# -- many classifiers at once --------------------------------------------------------------------------------


SCORING = 256  # rows scored at once


class Judged(NamedTuple):
    """How each of G probes does on rows."""

    right: Bool[Tensor, "G m"]  # whether each row's best class is a right one
    loss: Float64[Tensor, "G"]  # mean cross-entropy of the rows' labels; infinite where that is not finite

    def order(self) -> list[tuple[float, float]]:
        """Return what the best probe has the greatest of: the fraction that is right, and of equals the lower
        loss.
        """
        return [(percent(row), -loss) for row, loss in zip(self.right, self.loss.tolist(), strict=True)]


def judged(
    logits_of: Callable[[slice], Float[Tensor, "G b C"]],
    count: int,
    truth: GroundTruth,
    at_once: int = SCORING,
) -> Judged:
    """Return probes by their logits of `count` rows. One whose scores are not finite has no row right."""
    right, loss = [], []
    for start in range(0, count, at_once):
        rows = slice(start, start + at_once)
        logits = logits_of(rows)
        finite = ~(logits.isnan().any(dim=2) | logits.isposinf().any(dim=2)).cpu()
        right.append(truth.hits(logits, rows) & finite)
        loss.append(cross_entropies(logits.cpu(), truth.labels[rows]).sum(dim=1))
    total = torch.stack(loss).sum(dim=0) / count
    return Judged(torch.cat(right, dim=1), total.nan_to_num(nan=torch.inf, posinf=torch.inf))


def cross_entropies(logits: Float[Tensor, "G m C"], labels: Int64[Tensor, "m"]) -> Float64[Tensor, "G m"]:
    """Return minus the logarithm of each label's probability; 0 where the label is unknown (-1)."""
    log = torch.log_softmax(logits.double(), dim=2)
    own = log.gather(2, labels.clamp(min=0).expand(len(log), -1)[..., None])[..., 0]
    return torch.where(labels >= 0, -own, 0.0)
