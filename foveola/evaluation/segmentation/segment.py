"""What a fine-tuned segmenter answers, held against label maps: the protocol `segment`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from torch import Tensor

from foveola import distributed
from foveola.config import UserError, again, key
from foveola.data.sample import IGNORE, Sample
from foveola.data.segmentation import PixelSource
from foveola.evaluation.heads import HeadImages, head_for
from foveola.evaluation.images import ChosenConfig
from foveola.evaluation.paired import packed_areas
from foveola.evaluation.protocol import At, Metric, Outcome, Protocol
from foveola.evaluation.segmentation.iou import named_iou, region_areas, summary
from foveola.evaluation.segmentation.labelled import labelled_image
from foveola.tasks.segmentation import SegmentationHead
from foveola.tasks.sliding import LookConfig


@dataclass(frozen=True)
class SegmentConfig(ChosenConfig):
    """Settings of `segment`. What is null is as it was fine-tuned (`method.look`)."""

    batch_size: int = again(ChosenConfig, "batch_size", 4)
    mode: Literal["slide", "whole"] | None = key(None, "look by windows, or at whole images")
    size: int | None = key(
        None, "pixels of the shorter side to which an image is resized", at_least=1, at_most=2**14
    )
    window: int | None = key(None, "pixels a side of a window", at_least=1, at_most=2**13)
    stride: int | None = key(None, "pixels from one window to the next", at_least=1)
    scales: tuple[float, ...] | None = key(None, "times `size`: average over these scales", above=0)
    flip: bool | None = key(None, "look at mirror images, too")

    def look(self, tuned: LookConfig, patch_size: int) -> LookConfig:
        """Return how images are looked at. Raises UserError for what cannot be."""
        names = ("mode", "size", "window", "stride", "scales", "flip")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        try:
            look = replace(tuned, **given)
            look.check(patch_size)
        except ValueError as error:
            raise UserError(f"segment: {error}") from error
        for name in given.keys() & look.unread().keys():
            raise UserError(f"segment: {name} has no effect: {look.unread()[name]}")
        return look


class LabelledImage(NamedTuple):
    """Some images in their own sizes, with the classes of their pixels."""

    indices: Int64[Tensor, "b"]
    images: tuple[Shaped[np.ndarray, "H W ch"], ...]
    maps: tuple[UInt8[np.ndarray, "H W"], ...]


class PixelCut:
    """Makes a `LabelledImage` of a sample."""

    def __init__(self, source: PixelSource) -> None:
        self.source = source

    def __call__(self, sample: Sample, index: int) -> LabelledImage:
        """Return one image. Raises BadImage, and DataError for a label map that cannot be used."""
        image, labels = labelled_image(self.source, sample, index)
        return LabelledImage(torch.tensor([index]), (image,), (labels,))


class Segment(Protocol):
    """Asks the head of a fine-tuned encoder for the class of each pixel of each test image.

    Pixels are compared in the image's own size. Numbers, in percent: the mean IoU over classes with its 95 %
    interval over images, pixel accuracy, and `mean_accuracy`, the mean over classes of the fraction of their
    pixels that are found. A class that is neither true nor predicted in any image is left out. Classes are
    met by name; where the head says a class that the test data do not have, the pixel is missed.
    """

    name = "segment"
    help = "the class of each pixel, by the head of a fine-tuned encoder"
    Config = SegmentConfig
    metrics = (
        Metric("miou", "Fine-tuned mIoU", "higher", main=True),
        Metric("pixel_accuracy", "Fine-tuned: pixel accuracy", "higher"),
        Metric("mean_accuracy", "Fine-tuned: pixel accuracy, mean over classes", "higher"),
    )

    def measure(self, at: At, config: SegmentConfig) -> Outcome:
        """Return what is measured, each process on a part of the images. Raises UserError for others."""
        head = head_for(
            at.encoder,
            SegmentationHead,
            self.name,
            "segment",
            "linear_segmentation and knn_segmentation measure frozen encoders",
        )
        if not isinstance(at.test, PixelSource):
            raise UserError(
                f"test: {at.test.name} has no label for each pixel; use masks:, voc:, ade20k: and so on"
            )
        look = config.look(head.config.look, at.encoder.patch_size)
        notes: list[str] = []
        numbers = shared_classes(head.classes, at.test.classes, at.test.name, notes)
        began = perf_counter()
        batches: HeadImages[LabelledImage] = HeadImages(at, config, PixelCut(at.test), self.name)
        areas, indices = self._areas(batches, head, look, numbers)
        facts = batches.facts()
        metrics = summary(areas, config.seed)
        del metrics["miou_capi"]
        total = areas.sum(dim=0)[:, :-1].double()
        there = total[2] > 0
        metrics["mean_accuracy"] = 100 * float((total[0] / total[2])[there].mean())
        data = {
            "test": facts | {"rows": len(areas)},
            "class_iou": named_iou(areas, at.test.classes),
            "seconds": round(perf_counter() - began, 2),
        }
        scores = {"miou": packed_areas([areas], indices)}
        return Outcome(metrics, data, tuple(notes), scores=scores)

    def _areas(
        self,
        batches: HeadImages[LabelledImage],
        head: SegmentationHead,
        look: LookConfig,
        numbers: Int64[Tensor, "256"],
    ) -> tuple[Int64[Tensor, "m 3 C1"], Int64[Tensor, "m"]]:
        """Areas of every image of all processes, and their indices."""
        encoder, classes = batches.at.encoder, len(batches.at.test.classes)
        areas, indices = (
            [torch.zeros(0, 3, classes + 1, dtype=torch.int64)],
            [torch.zeros(0, dtype=torch.int64)],
        )
        for batch in batches:
            with batches.reduced():
                found = head.predict(encoder, batch.images, look)
            for one, truth in zip(found, batch.maps, strict=True):
                predicted = numbers[one.classes.long()]
                areas.append(region_areas(predicted, torch.from_numpy(truth), classes)[None])
            indices.append(batch.indices)
        gathered = [distributed.gather_rows(torch.cat(each)) for each in (areas, indices)]
        return gathered[0], gathered[1]


def shared_classes(
    head: Sequence[str], test: Sequence[str], name: str, notes: list[str]
) -> Int64[Tensor, "256"]:
    """Return for each class of the head its number in the test data, met by name; IGNORE where they lack it.

    Raises UserError where the test data have a class that the head never learned.
    """
    number = {each: i for i, each in enumerate(test)}
    if unknown := [each for each in test if each not in set(head)]:
        first = ", ".join(unknown[:3]) + ", ..." * (len(unknown) > 3)
        raise UserError(
            f"test: {name} has {len(unknown)} of {len(test)} classes that the head did not learn ({first}); "
            f"it knows {len(head)}: {', '.join(head[:3])}{', ...' * (len(head) > 3)}"
        )
    if missing := [each for each in head if each not in number]:
        notes.append(
            f"test: {name} lacks {len(missing)} of the head's {len(head)} classes, such as {missing[0]!r}; "
            "pixels of which the head says so are missed"
        )
    found = torch.full((256,), IGNORE, dtype=torch.int64)
    found[: len(head)] = torch.tensor([number.get(each, IGNORE) for each in head])
    return found
