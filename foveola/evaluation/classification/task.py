"""The task of a trained probe: rows and labels, the hold-out, what counts as right, batches of features.

The rows that train, those that choose (the hold-out, a fraction of the training images), and those that are
scored (test) never mix. Test labels are read once everything is trained and chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foveola.config import UserError, key
from foveola.evaluation.classification.stream import Stream, labels_of
from foveola.evaluation.classification.training import Columns, FeatureBatch, batches, per_epoch
from foveola.evaluation.features.need import FeedConfig, Need
from foveola.evaluation.features.store import Store
from foveola.evaluation.images import Part, choose_images, identity_for
from foveola.evaluation.metrics import GroundTruth, ground_truth, shared_labels
from foveola.evaluation.protocol import At

PUBLISHED_STEPS = 12500  # steps of DINOv2's linear probe and of CAPI's attentive one, with batches of 1024
HOLDOUT = 0.1  # fraction of the training images that chooses, unless it is said otherwise
MOST_PASSES = (
    100  # passes over the training images after which a published number of steps ends at the latest
)


@dataclass(frozen=True)
class ProbeConfig(FeedConfig):
    """Settings that all trained probes share."""

    holdout: float | None = key(
        None,
        "fraction of the training images that chooses among a grid's probes; 0 = the test set does; "
        "null = 0.1 where there is a choice",
        at_least=0,
        below=1,
    )
    image_size: int | None = key(
        None,
        "pixels a side of the square that is encoded, instead of the encoder's crop; images are resized in "
        "proportion, positions are interpolated",
        at_least=1,
    )
    views: Literal["stream"] | int = key(
        0,
        "random crops of each training image that are stored, which epochs take in turn; stream = new ones "
        "in each epoch, encoded as they are drawn and not stored; 0 = no augmentation",
        at_least=0,
    )


# -- the task ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exam:
    """The rows of a test set that are scored, and what is right on them."""

    test: Store
    score: Int64[Tensor, "m"]  # rows of `test`
    truth: GroundTruth
    device: torch.device
    notes: list[str]

    def columns(self, wanted: Need) -> "Columns":
        """Return their features."""
        return Columns(self.test, self.score, wanted, self.device)


@dataclass(frozen=True)
class Known:
    """The classes that a probe was trained to tell apart."""

    names: tuple[str, ...] | None
    count: int
    present: tuple[int, ...]  # those of which there were images


def open_exam(at: At, config: ProbeConfig, need: Need, known: Known) -> Exam:
    """Open the store of the test set of `at`. Raises UserError for no labels, and no class in common."""
    notes: list[str] = []
    queries = at.open(at.test, config, need)
    found = queries.column("labels")
    score = _labelled(found, "test", notes)
    present = torch.tensor(known.present)
    right = shared_labels(found[score], at.test.classes, present, known.names, notes)
    truth = ground_truth(at.test, known.names, right, queries.image_indices[score], known.count)
    return Exam(queries, score, truth, at.encoder.device, notes)


@dataclass(eq=False)
class Task:
    """Features and labels of a probe: which rows train and choose; and the rows of test that are scored."""

    train: "Store | Stream"  # stored features of all training images, or crops of those that train
    holding: Store  # features of the hold-out: those of `train`, or a store of its own
    labels: Int64[Tensor, "n"]  # of all training images, stored or not; -1 unknown
    fit: Int64[Tensor, "f"]  # rows of the training images that train
    hold: Int64[Tensor, "h"]  # rows of `holding` that choose
    held: GroundTruth  # what is right on them
    known: Known
    exam: Exam
    device: torch.device
    notes: list[str]
    about: dict[str, Any]  # facts of the training images which are known before they are read
    training: dict[str, int] = field(default_factory=dict)  # batch, steps and passes, of trained probes

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.known.count

    def facts(self, exam: Exam) -> dict[str, Any]:
        """Return facts about both sets, for the result."""
        rows = {"fit": len(self.fit), "holdout": len(self.hold), "scored": len(exam.score)}
        trained = {"training": self.training} if self.training else {}
        train = self.about | self.train.facts
        return {"train": train, "test": exam.test.facts, "split": rows, **trained}

    def drawn(
        self, wanted: Need, views: Literal["stream"] | int, batch: int, steps: int, seed: int
    ) -> Iterator[FeatureBatch]:
        """Yield the batches of training, in an order that depends on seed and epoch alone."""
        if isinstance(self.train, Stream):
            return self.train.drawn(wanted, batch, steps, seed)
        stored = int(views)
        columns = Columns(self.train, self.fit, wanted, self.device, stored)
        return batches(columns, self.labels[self.fit], batch, steps, seed, stored)


def open_task(at: At, config: ProbeConfig, need: Need, candidates: int, seed: int | None = None) -> Task:
    """Open the stores of both sources with what is needed, and the split.

    A single candidate leaves nothing to choose: then all training images train, unless `holdout` is given.
    With views=stream training images are not stored, but for the evaluation view of the hold-out. `seed`
    draws the hold-out, in place of that of the settings, which still says which images and crops are read.
    Raises UserError for: no labels, a single class, no class in common, fewer images than a hold-out needs.
    """
    train, notes = at.train, list[str]()
    stored = None if config.views == "stream" else at.open(train, config, need, config.views)
    chosen = choose_images(len(train), config.limit, config.seed)
    labels = labels_of(train, chosen) if stored is None else stored.column("labels")
    rows = _labelled(labels, "train", notes)
    classes = max(int(labels.max()) + 1, len(train.classes or ()))
    present = torch.unique(labels[rows])
    if len(present) < 2:
        raise UserError(f"{train.name}: labels of {len(present)} class; a probe needs two or more")
    if len(present) < classes:
        notes.append(f"train: {classes - len(present)} of {classes} classes have no image")
    fraction = config.holdout if config.holdout is not None else HOLDOUT * (candidates > 1)
    fit, hold = held_out(rows, fraction, config.seed if seed is None else seed, labels[rows])
    if fraction and not len(hold):
        raise UserError(
            f"{train.name}: no class has two labelled images, so none can be held out to choose among "
            f"{candidates} probes; give one (such as lr=), or holdout=0, which lets the test set choose"
        )
    known = Known(train.classes, classes, tuple(present.tolist()))
    exam = open_exam(at, config, need, known)
    about: dict[str, Any] = {}
    learning: Store | Stream
    if stored is None:
        learning = Stream(at.encoder, train, chosen[fit.numpy()], config)
        about = {"name": train.name, "fingerprint": identity_for(train, config).digest}
        about |= {"images": len(chosen), "rows": len(rows)}
        holding, hold = _open_held(at, config, need, chosen[hold.numpy()], exam.test)
    else:
        learning = holding = stored
    held = GroundTruth(holding.column("labels")[hold], holding.image_indices[hold])
    return Task(
        train=learning, holding=holding, labels=labels, fit=fit, hold=hold, held=held, known=known, exam=exam,
        device=at.encoder.device, notes=notes, about=about,
    )  # fmt: skip


def _open_held(
    at: At, config: ProbeConfig, need: Need, images: Int64[np.ndarray, "h"], nothing: Store
) -> tuple[Store, Int64[Tensor, "h"]]:
    """The evaluation view of the hold-out, where training images are not stored; without one, no rows."""
    if not len(images):
        return nothing, torch.zeros(0, dtype=torch.int64)
    store = at.open(Part(at.train, images), replace(config, limit=None), need)
    return store, torch.arange(len(store))


def _labelled(labels: Int64[Tensor, "n"], which: str, notes: list[str]) -> Int64[Tensor, "r"]:
    known = labels >= 0
    if not known.any():
        raise UserError(f"{which}: no labels on its images, which a probe needs")
    if missing := int((~known).sum()):
        notes.append(f"{which}: {missing} images without a label are left out")
    return torch.nonzero(known).flatten()


def held_out(
    rows: Int64[Tensor, "r"], fraction: float, seed: int, labels: Int64[Tensor, "r"] | None = None
) -> tuple[Int64[Tensor, "f"], Int64[Tensor, "h"]]:
    """Return `rows` in two, ascending: those that train, and a drawn `fraction` that chooses.

    At least one row is held out where `fraction` > 0, as long as one can be spared. With `labels` each class
    gives the same fraction, as evenly as whole rows allow, and keeps one row at least: a class that nothing
    trains could only be wrong. Without them all rows count as one class.
    """
    count = max(1, int(fraction * len(rows))) if fraction else 0
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    _, number, sizes = np.unique(
        np.zeros(len(rows), np.int64) if labels is None else labels.numpy(),
        return_inverse=True,
        return_counts=True,
    )
    # The j-th drawn row of a class of n comes at (j + u) / n, u drawn for each class: so any first part of
    # all holds nearly the same fraction of every class.
    of = number[order]
    by_class = np.argsort(of, kind="stable")
    rank = np.empty(len(rows), np.int64)
    rank[by_class] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    at = (rank + rng.random(len(sizes))[of]) / sizes[of]
    spared = np.argsort(np.where(rank < sizes[of] - 1, at, np.inf), kind="stable")
    hold = order[spared[: min(count, len(rows) - len(sizes))]]
    held = torch.zeros(len(rows), dtype=torch.bool)
    held[torch.from_numpy(hold)] = True
    return rows[~held], rows[held]


def length_of(
    rows: int, batch: int, epochs: int | None, iterations: int | None, published: int | None = None
) -> tuple[int, int, int]:
    """Return (batch, steps of an epoch, steps of training), with a batch of at most all rows.

    `published` steps, where neither epochs nor iterations are asked for, are of ImageNet: on a smaller set
    training ends after `MOST_PASSES` passes (DINO's length), which from 128,000 images with batches of 1024
    on are more than DINOv2's 12,500 steps.
    """
    batch = min(batch, rows)
    each = per_epoch(rows, batch)
    if iterations is not None:
        return batch, each, iterations
    if epochs is None and published is not None:
        return batch, each, min(published, MOST_PASSES * each)
    return batch, each, each * (epochs or 1)


def plan_training(task: Task, config: Any, published: int | None = None) -> tuple[int, int, int]:
    """Return the batch, steps of an epoch and steps of training that a probe's settings ask for, as
    `length_of`.

    The task keeps batch and steps with its facts, and notes what is not as published: length, augmentation.
    """
    views, iterations = config.views, getattr(config, "iterations", None)
    if config.epochs is not None or iterations is not None:
        published = None
    length = length_of(len(task.fit), config.batch or 1, config.epochs, iterations, published)
    batch, each, steps = length
    task.training.update(batch=batch, steps=steps, epochs=-(-steps // each))
    if published is not None and steps < published:
        task.notes.append(
            f"{steps:,} steps, {task.training['epochs']} passes over {len(task.fit)} images; published: "
            f"{published:,}, for ImageNet (iterations= or epochs= set another length)"
        )
    if not views:
        task.notes.append("trained on the evaluation view; published probes train on random crops (views=)")
    elif views != "stream" and views < task.training["epochs"]:
        task.notes.append(f"trained on {views} crops of each image in turn; published: new ones each epoch")
    return length
