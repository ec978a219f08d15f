"""What a task learns from, image by image: whether a source has it, and its form in a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

from foveola.data.decoding import channels_of, source_depth
from foveola.data.sample import IGNORE, BadImage, DataError, Sample
from foveola.data.sources import PixelSource, Source

Annotations = Literal["labels", "classes", "label_maps", "instances"]
WITH = "docs/data.md says which data strings have them"


@dataclass(frozen=True, eq=False)
class Read:
    """An image that was read: its index in the source, what stands there, its pixels and label map."""

    index: int
    sample: Sample
    pixels: Shaped[np.ndarray, "H W C"]
    label_map: UInt8[np.ndarray, "H W"] | None


def check_annotated(source: Source, annotations: Annotations | None) -> None:
    """Raise DataError where a source has no annotations of the kind that a task learns from."""
    if annotations == "labels" and not source.classes:
        raise DataError(f"{source.name}: has no classes of images; {WITH}")
    if annotations == "classes" and not (source.classes and (source.has_objects or has_several(source))):
        raise DataError(
            f"{source.name}: has neither several classes of images nor objects with classes; {WITH}"
        )
    if annotations == "label_maps" and not isinstance(source, PixelSource):
        raise DataError(f"{source.name}: has no label maps, classes of all pixels; {WITH}")
    if annotations == "instances" and not source.has_objects:
        raise DataError(f"{source.name}: has no annotated objects; {WITH}")


def check_alike(source: Source, pixels: Shaped[np.ndarray, "H W C"]) -> None:
    """Raise BadImage for an image that has other channels or bits than the source says of all."""
    count, bits = pixels.shape[2], 8 * pixels.dtype.itemsize
    known = channels_of(source), source_depth(source)
    if (count, bits) != known:
        raise BadImage(f"{count} channel(s) of {bits} bits, where the data have {known[0]} of {known[1]}")


def has_several(source: Any) -> bool:
    """Return whether images of a source may have several classes, as its first sample says."""
    return source[0].labels is not None


def class_table(samples: Sequence[Sample], count: int) -> Bool[Tensor, "B {count}"]:
    """Return which of `count` classes each image has."""
    table = torch.zeros(len(samples), count, dtype=torch.bool)
    for row, sample in zip(table, samples, strict=True):
        row[sorted(sample.all_classes())] = True
    return table


def stack_label_maps(
    maps: Sequence[UInt8[np.ndarray, "_ _"]], extents: Sequence[Sequence[int]]
) -> UInt8[Tensor, "B R C"]:
    """Return label maps as their images lie on canvases: `extents` rows and columns from the upper left on.

    A cell has the class of the pixel under its centre; beyond an image it is IGNORE.
    """
    rows, columns = (max(sides) for sides in zip(*extents, strict=True))
    stacked = torch.full((len(maps), rows, columns), IGNORE, dtype=torch.uint8)
    for canvas, labels, extent in zip(stacked, maps, extents, strict=True):
        y, x = (
            ((2 * np.arange(n) + 1) * side) // (2 * n) for n, side in zip(extent, labels.shape, strict=True)
        )
        canvas[: extent[0], : extent[1]] = torch.from_numpy(labels[y[:, None], x])
    return stacked
