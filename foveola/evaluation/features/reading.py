"""Images to rows: decode, resize, crop, and the patch masks of the rows' objects.

An image is decoded and resized once, however many rows it gives. The mask of a row follows the image's own
geometry: the crop is a box in the unit square of the image, and the object mask is resampled at that box.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from foveola.config import key
from foveola.data.sample import Objects, Sample
from foveola.data.sources import decode
from foveola.evaluation.images import MaskedConfig
from foveola.geometry import covered_patches
from foveola.geometry import sample as resample
from foveola.models.transform import Box, TransformConfig, View, crop_view, evaluation_view


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
    """Return whole pixels (x0, y0, x1, y1) of a square around an object's box, moved into the image.

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
    """Return which cells of a grid over the box `outer` the box `inner` overlaps."""
    x0, y0, x1, y1 = inner.tolist()
    rows = _overlapped((y0, y1), (outer[1], outer[3]), grid[0])
    return np.outer(rows, _overlapped((x0, x1), (outer[0], outer[2]), grid[1]))


def _overlapped(
    inner: tuple[float, float], outer: tuple[float, float], cells: int
) -> Bool[np.ndarray, "cells"]:
    edges = outer[0] + (outer[1] - outer[0]) * np.arange(cells + 1) / cells
    overlap = np.minimum(inner[1], edges[1:]) - np.maximum(inner[0], edges[:-1])
    return overlap > 1e-6  # touching is not overlapping


class ImageRows(NamedTuple):
    """The rows of some images, as a worker makes them: V views, R rows."""

    image_indices: Int64[Tensor, "R"]
    objects: Int64[Tensor, "R"]
    labels: Int64[Tensor, "R"]
    masks: Bool[Tensor, "R N"]  # the patches that its object token may read
    has_mask: Bool[Tensor, "R"]
    images: UInt8[Tensor, "V 3 S S2"]
    rows: Int64[Tensor, "V"]  # how many rows see each view, one after the other
    maps: UInt8[Tensor, "V2 H W"] = torch.zeros(0, 0, 0, dtype=torch.uint8)  # classes of pixels, if asked for

    @property
    def image_of(self) -> Int64[Tensor, "R"]:
        """The view that a row sees."""
        return torch.arange(len(self.rows)).repeat_interleave(self.rows)


class PatchMasks:
    """The rule from the masks of objects to the patches that their token may read."""

    def __init__(self, transform: TransformConfig, patch_size: int, config: MaskedConfig) -> None:
        self.grid = (transform.crop // patch_size, transform.crop // patch_size)
        half = 0.5 / patch_size**2  # of a pixel
        self.min_coverage = half if config.min_coverage is None else config.min_coverage
        self.canvas = config.mask_canvas or max(transform.resize, min(2 * transform.resize, 256))

    def __call__(
        self, objects: Objects | None, target: tuple[int, ...], box: Box
    ) -> Bool[Tensor, "N"] | None:
        """Patches of a view that the objects `target` cover from `min_coverage` on, or None for no object.

        An object that covers less than that of every patch (a tiny one) keeps the patch that it covers most.
        """
        if objects is None or not target:
            return None
        canvas, near = np.zeros((self.canvas, self.canvas), np.uint8), np.zeros(self.grid, bool)
        for j in target:
            canvas = np.maximum(canvas, objects.draw(j, self.canvas))
            near |= touched(objects.boxes[j], box, self.grid)
        field = torch.from_numpy(canvas)[None, None].float() / 255
        coverage = resample(field, torch.tensor([[box]]), None, self.grid, kernel="area")[0, 0, 0]
        # A canvas cell on the edge of an object spreads it over the whole cell, perhaps into the next patch.
        coverage = torch.where(torch.from_numpy(near), coverage, 0.0)
        mask = covered_patches(coverage, self.min_coverage, keep_most=True)
        return mask if mask.any() else None


class RowsCut:
    """Makes the rows of an image that an `ExtractConfig` asks for."""

    def __init__(self, transform: TransformConfig, patch_size: int, config: ExtractConfig) -> None:
        self.transform, self.config = transform, config
        self.masks = PatchMasks(transform, patch_size, config)

    def __call__(self, sample: Sample, index: int) -> ImageRows:
        """All rows of one image; one without annotation is one row. Raises BadImage."""
        image, objects = decode(sample.image), sample.objects
        single = self.config.rows == "objects" and objects is not None
        every = range(0 if objects is None else len(objects))
        targets = [(j,) for j in every] if single else [tuple(every)]
        if self.config.view == "object" and objects is not None:
            height, width = image.shape[:2]
            crops = [object_crop(objects.boxes[j], height, width, self.config.context) for (j,) in targets]
            views = [crop_view(image, crop, self.transform) for crop in crops]
        else:
            views = [evaluation_view(image, self.transform)]
        seen = views if len(views) == len(targets) else views * len(targets)
        masks = [self.masks(objects, target, view.box) for target, view in zip(targets, seen, strict=True)]
        rows = rows_of(sample, index, views, masks, self.masks.grid)
        if not single or objects is None:
            return rows
        rows = rows._replace(objects=torch.arange(len(objects)))
        return rows if objects.labels is None else rows._replace(labels=torch.from_numpy(objects.labels))


def rows_of(
    sample: Sample,
    index: int,
    views: list[View],
    masks: list[Bool[Tensor, "N"] | None],
    grid: tuple[int, int],
) -> ImageRows:
    """Return the rows of an image with its label: as many as `masks`, one for each view or all of the only
    view.
    """
    whole, count = torch.ones(grid[0] * grid[1], dtype=torch.bool), len(masks)
    return ImageRows(
        image_indices=torch.full((count,), index),
        objects=torch.full((count,), -1),
        labels=torch.full((count,), -1 if sample.label is None else sample.label),
        masks=torch.stack([whole if mask is None else mask for mask in masks]),
        has_mask=torch.tensor([mask is not None for mask in masks]),
        images=torch.stack([view.pixels for view in views]),
        rows=torch.full((len(views),), count // len(views)),
    )
