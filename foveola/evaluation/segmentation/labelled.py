"""Whole images squashed to a square, with their label maps: what a pass over patches and pixels reads."""

import numpy as np
import torch
from jaxtyping import Shaped, UInt8

from foveola.data.sample import DataError, Sample
from foveola.data.segmentation import PixelSource
from foveola.data.sources import decode
from foveola.evaluation.images import ImageRows, rows_of
from foveola.models.transform import TransformConfig, evaluation_view


def labelled_image(
    source: PixelSource, sample: Sample, index: int
) -> tuple[Shaped[np.ndarray, "H W ch"], UInt8[np.ndarray, "H W"]]:
    """Return an image and its label map. Raises BadImage, and DataError for a label map that cannot be
    used.
    """
    image, labels = decode(sample.image), source.label_map(index)
    if image.shape[:2] != labels.shape:
        (h, w), (lh, lw) = image.shape[:2], labels.shape
        raise DataError(f"{source.name}: {sample.name} is {w}x{h} pixels, its label map {lw}x{lh}")
    return image, labels


class LabelledCut:
    """Makes one row of an image, with `maps` squashed as the image is, so that both cover the same part.

    Patches are encoded without object masks, which would change them.
    """

    def __init__(self, source: PixelSource, transform: TransformConfig, patch_size: int) -> None:
        self.source, self.transform = source, transform
        self.grid = (transform.crop // patch_size, transform.crop // patch_size)

    def __call__(self, sample: Sample, index: int) -> ImageRows:
        """The row of one image. Raises BadImage, and DataError for a label map that cannot be used."""
        image, labels = labelled_image(self.source, sample, index)
        rows = rows_of(sample, index, [evaluation_view(image, self.transform)], [None], self.grid)
        return rows._replace(maps=torch.from_numpy(squash(labels, self.transform.crop))[None])


def squash(labels: UInt8[np.ndarray, "H W"], side: int) -> UInt8[np.ndarray, "{side} {side}"]:
    """Return nearest interpolation to a square: the pixel under the centre of each new one."""
    rows, columns = (((2 * np.arange(side) + 1) * n) // (2 * side) for n in labels.shape)
    return np.ascontiguousarray(labels[rows[:, None], columns])
