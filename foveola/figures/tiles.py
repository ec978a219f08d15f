"""What all sheets of `gallery` share: encoders by name, images as they are encoded, patches of objects."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveola.config import UserError
from foveola.data.decode import decode
from foveola.data.sample import BadImage, Sample, area_weights
from foveola.data.shown import requested_channels, rgb_of
from foveola.data.values import ImagePixels
from foveola.drawing.overlays import heat
from foveola.drawing.sheet import Pixels, Row
from foveola.models.encoder import Encoder, patch_mask
from foveola.models.transform import fit_to_patches, fitted_size, resize

Encoders = Encoder | Mapping[str, Encoder]
Tile = tuple[Pixels, str]  # with its caption
LIGHT = (
    "Light: attention as a multiple of uniform attention, on one scale for all tiles. Below a tile: its "
    "peak. An even, weak light is uniform attention, as an untrained network has it."
)
TILE_SIDE = 160  # pixels a side of a tile in a sheet
FULL = 320  # pixels of the longer side of a tile at full size, at least
MIN_COVERAGE = 1 / 256  # fraction of a patch that makes it the object's: any pixel of 16 x 16
CANVAS = 512  # pixels a side on which masks are drawn before they are read patch by patch


def encoders_by_name(encoders: Encoders) -> dict[str, Encoder]:
    """Return encoders by name; the name of a single one is empty."""
    return {"": encoders} if isinstance(encoders, Encoder) else dict(encoders)


def head_of(name: str, what: str) -> str:
    """Return the head of a column: the encoder's name, if it has one, and what is shown of it."""
    return f"{name}: {what}" if name and what else name or what


def images_of(samples: Sequence[Sample]) -> list[ImagePixels]:
    """Return the pixels of samples, as encoders take them.

    Raises UserError where one cannot be read, and where there is none.
    """
    if not samples:
        raise UserError("no images to show")
    images = []
    for sample in samples:
        try:
            images.append(decode(sample.image))
        except BadImage as error:
            raise UserError(f"{sample.name}: {error}") from error
    return images


def shown_size(encoder: Encoder, size: int | None) -> int:
    """Return pixels of the longer side: `size`, or twice that of the encoder's transform, as figures show."""
    return 2 * encoder.config.transform.crop if size is None else size


def encoded(encoder: Encoder, image: ImagePixels, size: int | None) -> Float[Tensor, "1 ch H W"]:
    """Return an image as the network gets it: whole patches, the aspect ratio kept, normalised."""
    shown = shown_size(encoder, size)
    pixels = fit_to_patches(image, encoder.config.transform, encoder.patch_size, shown)
    return encoder.normalise(pixels[None].to(encoder.device))


def grid_of(encoder: Encoder, image: ImagePixels, size: int | None) -> tuple[int, int]:
    """Return (rows, columns) of patches of `encoded`."""
    height, width = fitted_size(image, encoder.patch_size, shown_size(encoder, size))
    return height // encoder.patch_size, width // encoder.patch_size


def as_encoded(encoder: Encoder, image: ImagePixels, size: int | None) -> Pixels:
    """Return an image as it is encoded, or a whole number of times as large, so that patches are whole
    squares.
    """
    rows, columns = grid_of(encoder, image, size)
    times = max(-(-FULL // (max(rows, columns) * encoder.patch_size)), 1) * encoder.patch_size
    whole = resize(image, rows * times, columns * times).permute(1, 2, 0).numpy()
    return rgb_of(whole, requested_channels() or encoder.config.transform.decoding.shown)


def light(base: Pixels, weights: Float[Tensor, "h w"]) -> Tile:
    """Return `heat`, and the brightest patch as a multiple of uniform attention, the mean of what is read at
    all.
    """
    values = weights.float().cpu().numpy()
    read = values[values > 0]
    times = float(read.max() / read.mean()) if len(read) else 0.0
    return heat(base, values), f"peak {times:.1f}x uniform"


def row_of(tiles: Sequence[Tile], title: str = "") -> Row:
    """Return a line of a sheet from tiles with their captions."""
    return Row(title, [tile for tile, _ in tiles], [caption for _, caption in tiles])


def patches_of_object(
    sample: Sample, index: int, grid: tuple[int, int], min_coverage: float = MIN_COVERAGE
) -> Bool[Tensor, "N"]:
    """Return the patches of a whole image that an object covers from `min_coverage` on; row-major over
    `grid`.
    """
    assert sample.objects is not None
    drawn = sample.objects.draw(index, CANVAS).astype(np.float32) / 255
    coverage = area_weights(CANVAS, grid[0]) @ drawn @ area_weights(CANVAS, grid[1]).T
    return patch_mask(torch.from_numpy(coverage), min_coverage, keep_most=True)
