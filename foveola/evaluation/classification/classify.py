"""What a fine-tuned classifier answers, held against labels: the protocol `classify`."""

from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean
from time import perf_counter
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from foveola import distributed
from foveola.config import UserError
from foveola.data.annotated import check_annotated, class_table
from foveola.data.sample import Sample
from foveola.data.sources import decode
from foveola.evaluation.classification.several import in_classes, mean_average_precision
from foveola.evaluation.heads import HeadImages, head_for
from foveola.evaluation.images import ChosenConfig, join
from foveola.evaluation.metrics import ground_truth, interval, percent, shared_labels
from foveola.evaluation.paired import packed
from foveola.evaluation.protocol import At, Metric, Outcome, Protocol
from foveola.models.transform import TransformConfig, evaluation_view
from foveola.tasks.classification import ClassificationHead

CONFUSIONS = 20  # pairs of classes that a result names


@dataclass(frozen=True)
class ClassifyConfig(ChosenConfig):
    """Settings of `classify`."""


class LabelledView(NamedTuple):
    """Some images as a classifier sees them, with their labels (-1: not known), or all their classes."""

    indices: Int64[Tensor, "b"]
    pixels: Shaped[Tensor, "b ch S S"]
    labels: Int64[Tensor, "b"]
    classes: Bool[Tensor, "b K"]  # none, where an image has one


class ViewCut:
    """Makes a `LabelledView` of an image."""

    def __init__(self, transform: TransformConfig, classes: int) -> None:
        self.transform, self.classes = transform, classes

    def __call__(self, sample: Sample, index: int) -> LabelledView:
        """Return one image. Raises BadImage."""
        pixels = evaluation_view(decode(sample.image), self.transform).pixels[None]
        label = -1 if sample.label is None else sample.label
        several = self.classes > 0  # a head for one class asks for the label alone, not for objects
        table = class_table([sample], self.classes) if several else torch.zeros(1, 0, dtype=torch.bool)
        return LabelledView(torch.tensor([index]), pixels, torch.tensor([label]), table)


class Answered(NamedTuple):
    """Predictions of a head for images of all processes, and their true classes."""

    indices: Int64[Tensor, "n"]
    labels: Int64[Tensor, "n"]
    classes: Bool[Tensor, "n K"]
    logits: Float[Tensor, "n C"]


class Classify(Protocol):
    """Asks the head of a fine-tuned encoder for the class, or all classes, of each test image.

    Numbers, in percent, of a head for one class: `top1` and `top5` with the 95 % interval of `top1` over
    images, `mean_class` (the mean over classes of the fraction of their images that are right). Classes are
    met by name; an image of a class that the head does not know counts as wrong. ImageNet's other test sets
    count as they do for k-NN. Of a head for several classes: `map`, the mean over classes of their average
    precision, with its interval.
    """

    name = "classify"
    help = "the classes of each image, by the head of a fine-tuned encoder"
    Config = ClassifyConfig
    metrics = (
        Metric("top1", "Fine-tuned top-1", "higher", chance=1, main=True),
        Metric("map", "Fine-tuned mean average precision", "higher", main=True),
        Metric("top5", "Fine-tuned top-5", "higher", chance=5),
        Metric("mean_class", "Fine-tuned, mean over classes", "higher", chance=1),
    )

    def measure(self, at: At, config: ClassifyConfig) -> Outcome:
        """Classify all images of the test data, each process a part of them."""
        head = head_for(
            at.encoder,
            ClassificationHead,
            self.name,
            "classify",
            "knn, logistic and linear measure frozen encoders",
        )
        several = head.config.several
        check_annotated(at.test, "classes" if several else "labels")
        began = perf_counter()
        cut = ViewCut(at.encoder.config.transform, len(at.test.classes or ()) if several else 0)
        batches: HeadImages[LabelledView] = HeadImages(at, config, cut, self.name)
        answered = _ask(batches, head, cut.classes)
        facts = batches.facts()
        found = _of_several(answered, at, head, config) if several else _of_one(answered, at, head, config)
        data = {"test": facts | found.data, "seconds": round(perf_counter() - began, 2)}
        return replace(found, data=data)


