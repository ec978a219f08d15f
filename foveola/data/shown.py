"""Images of any channels and depth as people see them: RGB of 8 bits."""

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from foveola.data.decode import decode
from foveola.data.decoding import RGB, ImageFile

ShownAs = tuple[int, ...]  # three channels, from 0, that are red, green and blue


def shown_image(image: object) -> UInt8[np.ndarray, "H W 3"]:
    """Return the image of a sample as it is shown. Raises BadImage, as `decode` does."""
    reading = image.reading if isinstance(image, ImageFile) else None
    return rgb_of(decode(image), None if reading is None else reading.shown)  # type: ignore[arg-type]


def shown_channels(source: object) -> ShownAs | None:
    """Return the channels that a source says people see (`show=` of its data string); None where it says
    nothing.
    """
    return getattr(getattr(source, "reading", None), "shown", None)


def rgb_of(pixels: Shaped[np.ndarray, "H W C"], choice: ShownAs | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Return pixels of uint8 or uint16 as RGB: three channels of them, by default the first ones, or grey.

    Of two channels blue stays black.
    """
    if pixels.dtype == np.uint8 and pixels.shape[2] == RGB and choice is None:
        return pixels
    chosen = pixels[:, :, list(_rows(pixels.shape[2], choice))]
    if chosen.shape[2] < RGB:
        chosen = np.concatenate([chosen, np.zeros_like(chosen[:, :, :1])], axis=2)
    return chosen if chosen.dtype == np.uint8 else ((chosen.astype(np.int64) + 128) // 257).astype(np.uint8)


def drawn_rgb(images: Float[Tensor, "*B C H W"], choice: ShownAs | None = None) -> UInt8[Tensor, "*B 3 H W"]:
    """Return images in [0, 1] as `rgb_of` shows them."""
    chosen = images[..., list(_rows(images.shape[-3], choice)), :, :]
    if chosen.shape[-3] < RGB:
        chosen = torch.cat([chosen, torch.zeros_like(chosen[..., :1, :, :])], dim=-3)
    return (chosen * 255).round().clamp(0, 255).byte()


def _rows(channels: int, choice: ShownAs | None) -> ShownAs:
    if choice is not None:
        return choice
    return (0, 0, 0) if channels == 1 else tuple(range(min(channels, RGB)))
