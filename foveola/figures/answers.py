"""Sheets of answers: what the head of a fine-tuned encoder says of annotated images, worst and best."""

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from foveola.config import UserError
from foveola.data.decode import decode
from foveola.data.sample import IGNORE, BadImage
from foveola.data.segmentation import PixelSource
from foveola.data.sources import Source
from foveola.drawing.boxes import paint_objects
from foveola.drawing.sheet import Pixels, Row, Sheet
from foveola.figures.detections import agreement, annotated, drawn_detections
from foveola.models.encoder import Encoder
from foveola.tasks.task import Classes, Detections, LabelMap

SHOWN_FROM = 0.5  # score from which a detection is drawn, and counts as an answer
READ_TOGETHER = 16  # images that are in memory at once


@dataclass(frozen=True, eq=False)
class Answer:
    """What a head said of an image, how good it is (in [0, 1]), and how both are drawn."""

    index: int
    name: str
    score: float
    tiles: tuple[Pixels, ...]
    captions: tuple[str, ...]
    right: tuple[bool | None, ...]


def answers(encoder: Encoder, source: Source, indices: Sequence[int]) -> list[Answer]:
    """Return the answers for images of a source that can be read and judged, in their order.

    The score of a classifier is what it gives the right class (of several classes: the share that are rightly
    there or not there); of a segmenter the share of labelled pixels that are right; of a detector the
    `agreement` of what it found and what is annotated. Raises UserError
    for an encoder without a head, and where no image can be judged.
    """
    if encoder.head is None:
        raise UserError("answers needs a fine-tuned encoder: this one has no head for a task")
    found: list[Answer] = []
    for start in range(0, len(indices), READ_TOGETHER):
        group, images = [], []
        for index in indices[start : start + READ_TOGETHER]:
            try:
                images.append(decode(source[index].image))
                group.append(index)
            except BadImage:  # what evaluations count
                continue
        said = encoder.predict(images) if images else []
        for index, image, answer in zip(group, images, said, strict=True):
            if (judged := _judged(source, index, image, answer)) is not None:
                found.append(judged)
    if not found:
        raise UserError(
            f"{source.name}: none of {len(indices)} images has what {encoder.head.config.name} answers"
        )
    return found


def answers_sheet(
    encoder: Encoder, source: Source, indices: Sequence[int], worst: int = 4, best: int = 4
) -> Sheet:
    """Return the worst and the best answers among images of a source, the truth beside what was said."""
    found = sorted(answers(encoder, source, indices), key=lambda each: each.score)
    low = found[: min(worst, len(found))]
    high = found[len(low) :][::-1][:best]
    groups = [(title, group) for title, group in (("worst", low), ("best", high)) if group]
    if len(found[0].tiles) == 1:  # side by side
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
    note = f"The {len(low)} worst and {len(high)} best of {len(found)} images. {ABOUT_SCORES[_kind(encoder)]}"
    return Sheet("Answers", columns, rows, note)


ABOUT_SCORES = {
    "classification": "The number is what the right class got; of several classes, the share that are right.",
    "segmentation": "The number is the share of labelled pixels that are right. Black: no class.",
    "detection": "The number is 2 R / (F + A): R right ones of F found above a score of 0.5, A annotated.",
}


def _kind(encoder: Encoder) -> str:
    name = encoder.head.config.name
    return name if name in ABOUT_SCORES else "classification"


def _judged(source: Source, index: int, image: Pixels, answer: Any) -> Answer | None:
    """None for an image without annotation."""
    if isinstance(answer, Classes):
        return _classes(source, index, image, answer)
    if isinstance(answer, LabelMap):
        return _label_map(source, index, image, answer)
    return _detections(source, index, image, answer)


def _classes(source: Source, index: int, image: Pixels, answer: Classes) -> Answer | None:
    sample, names = source[index], source.classes or ()
    place = {name: i for i, name in enumerate(answer.names)}
    if sample.labels is not None or (sample.label is None and sample.objects is not None):
        truth = {names[i] for i in sample.all_classes()}
        said = {name for name, score in zip(answer.names, answer.scores.tolist(), strict=True) if score > 0.5}
        score = 1 - len(truth ^ said) / len(answer.names)
        caption = f"{', '.join(sorted(said)) or 'none'} (truth: {', '.join(sorted(truth)) or 'none'})"
        return Answer(index, sample.name, score, (image,), (caption,), (truth == said,))
    if sample.label is None:
        return None
    right = names[sample.label]
    score = float(answer.scores[place[right]]) if right in place else 0.0
    caption = _plain(answer.best) + ("" if answer.best == right else f", not {_plain(right)}")
    return Answer(index, sample.name, score, (image,), (caption,), (answer.best == right,))


def _plain(name: str) -> str:
    """The name of a class without the number that ImageNet puts in front of it."""
    return re.sub(r"^n\d{8} ", "", name)


def _label_map(source: Source, index: int, image: Pixels, answer: LabelMap) -> Answer | None:
    if not isinstance(source, PixelSource):
        return None
    try:
        truth = source.label_map(index)
    except BadImage:
        return None
    place = {name: i for i, name in enumerate(answer.names)}
    number = np.full(256, IGNORE, np.uint8)
    number[: len(source.classes)] = [place.get(name, IGNORE - 1) for name in source.classes]
    truth, said = number[truth], answer.classes.cpu().numpy()
    labelled = truth != IGNORE
    if not labelled.any():
        return None
    score = float((truth == said)[labelled].mean())
    colors = palette(len(answer.names))
    largest = np.bincount(said[labelled], minlength=len(answer.names)).argsort()[::-1][:3]
    caption = ", ".join(answer.names[i] for i in largest if (said[labelled] == i).any())
    tiles = image, _painted(image, truth, colors), _painted(image, said, colors)
    return Answer(index, source[index].name, score, tiles, ("", "", caption), (None, None, None))


def _painted(image: Pixels, classes: UInt8[np.ndarray, "H W"], colors: UInt8[np.ndarray, "C 3"]) -> Pixels:
    """Classes as colours, over the brightness of the image."""
    table = np.zeros((256, 3), np.float32)
    table[: len(colors)] = colors
    light = image.mean(axis=2, keepdims=True) / 255
    return np.rint(table[classes] * (0.55 + 0.45 * light)).astype(np.uint8)


def palette(count: int) -> UInt8[np.ndarray, "{count} 3"]:
    """Return colours that are far apart: hues by the golden ratio, in three degrees of light."""
    hues = [(i * 0.61803398875) % 1 for i in range(count)]
    made = [colorsys.hsv_to_rgb(hue, 0.75, (1.0, 0.8, 0.6)[i % 3]) for i, hue in enumerate(hues)]
    return np.rint(255 * np.array(made).reshape(count, 3)).astype(np.uint8)


def _detections(source: Source, index: int, image: Pixels, answer: Detections) -> Answer | None:
    if not source.has_objects:
        return None
    sample = source[index]
    truth, found = annotated(sample, image, source), drawn_detections(answer, SHOWN_FROM)
    tiles = image, paint_objects(image, truth), paint_objects(image, found)
    captions = "", f"{len(truth.boxes)} annotated", f"{len(found.boxes)} found"
    return Answer(index, sample.name, agreement(found, truth), tiles, captions, (None, None, None))