def _ask(batches: HeadImages[LabelledView], head: ClassificationHead, classes: int) -> Answered:
    """What the head says of all images of all processes."""
    encoder, empty = batches.at.encoder, torch.zeros(0, dtype=torch.int64)
    table = torch.zeros(0, classes, dtype=torch.bool)
    parts = [Answered(empty, empty, table, torch.zeros(0, len(head.classes)))]
    for batch in batches:
        with torch.no_grad(), batches.reduced():
            pixels = encoder.normalise(batch.pixels.to(encoder.device))
            logits = head.logits(encoder.backbone, pixels).cpu()
        parts.append(Answered(batch.indices, batch.labels, batch.classes, logits))
    mine: Answered = join(parts)
    return Answered(*map(distributed.gather_rows, mine))


def _of_one(answered: Answered, at: At, head: ClassificationHead, config: ClassifyConfig) -> Outcome:
    """Numbers of images that have one class each."""
    known, notes = answered.labels >= 0, []
    if not known.any():
        raise UserError(f"test: {at.test.name} has no labels on its images, which classify needs")
    if missing := int((~known).sum()):
        notes.append(f"test: {missing} images without a label are left out")
    indices, labels, logits = (each[known] for each in (answered.indices, answered.labels, answered.logits))
    everything, given = torch.arange(len(head.classes)), labels
    labels = shared_labels(labels, at.test.classes, everything, head.classes, notes, "the head")
    truth = ground_truth(at.test, head.classes, labels, indices, len(head.classes))
    right, top5 = truth.hits(logits), truth.top5(logits)
    low, high = interval(right, seed=config.seed)
    metrics = {
        "top1": percent(right),
        "top1_low": 100 * low,
        "top1_high": 100 * high,
        "top5": percent(top5),
        "mean_class": fmean(percent(right[given == c]) for c in given.unique()),
    }
    scores = {"top1": packed(right, indices), "top5": packed(top5, indices)}
    facts = {"rows": len(labels), "confusions": confusions(labels, truth.best(logits), right, head.classes)}
    return Outcome(metrics, facts, tuple(notes), scores=scores)


def confusions(
    labels: Int64[Tensor, "n"],
    predicted: Int64[Tensor, "n"],
    right: Bool[Tensor, "n"],
    names: tuple[str, ...],
) -> list[tuple[str, str, int]]:
    """Return the most frequent mistakes: the right class, the one predicted instead, how often.

    Images of a class that is not in `names` (-1) are left out.
    """
    wrong = ~right & (labels >= 0)
    pairs = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    ranked = sorted(pairs.items(), key=lambda each: (-each[1], each[0]))[:CONFUSIONS]
    return [(names[right], names[other], count) for (right, other), count in ranked]


def _of_several(answered: Answered, at: At, head: ClassificationHead, config: ClassifyConfig) -> Outcome:
    """Numbers of images that may have several classes, over the classes that head and data share."""
    names, notes = at.test.classes or (), []
    shared = [i for i, name in enumerate(head.classes) if name in names]
    right = in_classes(answered.classes, names, head.classes)[:, shared]
    if not right.any():
        raise UserError(f"test: {at.test.name} has no image of a class that the head knows")
    if missing := len(set(names) - set(head.classes)):
        notes.append(f"test: {missing} of {len(names)} classes are unknown to the head, and do not count")
    value, low, high = mean_average_precision(answered.logits[:, shared], right, config.seed)
    metrics = {"map": 100 * value, "map_low": 100 * low, "map_high": 100 * high}
    return Outcome(metrics, {"rows": len(right), "classes": int(right.any(dim=0).sum())}, tuple(notes))
