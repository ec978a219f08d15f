"""What a report was asked for, and the images it measures and draws."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from foveola.config import UserError, key
from foveola.data.decoding import RGB, Decoding
from foveola.data.sample import BadImage, Sample
from foveola.data.sources import Source, decode, open_source
from foveola.data.suited import suited
from foveola.evaluation.features.overlap import overlap_of
from foveola.reports.record import Record

LABELS_LOOKED_AT = 32  # images of which labels are looked for
LIMIT = 1000  # images of each set to use, where nobody says how many
CONTROL, CONTROL_LIMIT = "scenes:", 500  # the built-in control set: products as everybody knows them


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report, besides those of its protocols."""

    out: str | None = key(None, "file to write; null = report.html in the folder of the first run")
    data: str | None = key(None, "images to measure and draw, as a data string; null = those of the run")
    train: str | None = key(None, "labelled images to learn from; null = data")
    test: str | None = key(None, "images to measure on; null = the test split of data")
    protocols: tuple[str, ...] | None = key(
        None,
        "protocols to measure; null = label_free, knn where there are labels, retrieval where "
        "there are objects",
    )
    control: str | None = key(
        None,
        "labelled images of another kind, as a data string, on which forgetting shows; null = scenes: for a "
        "run with starting weights",
    )
    reference: str | None = key(
        None, "another encoder to measure: timm:NAME, hf:NAME, a run, a file of weights"
    )
    checkpoints: int = key(
        4, "largest number of encoders saved on the way to measure, besides the last one", at_least=0
    )
    images: int = key(6, "images to show in each figure; 0 = none", at_least=0)
    limit: int | None = key(
        None,
        "largest number of images of each set to use; null = evaluate.limit of the recipe, or 1000",
        at_least=1,
    )
    device: str | None = key(None, "auto, cpu, cuda, cuda:1; null = auto: a GPU if there is one")


@dataclass(frozen=True, eq=False)
class Data:
    """Images to measure on; what is missing is None, and `notes` say why."""

    train: Source | None = None
    test: Source | None = None
    labels: str | None = None  # what carries labels in both: "images" or "objects"
    notes: tuple[str, ...] = ()

    def overlap(self, limit: int | None = LIMIT, seed: int = 0) -> bool:
        """Return whether images that a protocol with these settings measures are among those that it learns
        from.
        """
        if self.train is None or self.test is None:
            return False
        return overlap_of(self.train, self.test, limit, seed).count > 0


def open_data(record: Record, config: ReportConfig) -> Data:
    """Return the images of a run, or those asked for. UserError for these; the run's own may be gone."""
    asked = config.train or config.data, config.test or config.data or config.train
    own = record.get("evaluate_train") or record.get("data")
    train, test = asked[0] or own, asked[1] or record.get("evaluate_test") or own
    if train is None or test is None:
        return Data(notes=("The run names no images; give data=, or train= and test=.",))
    try:
        return _opened(str(train), str(test), record)
    except UserError as error:
        if any(asked):
            raise
        return Data(notes=(f"The images of the run cannot be opened ({error}); say where they are: data=.",))


def open_control(record: Record, config: ReportConfig) -> Data | None:
    """Return the control set of a run; None where there is none. Raises UserError for one without labels."""
    other = record.get("model.channels", RGB) != RGB  # than the built-in images have
    if config.control is None and (record.start is None or other):
        return None
    name = config.control or CONTROL
    data = _opened(name, name, record)
    if data.labels is None:
        raise UserError(f"control={name} has no labels, which k-NN needs to tell what was forgotten")
    return data


def _opened(train: str, test: str, record: Record) -> Data:
    usual = Decoding.of(*(record.get(f"pixels.{name}") for name in ("range", "channels", "pages", "show")))
    channels = record.get("model.channels", RGB)
    opened = open_source(train, "train"), open_source(test, "test")
    sources = [suited(each, usual, channels) for each in opened]
    labelled = _labelled(sources[0]) & _labelled(sources[1])
    rows = record.get("evaluate.rows", "images")
    return Data(*sources, labels=rows if rows in labelled else min(labelled, default=None))


def _labelled(source: Source) -> set[str]:
    """What carries labels in the first images of a source: images, objects, both or nothing."""
    found: set[str] = set()
    if source.classes is None:
        return found
    for sample in _samples(source, range(min(LABELS_LOOKED_AT, len(source)))):
        if sample.label is not None and sample.label >= 0:
            found.add("images")
        if sample.objects is not None and sample.objects.labels is not None:
            found.add("objects")
    return found


def _samples(source: Source, indices: Sequence[int]) -> list[Sample]:
    """The samples that are there; unreadable ones are left out."""
    samples = []
    for index in indices:
        try:
            samples.append(source[index])
        except BadImage:
            continue
    return samples


def choose_samples(source: Source, count: int, seed: int = 0) -> list[tuple[int, Sample]]:
    """Return `count` images of a source drawn by seed: index and sample with pixels; fewer where some are
    bad.
    """
    return list(each_sample(source, count, seed))


def each_sample(source: Source, count: int, seed: int = 0) -> Iterator[tuple[int, Sample]]:
    """Yield what `choose_samples` chooses, one by one: no more than one image is in memory."""
    left = count
    for index in np.random.default_rng(seed).permutation(len(source)).tolist():
        if not left:
            break
        for sample in _samples(source, (index,)):
            try:
                pixels = decode(sample.image)
            except BadImage:
                continue
            left -= 1
            yield index, replace(sample, image=pixels)
