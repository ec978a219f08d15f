"""Images to rows, in worker processes: decode, resize, crop, and the patch masks of the rows' objects.

An image is decoded and resized once, however many rows it gives. The mask of a row follows the image's own
geometry: the crop is a box in the unit square of the image, and the object mask is resampled at that box.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from foveola.config import key
from foveola.data.sample import BadImage, Objects, Sample
from foveola.data.sources import Source, decode
from foveola.evaluation.images import MaskedConfig
from foveola.geometry import covered_patches
from foveola.geometry import sample as resample
from foveola.models.transform import TransformConfig, image_crop, resize

PARCEL = 8  # images that travel together from a worker

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ExtractConfig(MaskedConfig):
    """Which rows a source gives and how they are computed. Defaults: one row an image, as published."""

    rows: Literal["images", "objects"] = key("images", "one feature for each image, or for each object")
    view: Literal["image", "object"] = key(
        "image", "what the encoder sees of an object: its whole image, or a crop of it"
    )
    context: float = key(
        0.5, "view=object: the crop's side is 1 + this times the longer side of the object's box", at_least=0
    )
    pool: Literal["token", "average", "predictor"] | None = key(
        None, "what stands for an image or object: its token, or the mean of its patches or predictions"
    )

    def __post_init__(self) -> None:
        if self.view == "object" and self.rows != "objects":
            raise ValueError("view=object needs rows=objects")


def object_crop(
    box: Float32[np.ndarray, "4"], height: int, width: int, context: float
) -> tuple[int, int, int, int]:
    """Whole pixels (x0, y0, x1, y1) of a square around an object's box, moved into the image.

    Its side is (1 + context) times the longer side of the box in true pixels. A square that is larger than
    the image in one direction is cut there, and the crop is then no longer square.
    """
    x0, y0, x1, y1 = box.astype(np.float64) * (width, height, width, height)
    side = max(1, round((1 + context) * max(x1 - x0, y1 - y0)))
    (left, right), (upper, lower) = _within(x0 + x1, side, width), _within(y0 + y1, side, height)
    return left, upper, right, lower


def _within(twice: float, side: int, extent: int) -> tuple[int, int]:
    """Both ends of a side around twice / 2, moved or else cut to lie in 0 to extent."""
    length = min(side, extent)
    start = min(max(round((twice - length) / 2), 0), extent - length)
    return start, start + length


def touched(inner: Float32[np.ndarray, "4"], outer: Box, grid: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Which cells of a grid over the box `outer` the box `inner` overlaps."""
    x0, y0, x1, y1 = inner.tolist()
    rows = _overlapped((y0, y1), (outer[1], outer[3]), grid[0])
    return np.outer(rows, _overlapped((x0, x1), (outer[0], outer[2]), grid[1]))


def _overlapped(
    inner: tuple[float, float], outer: tuple[float, float], cells: int
) -> Bool[np.ndarray, "cells"]:
    edges = outer[0] + (outer[1] - outer[0]) * np.arange(cells + 1) / cells
    overlap = np.minimum(inner[1], edges[1:]) - np.maximum(inner[0], edges[:-1])
    return overlap > 1e-6  # touching is not overlapping


class Rows(NamedTuple):
    """The rows of some images, as a worker makes them: V images, R rows."""

    images: UInt8[Tensor, "V 3 S S2"]
    image_of: Int64[Tensor, "R"]  # the image that a row sees
    masks: Bool[Tensor, "R N"]  # the patches that its object token may read
    labels: Int64[Tensor, "R"]
    image_indices: Int64[Tensor, "R"]
    objects: Int64[Tensor, "R"]
    has_mask: Bool[Tensor, "R"]
    bad: Int64[Tensor, "b"]  # images that could not be read
    maps: UInt8[Tensor, "V2 H W"] = torch.zeros(0, 0, 0, dtype=torch.uint8)  # classes of pixels, if asked for

    def without_pixels(self) -> "Rows":
        """Without images and masks, which are large."""
        large = ("images", "image_of", "masks", "maps")
        return self._replace(**{name: getattr(self, name)[:0].clone() for name in large})


def join(parts: Sequence[Rows]) -> Rows:
    """Several `Rows`, at least one, as one."""
    columns = {name: [getattr(part, name) for part in parts] for name in Rows._fields}
    starts = np.cumsum([0, *(len(part.images) for part in parts)]).tolist()
    columns["image_of"] = [part.image_of + start for part, start in zip(parts, starts, strict=False)]
    return Rows(**{name: torch.cat(column) for name, column in columns.items()})


