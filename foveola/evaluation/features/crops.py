"""Random crops of training images beside their evaluation view, or alone: for augmented probes."""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from foveola.data.sample import Sample
from foveola.data.sources import decode
from foveola.evaluation.features.reading import ImageRows, PatchMasks, rows_of
from foveola.evaluation.images import MaskedConfig
from foveola.models.transform import TransformConfig, crop_view, evaluation_view


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


def by_image(rows: ImageRows, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (images [p, 1 + views, ...], masks [p, 1 + views, N], first row of each of p images)."""
    wide = 1 + views
    count = len(rows.labels) // wide
    return (
        rows.images.view(count, wide, *rows.images.shape[1:]),
        rows.masks.view(count, wide, -1),
        torch.arange(count) * wide,
    )
