"""Whole images squashed to a square, with their label maps: what a pass over patches and pixels reads."""

from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from foveola.data.sample import BadImage, DataError, Objects, Sample
from foveola.data.segmentation import PixelSource
from foveola.evaluation.features.reading import Box, ExtractConfig, Images, Rows
from foveola.models.encoder import TransformConfig


class Squashed(Images):
    """Parcels of squashed images, one row each, with `maps` squashed alike, so that both cover one place.

    A label map that cannot be used makes its image one of the `bad`: an exception would lose its message on
    the way out of a worker. Ask `explain` for it.
    """

    source: PixelSource

    def __init__(
        self,
        source: PixelSource,
        chosen: Int64[np.ndarray, "n"],
        transform: TransformConfig,
        patch_size: int,
        config: ExtractConfig,
    ) -> None:
        super().__init__(source, chosen, transform, patch_size, config)
        self.side, self.index = transform.crop, -1

    def none(self) -> Rows:
        """No rows, in the right shapes."""
        return super().none()._replace(maps=torch.zeros(0, self.side, self.side, dtype=torch.uint8))

    def read(self, sample: Sample, index: int) -> Rows:
        """The row of one image. Raises BadImage."""
        try:
            return self._read(sample, index)
        except BadImage:
            raise
        except DataError as error:
            raise BadImage(str(error)) from error

    def explain(self, index: int) -> None:
        """Raise the DataError that made an image one of the `bad`, unless the file itself is damaged."""
        with suppress(BadImage):
            self._read(self.source[index], index)

    def _read(self, sample: Sample, index: int) -> Rows:
        self.index = index  # whose map `_views` reads
        rows = super().read(sample, index)
        return rows._replace(maps=torch.from_numpy(squash(self.labels, self.side))[None])

    def _targets(self, sample: Sample) -> list[tuple[int, ...]]:
        return [()]  # patches are encoded without object masks, which would change them

    def _views(
        self, image: UInt8[np.ndarray, "H W 3"], objects: Objects | None, targets: list[tuple[int, ...]]
    ) -> tuple[list[Tensor], list[Box], list[int]]:
        self.labels = self.source.label_map(self.index)
        if image.shape[:2] != self.labels.shape:
            (h, w), (lh, lw) = image.shape[:2], self.labels.shape
            name = self.source[self.index].name
            raise DataError(f"{self.source.name}: {name} is {w}x{h} pixels, its label map {lw}x{lh}")
        return super()._views(image, objects, targets)


def squash(labels: UInt8[np.ndarray, "H W"], side: int) -> UInt8[np.ndarray, "{side} {side}"]:
    """Nearest interpolation to a square: the pixel under the centre of each new one."""
    rows, columns = (((2 * np.arange(side) + 1) * n) // (2 * side) for n in labels.shape)
    return np.ascontiguousarray(labels[rows[:, None], columns])
