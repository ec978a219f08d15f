"""What is done to an image before it is encoded, in Python as in evaluations.

Pixels become what an encoder sees by `evaluation_view` (resize, then cut the centre; with
`TransformConfig.squashed` the whole image as a square), by `crop_view` (a box of it, resized), or by
`fit_to_patches` (the whole image in its own shape).
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from foveola.config import key
from foveola.data.decode import resize_pixels
from foveola.data.decoding import WHOLE_CONTAINER, Decoding, Range, why_not_shown

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in the unit square


@dataclass(frozen=True)
class TransformConfig:
    """What happens to an image before it is encoded. Defaults: the usual ImageNet evaluation."""

    resize: int = key(256, "pixels of the shorter side", at_least=1, at_most=2**14)
    crop: int = key(224, "pixels a side of the square cut from the centre", at_least=1, at_most=2**13)
    mean: tuple[float, ...] = key((0.485, 0.456, 0.406), "subtracted from each channel in [0, 1]")
    std: tuple[float, ...] = key((0.229, 0.224, 0.225), "then divided by")
    interpolation: Literal["bicubic", "bilinear"] = key("bicubic", "how images are resized, antialiased")
    squash: bool = key(False, "resize both sides to `resize`, whatever the image's shape")
    range: str | None = key(None, "values that become 0 and 1, as in data strings; null = as files have it")
    channels: str | None = key(None, "channels of files, as in data strings; null = RGB")
    pages: str | None = key(None, "pages of files, as in data strings; null = there is one")
    show: str | None = key(None, "channels seen as red, green and blue, or pca; null = the first three")

    def __post_init__(self) -> None:
        if self.crop > self.resize:
            raise ValueError(f"crop={self.crop} is larger than resize={self.resize}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channel(s), std {len(self.std)}")
        try:
            shown = self.decoding.shown
        except ValueError as error:
            raise ValueError(f"range, channels, pages or show need {error}") from None
        if (why := why_not_shown(shown, len(self.mean))) is not None:
            raise ValueError(why)

    @property
    def decoding(self) -> Decoding:
        """How files are read, where nobody says it of them."""
        return Decoding.of(self.range, self.channels, self.pages, self.show)

    @property
    def value_ranges(self) -> tuple[Range, ...] | None:
        """The values of files that become 0 and 1: one pair for all channels, or one of each; of files that
        state their range, or fill their container, those of 16 bits of it. None where pixels have 8 bits.
        """
        decoding = self.decoding
        return None if decoding.depth == 8 else decoding.ranges or (WHOLE_CONTAINER,)

    def squashed(self, side: int) -> "TransformConfig":
        """Return the same for whole images, squashed to `side` x `side` pixels."""
        return replace(self, resize=side, crop=side, squash=True)

    def sized(self, side: int | None) -> "TransformConfig":
        """Return the same for squares of `side` pixels: images are resized in proportion; None: this one."""
        if side is None or side == self.crop:
            return self
        return replace(self, crop=side, resize=side if self.squash else round(self.resize * side / self.crop))


@dataclass(frozen=True)
class PixelsConfig:
    """How files of a run become pixels, as its data string says it or its data were found to be."""

    range: str | None = key(None, "values that become 0 and 1; null = as files have them")
    channels: str | None = key(None, "channels that are meant; null = RGB")
    pages: str | None = key(None, "pages of files of several; null = there is one")
    show: str | None = key(None, "channels seen as red, green and blue, or pca; null = the first three")


class View(NamedTuple):
    """Pixels of an image that are encoded, before they are normalised, and where they are in it."""

    pixels: Shaped[Tensor, "C S S2"]
    box: Box


def evaluation_view(image: Shaped[np.ndarray, "H W C"], transform: TransformConfig) -> View:
    """Return the image as evaluations see it: resized, and the centre of it cut out."""
    (height, width), (top, left) = image_crop(image.shape[0], image.shape[1], transform)
    whole, side = resize(image, height, width, transform.interpolation), transform.crop
    box = (left / width, top / height, (left + side) / width, (top + side) / height)
    return View(whole[:, top : top + side, left : left + side], box)


def crop_view(
    image: Shaped[np.ndarray, "H W C"],
    corners: tuple[int, int, int, int],
    transform: TransformConfig,
    interpolation: Literal["bicubic", "bilinear"] | None = None,
) -> View:
    """Return a box of whole pixels (x0, y0, x1, y1), resized to the transform's crop; None = as it
    interpolates.
    """
    (height, width), (x0, y0, x1, y1), side = image.shape[:2], corners, transform.crop
    pixels = resize(image[y0:y1, x0:x1], side, side, interpolation or transform.interpolation)
    return View(pixels, (x0 / width, y0 / height, x1 / width, y1 / height))


def image_crop(
    height: int, width: int, transform: TransformConfig
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size (height, width) to which an image is resized, and (top, left) of its centre crop in
    that size.

    As torchvision's `Resize` and `CenterCrop`, with which published evaluations are made: the longer side is
    rounded down, and an offset of half a pixel to the nearest even number.
    """
    if transform.squash:
        size = transform.resize, transform.resize
    else:
        short = min(height, width)
        size = (transform.resize * height // short, transform.resize * width // short)
    return size, (round((size[0] - transform.crop) / 2), round((size[1] - transform.crop) / 2))


def fitted_size(image: Shaped[np.ndarray, "H W C"], patch: int, size: int) -> tuple[int, int]:
    """Return (height, width) in whole patches: the longer side `size`, the aspect ratio kept within half a
    patch.
    """
    height, width = image.shape[:2]
    longer = max(round(size / patch), 1)
    rows, columns = (max(round(longer * side / max(height, width)), 1) for side in (height, width))
    return rows * patch, columns * patch


def fit_to_patches(
    image: Shaped[np.ndarray, "H W C"], transform: TransformConfig, patch: int, size: int | None = None
) -> Shaped[Tensor, "C h w"]:
    """Return an image resized, antialiased, to whole patches of `patch` pixels: the longer side has `size`.

    `size` is in pixels, None = the transform's crop; it is rounded to whole patches.
    """
    size = transform.crop if size is None else size
    height, width = fitted_size(image, patch, size)
    return resize(image, height, width, transform.interpolation)


def resize(
    image: Shaped[np.ndarray, "H W C"],
    height: int,
    width: int,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> Shaped[Tensor, "C {height} {width}"]:
    """Resize an image, antialiased, the rounding to uint8 included, as PIL does it within one level."""
    # torch warns about memory that it could write to by mistake, and reads none from right to left.
    if not image.flags.writeable or min(image.strides) < 0:
        image = image.copy()
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return resize_pixels(pixels, height, width, interpolation).contiguous()
