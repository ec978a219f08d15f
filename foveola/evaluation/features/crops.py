"""Random crops of training images beside their evaluation view: what augmented probes learn from."""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from foveola.data.sample import Objects, Sample
from foveola.data.sources import Source
from foveola.evaluation.features.reading import Box, ExtractConfig, Images, Rows
from foveola.models.transform import TransformConfig, resize


class Crops(Images):
    """Each image as 1 + `views` rows: the evaluation view, then random crops, half of them flipped.

    A crop is a random-resized crop (area 0.08 to 1 of the image, ratio 3/4 to 4/3) resized to the encoder's
    crop by `interpolation` (None = as the encoder resizes). It depends on (seed, image, number of the crop)
    alone. Object masks follow crop and flip; where an object is not in the crop, its token reads everything.
    Without `masks` none are drawn, which is half of the work on small images.
    """

    def __init__(
        self,
        source: Source,
        chosen: Int64[np.ndarray, "n"],
        transform: TransformConfig,
        patch_size: int,
        config: ExtractConfig,
        views: int,
        masks: bool = True,
        interpolation: Literal["bicubic", "bilinear"] | None = None,
    ) -> None:
        super().__init__(source, chosen, transform, patch_size, config)
        self.views, self.masks, self.index = views, masks, -1
        self.interpolation: Literal["bicubic", "bilinear"] = interpolation or transform.interpolation

    def read(self, sample: Sample, index: int) -> Rows:
        """All rows of one image. Raises BadImage."""
        self.index = index  # whose crops `_views` draws
        rows = super().read(sample, index)
        for view in range(1, 1 + self.views):
            if self._random(view).random() < 0.5:
                rows.images[view] = rows.images[view].flip(-1)
                rows.masks[view] = rows.masks[view].view(self.grid).flip(-1).flatten()
        return rows

    def _random(self, view: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.index, view])

    def _targets(self, sample: Sample) -> list[tuple[int, ...]]:
        return super()._targets(sample) * (1 + self.views)

    def _mask(self, objects: Objects | None, target: tuple[int, ...], box: Box) -> Tensor | None:
        return super()._mask(objects, target, box) if self.masks else None

    def _views(
        self, image: UInt8[np.ndarray, "H W 3"], objects: Objects | None, targets: list[tuple[int, ...]]
    ) -> tuple[list[Tensor], list[Box], list[int]]:
        images, boxes, _ = super()._views(image, objects, targets[:1])
        height, width = image.shape[:2]
        for view in range(1, 1 + self.views):
            rng = self._random(view)
            rng.random()  # the flip's
            x0, y0, x1, y1 = random_crop(height, width, rng)
            side = self.transform.crop
            images.append(resize(image[y0:y1, x0:x1], side, side, self.interpolation))
            boxes.append((x0 / width, y0 / height, x1 / width, y1 / height))
        return images, boxes, list(range(1 + self.views))


def random_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Whole pixels (x0, y0, x1, y1): area uniform, ratio log-uniform; after ten tries the largest.

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


def by_image(rows: Rows, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """(images [p, 1 + views, ...], masks [p, 1 + views, N], first row of each of p images)."""
    wide = 1 + views
    count = len(rows.labels) // wide
    return (
        rows.images.view(count, wide, *rows.images.shape[1:]),
        rows.masks.view(count, wide, -1),
        torch.arange(count) * wide,
    )