class Images(Dataset):
    """Parcels of images, decoded and cropped, with the patch masks of their rows. An item is `Rows`."""

    def __init__(
        self,
        source: Source,
        chosen: Int64[np.ndarray, "n"],
        transform: TransformConfig,
        patch_size: int,
        config: ExtractConfig,
    ) -> None:
        self.source, self.chosen, self.transform, self.config = source, chosen, transform, config
        self.grid = (transform.crop // patch_size, transform.crop // patch_size)
        half = 0.5 / patch_size**2  # of a pixel
        self.min_coverage = half if config.min_coverage is None else config.min_coverage

    def __len__(self) -> int:
        return -(-len(self.chosen) // PARCEL)

    def __getitem__(self, parcel: int) -> Rows:
        rows = [self.none()]
        for index in self.chosen[parcel * PARCEL : (parcel + 1) * PARCEL].tolist():
            try:  # damaged annotations show when a sample is asked for
                rows.append(self.read(self.source[index], index))
            except BadImage:
                rows.append(self.none()._replace(bad=torch.tensor([index])))
        return join(rows)

    def none(self) -> Rows:
        """No rows, in the right shapes."""
        numbers, flags = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
        images = torch.zeros(0, 3, self.transform.crop, self.transform.crop, dtype=torch.uint8)
        masks = torch.zeros(0, self.grid[0] * self.grid[1], dtype=torch.bool)
        return Rows(images, numbers, masks, numbers, numbers, numbers, flags, numbers)

    def read(self, sample: Sample, index: int) -> Rows:
        """All rows of one image. Raises BadImage."""
        image = decode(sample.image)
        targets = self._targets(sample)
        if not targets:
            return self.none()
        images, boxes, image_of = self._views(image, sample.objects, targets)
        masks = [self._mask(sample.objects, target, box) for target, box in zip(targets, boxes, strict=True)]
        whole = torch.ones(self.grid[0] * self.grid[1], dtype=torch.bool)
        single = self.config.rows == "objects" and sample.objects is not None
        return Rows(
            images=torch.stack(images),
            image_of=torch.tensor(image_of),
            masks=torch.stack([whole if mask is None else mask for mask in masks]),
            labels=torch.tensor([self._label(sample, target) for target in targets]),
            image_indices=torch.full((len(targets),), index),
            objects=torch.tensor([target[0] if single else -1 for target in targets]),
            has_mask=torch.tensor([mask is not None for mask in masks]),
            bad=torch.zeros(0, dtype=torch.int64),
        )

    def _targets(self, sample: Sample) -> list[tuple[int, ...]]:
        """The objects that each row of an image stands for; an image without annotation is one row."""
        if sample.objects is None:
            return [()]
        every = range(len(sample.objects.boxes))
        return [(j,) for j in every] if self.config.rows == "objects" else [tuple(every)]

    def _label(self, sample: Sample, target: tuple[int, ...]) -> int:
        if self.config.rows == "objects" and sample.objects is not None and sample.objects.labels is not None:
            return int(sample.objects.labels[target[0]])
        return -1 if sample.label is None else sample.label

    def _views(
        self, image: UInt8[np.ndarray, "H W 3"], objects: Objects | None, targets: list[tuple[int, ...]]
    ) -> tuple[list[Tensor], list[Box], list[int]]:
        """Images; the box of each row's image in the unit square of the image; the image of each row."""
        height, width = image.shape[:2]
        side, kind = self.transform.crop, self.transform.interpolation
        if self.config.view == "object" and objects is not None:
            crops = [object_crop(objects.boxes[j], height, width, self.config.context) for (j,) in targets]
            images = [resize(image[y0:y1, x0:x1], side, side, kind) for x0, y0, x1, y1 in crops]
            boxes = [(x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in crops]
            return images, boxes, list(range(len(targets)))
        (rows, columns), (top, left) = image_crop(height, width, self.transform)
        view = resize(image, rows, columns, kind)[:, top : top + side, left : left + side]
        box = (left / columns, top / rows, (left + side) / columns, (top + side) / rows)
        return [view], [box] * len(targets), [0] * len(targets)

    def _mask(self, objects: Objects | None, target: tuple[int, ...], box: Box) -> Bool[Tensor, "N"] | None:
        """Patches of a view that the objects `target` cover from `min_coverage` on, or None for no object.

        An object that covers less than that of every patch (a tiny one) keeps the patch that it covers most.
        """
        if objects is None or not target:
            return None
        resize = self.transform.resize
        size = self.config.mask_canvas or max(resize, min(2 * resize, 256))
        canvas, near = np.zeros((size, size), np.uint8), np.zeros(self.grid, bool)
        for j in target:
            canvas = np.maximum(canvas, objects.draw(j, size))
            near |= touched(objects.boxes[j], box, self.grid)
        field = torch.from_numpy(canvas)[None, None].float() / 255
        coverage = resample(field, torch.tensor([[box]]), None, self.grid, kernel="area")[0, 0, 0]
        # A canvas cell on the edge of an object spreads it over the whole cell, perhaps into the next patch.
        coverage = torch.where(torch.from_numpy(near), coverage, 0.0)
        mask = covered_patches(coverage, self.min_coverage, keep_most=True)
        return mask if mask.any() else None
