"""Sheets of predictions: what fine-tuned heads predict for annotated images, the worst and the best."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveola.config import UserError, kind_of
from foveola.data.decode import decode
from foveola.data.sample import IGNORE, BadImage
from foveola.data.segmentation import PixelSource
from foveola.data.shown import rgb_of, shown_channels
from foveola.data.sources import Source
from foveola.data.values import ImagePixels
from foveola.drawing.boxes import paint_objects
from foveola.drawing.classes import paint_classes, palette
from foveola.drawing.sheet import Pixels, Row, Sheet
from foveola.evaluation.segmentation.labelled import labelled_image
from foveola.figures.detections import agreement, annotated
from foveola.models.encoder import Encoder
from foveola.tasks.drawn import drawn_detections
from foveola.tasks.task import Classes, Detections, LabelMap


@dataclass(frozen=True, eq=False)
class Answer:
    """The prediction of a head for an image, its score in [0, 1], and how prediction and truth are drawn."""

    index: int
    prediction: Any  # `Classes`, a `LabelMap` or `Detections`
    score: float
    tiles: tuple[Pixels, ...]
    captions: tuple[str, ...]
    right: tuple[bool | None, ...]


def judged_images(encoder: Encoder, source: Source, indices: Sequence[int]) -> Iterator[Answer]:
    """Yield the predictions for images of a source that can be read and judged, in their order.

    The score of a classifier is what it gives the right class (of several classes: the fraction that are
    rightly there or not there); of a segmenter the fraction of labelled pixels that are right; of a detector
    the `agreement` of what it found and what is annotated. Raises UserError for an encoder without a head,
    and for a head whose answers nobody knows to judge.
    """
    if encoder.head is None:
        raise UserError("answers needs a fine-tuned encoder: this one has no head for a task")
    for index in indices:
        try:
            image = decode(source[index].image)
        except BadImage:  # what evaluations count
            continue
        if (judged := _judged(encoder, source, index, image)) is not None:
            yield judged


def answers_sheet(
    encoder: Encoder, source: Source, indices: Sequence[int], worst: int = 4, best: int = 4
) -> Sheet:
    """Return the worst and the best predictions among images of a source, the truth beside them.

    Raises UserError where no image can be judged.
    """
    # Images may be large: at first their scores alone are kept, and then those that are shown.
    scores = [(each.score, each.index) for each in judged_images(encoder, source, indices)]
    if not scores:
        name = encoder.head.config.name
        raise UserError(f"{source.name}: none of {len(indices)} images has what {name} answers")
    ranked = [index for _, index in sorted(scores, key=lambda pair: pair[0])]
    worse = ranked[: min(worst, len(ranked))]
    better = ranked[len(worse) :][::-1][:best]
    found = {each.index: each for each in judged_images(encoder, source, [*worse, *better])}
    low, high = ([found[index] for index in some] for some in (worse, better))
    groups = [(title, group) for title, group in (("worst", low), ("best", high)) if group]
    if len(groups[0][1][0].tiles) == 1:  # side by side
        columns = [""] * max(len(group) for _, group in groups)
        rows = [
            Row(
                title,
                [each.tiles[0] for each in group],
                [f"{each.captions[0]} ({each.score:.2f})" for each in group],
                [each.right[0] for each in group],
            )
            for title, group in groups
        ]
    else:
        columns = ["image", "truth", "answer"]
        rows = [
            Row(f"{title}: {each.score:.2f}", each.tiles, each.captions, each.right)
            for title, group in groups
            for each in group
        ]
    about = ABOUT_SCORES[type(groups[0][1][0].prediction)]
    note = f"The {len(low)} worst and {len(high)} best of {len(scores)} images. {about}"
    return Sheet("Answers", columns, rows, note)


ABOUT_SCORES: dict[type, str] = {
    Classes: "The number is what the right class got; of several classes, the fraction that are right.",
    LabelMap: "The number is the fraction of labelled pixels that are right. Black: no class.",
    Detections: "The number is 2 R / (F + A): R right ones of F found above a score of 0.5, A annotated.",
}


def _judged(encoder: Encoder, source: Source, index: int, image: ImagePixels) -> Answer | None:
    """None for an image without annotation."""
    (prediction,) = encoder.head.predict(encoder, [image])
    if isinstance(prediction, Classes):
        return _classes(source, index, image, prediction, encoder.head.config.several)
    if isinstance(prediction, LabelMap):
        return _label_map(source, index, prediction)
    if isinstance(prediction, Detections):
        return _detections(source, index, image, prediction)
    raise UserError(f"answers of {encoder.head.config.name} cannot be judged here: {kind_of(prediction)}")


def _classes(source: Source, index: int, image: ImagePixels, answer: Classes, several: bool) -> Answer | None:
    sample, names = source[index], source.classes or ()
    tiles = (rgb_of(image, shown_channels(source)),)
    index_of = {name: i for i, name in enumerate(answer.names)}
    if several:
        truth = {names[i] for i in sample.all_classes()}
        prediction = {
            name for name, score in zip(answer.names, answer.scores.tolist(), strict=True) if score > 0.5
        }
        score = 1 - len(truth ^ prediction) / len(answer.names)
        caption = f"{', '.join(sorted(prediction)) or 'none'} (truth: {', '.join(sorted(truth)) or 'none'})"
        return Answer(index, answer, score, tiles, (caption,), (truth == prediction,))
    if sample.label is None:
        return None
    right = names[sample.label]
    score = float(answer.scores[index_of[right]]) if right in index_of else 0.0
    caption = _plain(answer.best) + ("" if answer.best == right else f", not {_plain(right)}")
    return Answer(index, answer, score, tiles, (caption,), (answer.best == right,))


def _plain(name: str) -> str:
    """The name of a class without the number that ImageNet puts in front of it."""
    return re.sub(r"^n\d{8} ", "", name)


def _label_map(source: Source, index: int, answer: LabelMap) -> Answer | None:
    if not isinstance(source, PixelSource):
        return None
    try:
        image, truth = labelled_image(source, source[index], index)
    except BadImage:
        return None
    index_of = {name: i for i, name in enumerate(answer.names)}
    number = np.full(256, IGNORE, np.uint8)
    number[: len(source.classes)] = [index_of.get(name, IGNORE - 1) for name in source.classes]
    truth, prediction = number[truth], answer.classes.cpu().numpy()
    labelled = truth != IGNORE
    if not labelled.any():
        return None
    score = float((truth == prediction)[labelled].mean())
    colors = palette(len(answer.names))
    largest = np.bincount(prediction[labelled], minlength=len(answer.names)).argsort()[::-1][:3]
    caption = ", ".join(answer.names[i] for i in largest if (prediction[labelled] == i).any())
    shown = rgb_of(image, shown_channels(source))
    tiles = shown, paint_classes(shown, truth, colors), paint_classes(shown, prediction, colors)
    return Answer(index, answer, score, tiles, ("", "", caption), (None, None, None))


def _detections(source: Source, index: int, image: ImagePixels, answer: Detections) -> Answer | None:
    if not source.has_objects:
        return None
    sample = source[index]
    truth, found = annotated(sample, image, source), drawn_detections(answer)
    shown = rgb_of(image, shown_channels(source))
    tiles = shown, paint_objects(shown, truth), paint_objects(shown, found)
    captions = "", f"{len(truth.boxes)} annotated", f"{len(found.boxes)} found"
    return Answer(index, answer, agreement(found, truth), tiles, captions, (None, None, None))
