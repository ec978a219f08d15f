"""What counts as right on a test set: labels met by class name, several right answers, candidates."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foveola.config import UserError
from foveola.data.sources import Source


@dataclass(frozen=True, eq=False)
class Answers:
    """What counts as right on the rows of a test set, in the numbering of the training classes."""

    labels: Int64[Tensor, "m"]  # -1: a class that train lacks, always wrong
    image_indices: Int64[Tensor, "m"]
    others: tuple[Int64[Tensor, "_"], ...] | None = None  # all right answers of each row (ReaL)
    candidates: Bool[Tensor, "C"] | None = None  # classes that may be predicted (ImageNet-A, ObjectNet)

    @cached_property
    def right(self) -> Int64[Tensor, "m a"]:
        """The right answers of each row, filled up with -1."""
        if self.others is None:
            return self.labels[:, None]
        return pad_sequence(list(self.others), batch_first=True, padding_value=-1)

    def among(self, found: Int64[Tensor, "*G m r"], rows: slice = slice(None)) -> Bool[Tensor, "*G m"]:
        """Return whether any of the classes found for each row is a right answer of it; -1 is no class."""
        right = self.right[rows][:, None]
        return ((found[..., None] == right) & (right >= 0)).flatten(-2).any(dim=-1)

    def hits(self, logits: Float[Tensor, "*G m C"], rows: slice = slice(None)) -> Bool[Tensor, "*G m"]:
        """Return whether the best (candidate) class of each row is right."""
        return self.among(self.best(logits)[..., None], rows)

    def best(self, logits: Float[Tensor, "*G m C"]) -> Int64[Tensor, "*G m"]:
        """Return the (candidate) class of highest score of each row, on the CPU."""
        return self._allowed(logits).argmax(dim=-1).cpu()

    def top5(self, logits: Float[Tensor, "m C"]) -> Bool[Tensor, "m"]:
        """Return whether a right answer is among the five (candidate) classes of highest score."""
        scores, classes = self._allowed(logits).topk(min(5, logits.shape[1]), dim=1)
        return self.among(torch.where(scores == -torch.inf, -1, classes).cpu())

    def _allowed(self, logits: Tensor) -> Tensor:
        if self.candidates is None:
            return logits
        return logits.masked_fill(~self.candidates.to(logits.device), -torch.inf)


def answers_of(
    test: Source,
    names: tuple[str, ...] | None,
    labels: Int64[Tensor, "m"],
    image_indices: Int64[Tensor, "m"],
    classes: int,
) -> Answers:
    """Return rows with these labels (`shared_labels`), and what some test sets of ImageNet's say besides a
    label.

    `names` are those of the `classes` that training knows. `data.imagenet.Variant` has both:
    `answers(index)`, all right answers, and `candidates`.
    """
    names = names or ()
    place = {name: i for i, name in enumerate(names)}
    matched = test.classes is not None and bool(names)
    named = [place.get(name, -1) for name in test.classes or ()] if matched else range(classes)
    number = dict(enumerate(named))  # of a class of test, in train; a class that train lacks has -1
    others = candidates = None
    answers: Callable[[int], Any] | None = getattr(test, "answers", None)
    if answers is not None:
        lists = [[number.get(int(label), -1) for label in answers(i)] for i in image_indices.tolist()]
        if any(len(some) != 1 for some in lists):
            others = tuple(torch.tensor([n for n in some if n >= 0], dtype=torch.int64) for some in lists)
    if allowed := getattr(test, "candidates", None):
        candidates = torch.zeros(classes, dtype=torch.bool)
        candidates[[number[label] for label in allowed if number.get(label, -1) >= 0]] = True
    return Answers(labels, image_indices, others, candidates)


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
