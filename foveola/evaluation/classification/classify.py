"""What a fine-tuned classifier answers, held against labels: the protocol `classify`."""

from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from foveola import distributed
from foveola.config import UserError
from foveola.data.sample import Sample
from foveola.data.sources import decode
from foveola.evaluation.classification.truth import answers_of, shared_labels
from foveola.evaluation.images import (
    Batches,
    ChosenConfig,
    Images,
    choose_images,
    facts_of_bad,
    identity_for,
    share_of_rank,
)
from foveola.evaluation.metrics import interval, percent
from foveola.evaluation.paired import packed
from foveola.evaluation.protocol import At, Metric, Outcome, Protocol
from foveola.models.encoder import Encoder
from foveola.models.transform import TransformConfig, evaluation_view
from foveola.tasks.classification import ClassificationHead


@dataclass(frozen=True)
class ClassifyConfig(ChosenConfig):
    """Settings of `classify`."""


class LabelledView(NamedTuple):
    """Some images as a classifier sees them, with their labels; -1: not known."""

    indices: Int64[Tensor, "b"]
    pixels: UInt8[Tensor, "b 3 S S"]
    labels: Int64[Tensor, "b"]


class ViewCut:
    """Makes a `LabelledView` of an image."""

    def __init__(self, transform: TransformConfig) -> None:
        self.transform = transform

    def __call__(self, sample: Sample, index: int) -> LabelledView:
        """Return one image. Raises BadImage."""
        pixels = evaluation_view(decode(sample.image), self.transform).pixels[None]
        label = -1 if sample.label is None else sample.label
        return LabelledView(torch.tensor([index]), pixels, torch.tensor([label]))


class Classify(Protocol):
    """Asks the head of a fine-tuned encoder for the class of each test image.

    Numbers, in percent: `top1` and `top5` with the 95 % interval of `top1` over images, `mean_class` (the
    mean over classes of the share of their images that are right). Classes are met by name; an image of a
    class that the head does not know counts as wrong. ImageNet's other test sets count as they do for k-NN.
    """

    name = "classify"
    help = "the class of each image, by the head of a fine-tuned encoder"
    Config = ClassifyConfig
    metrics = (
        Metric("top1", "Fine-tuned top-1", "higher", chance=1, main=True),
        Metric("top5", "Fine-tuned top-5", "higher", chance=5),
        Metric("mean_class", "Fine-tuned, mean over classes", "higher", chance=1),
    )

    def measure(self, at: At, config: ClassifyConfig) -> Outcome:
        """Classify all images of the test data, each process its share."""
        head = classifier_of(at.encoder)
        began, notes = perf_counter(), []
        chosen = choose_images(len(at.test), config.limit, config.seed)
        indices, labels, logits, bad = self._answers(at, head, config, chosen)
        facts = facts_of_bad(bad, len(chosen), at.test)
        known = labels >= 0
        if not known.any():
            raise UserError(f"test: {at.test.name} has no labels on its images, which classify needs")
        if missing := int((~known).sum()):
            notes.append(f"test: {missing} images without a label are left out")
        indices, labels, logits = indices[known], labels[known], logits[known]
        everything = torch.arange(len(head.classes))
        labels = shared_labels(labels, at.test.classes, everything, head.classes, notes)
        answers = answers_of(at.test, head.classes, labels, indices, len(head.classes))
        right, top5 = answers.hits(logits), answers.top5(logits)
        low, high = interval(right, seed=config.seed)
        metrics = {
            "top1": percent(right),
            "top1_low": 100 * low,
            "top1_high": 100 * high,
            "top5": percent(top5),
            "mean_class": sum(percent(right[labels == c]) for c in labels.unique()) / len(labels.unique()),
        }
        named = {"name": at.test.name, "fingerprint": identity_for(at.test, config).digest}
        named |= facts | {"images": len(chosen), "rows": len(labels)}
        data = {"test": named, "seconds": round(perf_counter() - began, 2)}
        scores = {"top1": packed(right, indices), "top5": packed(top5, indices)}
        return Outcome(metrics, data, tuple(notes), scores=scores)

    def _answers(
        self, at: At, head: ClassificationHead, config: ClassifyConfig, chosen: Any
    ) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "n"], Float[Tensor, "n C"], Int64[Tensor, "b"]]:
        """Indices, labels and logits of all images of all processes, and those that cannot be read."""
        encoder = at.encoder
        images = Images(at.test, chosen[share_of_rank(len(chosen))], ViewCut(encoder.config.transform))
        batches: Batches[LabelledView] = Batches(images, config, f"classify {at.test.name}", at.progress)
        found = [(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))]
        logits = [torch.zeros(0, len(head.classes))]
        reduced = torch.autocast(encoder.device.type, torch.bfloat16) if config.precision == "bf16" else None
        for batch in batches:
            with torch.no_grad(), reduced or nullcontext():
                pixels = encoder.normalise(batch.pixels.to(encoder.device))
                logits.append(head.logits(encoder.backbone, pixels).cpu())
            found.append((batch.indices, batch.labels))
        indices, labels = (torch.cat(column) for column in zip(*found, strict=True))
        gathered = [distributed.gather_rows(each) for each in (indices, labels, torch.cat(logits))]
        return gathered[0], gathered[1], gathered[2], batches.gathered_bad()


def classifier_of(encoder: Encoder) -> ClassificationHead:
    """Return the head of an encoder. Raises UserError where it has none, or one for another task."""
    if not isinstance(encoder.head, ClassificationHead):
        what = "no head" if encoder.head is None else f"a head for {encoder.head.config.name}"
        raise UserError(
            f"classify asks a head that was fine-tuned to classify; this encoder has {what} (knn, logistic "
            "and linear measure frozen encoders)"
        )
    return encoder.head
