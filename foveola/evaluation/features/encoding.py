"""Images in views to features, batch by batch: what a pass computes, before it is stored or used.

The views are the evaluation view, and random crops for augmented probes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foveola.config import UserError, key
from foveola.data.sample import Sample
from foveola.data.sources import Source, decode
from foveola.evaluation.features.names import FeatureReader, Need
from foveola.evaluation.images import Batches, ImageRows, Images, MaskedConfig, PatchMasks, rows_of
from foveola.evaluation.segmentation.labelled import LabelledCut
from foveola.models.encoder import Encoder
from foveola.models.transform import TransformConfig, crop_view, evaluation_view


@dataclass(frozen=True)
class FeedConfig(MaskedConfig):
    """How images become stored features."""

    store: Literal["float32", "float16"] = key("float32", "number format of stored features")


class CropsCut:
    """Makes 1 + `views` rows of an image: the evaluation view, then random crops, half of them flipped.

    Called with numbers besides the index, it makes the rows of these alone: 0 is the evaluation view.

    A crop is a random-resized crop (area 0.08 to 1 of the image, ratio 3/4 to 4/3) resized to the encoder's
    crop by `interpolation` (None = as the encoder resizes). It depends on (seed, image, number of the crop)
    alone. Object masks follow crop and flip; where an object is not in the crop, its token reads everything.
    Without `masks` none are drawn, which is half of the work on small images.
    """

    def __init__(
        self,
        transform: TransformConfig,
        patch_size: int,
        config: MaskedConfig,
        views: int,
        masks: bool = True,
        interpolation: Literal["bicubic", "bilinear"] | None = None,
    ) -> None:
        self.transform, self.seed, self.views, self.masked = transform, config.seed, views, masks
        self.masks = PatchMasks(transform, patch_size, config)
        self.interpolation: Literal["bicubic", "bilinear"] | None = interpolation

    def __call__(self, sample: Sample, index: int, *numbers: int) -> ImageRows:
        """All rows of one image, or those of some numbers. Raises BadImage."""
        image, objects = decode(sample.image), sample.objects if self.masked else None
        every = tuple(range(0 if objects is None else len(objects)))
        views, masks = [], []
        for number in numbers or range(1 + self.views):
            if not number:
                view, flipped = evaluation_view(image, self.transform), False
            else:
                rng = np.random.default_rng([self.seed, index, number])
                flipped = rng.random() < 0.5
                corners = random_crop(image.shape[0], image.shape[1], rng)
                view = crop_view(image, corners, self.transform, self.interpolation)
            mask = self.masks(objects, every, view.box)
            if flipped:
                view = view._replace(pixels=view.pixels.flip(-1))
                mask = None if mask is None else mask.view(self.masks.grid).flip(-1).flatten()
            views.append(view)
            masks.append(mask)
        return rows_of(sample, index, views, masks, self.masks.grid)


def random_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Return whole pixels (x0, y0, x1, y1): area uniform, ratio log-uniform; after ten tries the largest.

    The distribution of torchvision's `RandomResizedCrop`.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


@dataclass(frozen=True, eq=False)
class Encoded:
    """Features of p images, in `wide` views each, on the CPU."""

    image_indices: Int64[Tensor, "p"]  # index in the source
    kinds: dict[str, Tensor]  # of each wanted kind [p, wide, ...]; `maps` are uint8, the others float32
    columns: dict[str, Tensor]  # `labels`; with kind `masked` `has_mask` and `readable` of the first view


class Encoding:
    """The images of a source in `1 + views` views, or squashed to `need.side`, encoded batch by batch.

    `seconds` says how long images were waited for, and how long they were encoded; `bad` are the images that
    could not be read.
    """

    def __init__(
        self,
        encoder: Encoder,
        source: Any,
        config: FeedConfig,
        need: Need,
        views: int = 0,
        progress: bool = True,
    ) -> None:
        self.encoder, self.source, self.config, self.need = encoder, source, config, need
        self.views, self.progress = views, progress
        self.masked = "masked" in need.kinds  # otherwise no object mask is drawn
        self.bad: list[int] = []
        self.seconds = {"data_wait": 0.0, "encoder": 0.0}

    def batches(self, mine: Int64[np.ndarray, "t"]) -> Iterator[Encoded]:
        """Yield features of the images `mine`, in their order. Raises DataError for a label map of no use."""
        reader, training = FeatureReader(self.encoder, self.config.precision), self.encoder.training
        batches: Batches[ImageRows] = Batches(
            Images(self.source, mine, self._cut()),
            self.config,
            f"features of {self.source.name}",
            self.progress,
        )
        self.bad = batches.bad
        for rows in batches:
            self.seconds["data_wait"] = batches.waited
            began = perf_counter()
            images, masks, first = by_image(rows, self.views)
            kinds = self._encode(reader, images, masks)
            self.encoder.train(training)
            if "maps" in self.need.kinds:
                kinds["maps"] = rows.maps[:, None]
            self.seconds["encoder"] += perf_counter() - began
            columns = {"labels": rows.labels[first]}
            if self.masked:
                columns["has_mask"] = rows.has_mask[first]
                columns["readable"] = masks[:, 0].float().mean(dim=1)
            yield Encoded(rows.image_indices[first], kinds, columns)

    def _cut(self) -> CropsCut | LabelledCut:
        transform, patch = self.encoder.config.transform, self.encoder.patch_size
        if self.need.side is None:
            transform = transform.sized(self.need.size)
            return CropsCut(transform, patch, self.config, self.views, self.masked, self.need.crops)
        return LabelledCut(self.source, transform.squashed(self.need.side), patch)

    def _encode(self, reader: FeatureReader, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Features of p images in 1 + views views each, encoded `batch_size` at a time."""
        wanted = replace(self.need, kinds=self.need.kinds - {"maps"})
        flat, read = images.flatten(0, 1), masks.flatten(0, 1)
        size = self.config.batch_size
        parts = [reader(i, m, wanted) for i, m in zip(flat.split(size), read.split(size), strict=True)]
        joined = {kind: torch.cat([part[kind] for part in parts]) for kind in wanted.kinds}
        return {kind: x.unflatten(0, (len(images), 1 + self.views)) for kind, x in joined.items()}


def by_image(rows: ImageRows, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (images [p, 1 + views, ...], masks [p, 1 + views, N], first row of each of p images)."""
    wide = 1 + views
    count = len(rows.labels) // wide
    return (
        rows.images.view(count, wide, *rows.images.shape[1:]),
        rows.masks.view(count, wide, -1),
        torch.arange(count) * wide,
    )


def checked(x: Tensor, dtype: str, image_indices: Int64[Tensor, "p"], source: Source) -> Tensor:
    """Return features of p images as numbers of type `dtype`; label maps as they are.

    Raises UserError, naming an image, unless all are finite.
    """
    if not x.is_floating_point():
        return x
    stored = x.to(getattr(torch, dtype))
    broken = ~stored.flatten(1).isfinite().all(dim=1)
    if broken.any():
        name = source[int(image_indices[broken][0])].name
        large = " in float16 (store=float32 holds more)" if x.isfinite().all() else ""
        raise UserError(
            f"features of {int(broken.sum())} images of {source.name} are not finite{large} "
            f"(first: {name}): is the encoder damaged, or its training diverged?"
        )
    return stored
