"""Images of any channels and depth as people see them: RGB of 8 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped, UInt8
from torch import Tensor

from foveola.data.decode import decode
from foveola.data.decoding import RGB, ImageFile, ShownAs

COLOUR_SPAN = 2.3  # standard deviations on each side of the mean that a colour spans, as in figures.pca
PIXELS_FITTED = 2**18  # pixels, evenly spread, of which components are computed
NO_VARIANCE = 1e-9  # of the largest component: below it, a component is rounding

_asked: ContextVar[ShownAs | None] = ContextVar("shown as", default=None)


@contextmanager
def showing(choice: ShownAs | None) -> Iterator[None]:
    """Let what is drawn within show these channels wherever nothing nearer says which."""
    before = _asked.set(choice)
    try:
        yield
    finally:
        _asked.reset(before)


def requested_channels() -> ShownAs | None:
    """Return what `showing` says here."""
    return _asked.get()


def shown_image(image: object) -> UInt8[np.ndarray, "H W 3"]:
    """Return the image of a sample as it is shown. Raises BadImage, as `decode` does."""
    reading = image.reading if isinstance(image, ImageFile) else None
    return rgb_of(decode(image), None if reading is None else reading.shown)  # type: ignore[arg-type]


def shown_channels(source: object) -> ShownAs | None:
    """Return what a source says people see (`show=` of its data string); None where it says nothing."""
    return getattr(getattr(source, "reading", None), "shown", None)


def rgb_of(pixels: Shaped[np.ndarray, "H W C"], choice: ShownAs | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Return pixels of uint8 or uint16 as RGB: three channels of them, or the principal components of all.

    Without a choice, here or by `showing`, these are the first three, or grey. Of two channels blue stays
    black.
    """
    choice = choice or _asked.get()
    if pixels.dtype == np.uint8 and pixels.shape[2] == RGB and choice is None:
        return pixels
    if choice == "pca":
        return component_colours(pixels)
    chosen = pixels[:, :, list(_rows(pixels.shape[2], choice))]
    if chosen.shape[2] < RGB:
        chosen = np.concatenate([chosen, np.zeros_like(chosen[:, :, :1])], axis=2)
    return chosen if chosen.dtype == np.uint8 else ((chosen.astype(np.int64) + 128) // 257).astype(np.uint8)


def drawn_rgb(images: Float[Tensor, "*B C H W"], choice: ShownAs | None = None) -> UInt8[Tensor, "*B 3 H W"]:
    """Return images in [0, 1] as `rgb_of` shows them; components are those of all of them together."""
    choice = choice or _asked.get()
    if choice == "pca":
        seen = component_colours(images.detach().clamp(0, 1).movedim(-3, -1).cpu().numpy())
        return torch.from_numpy(seen).to(images.device).movedim(-1, -3)
    chosen = images[..., list(_rows(images.shape[-3], choice)), :, :]
    if chosen.shape[-3] < RGB:
        chosen = torch.cat([chosen, torch.zeros_like(chosen[..., :1, :, :])], dim=-3)
    return (chosen * 255).round().clamp(0, 255).byte()


def component_colours(pixels: Shaped[np.ndarray, "*S C"]) -> UInt8[np.ndarray, "*S 3"]:
    """Return the first three principal components of C >= 3 channels as red, green and blue.

    They are those of the covariance of these pixels, so that a colour is comparable within what is given, and
    not beyond. Each component spans 2.3 standard deviations on each side of its mean, which is 127.5; one
    without variance is grey throughout. Signs, which are arbitrary, are such that a component rises with the
    sum of its channels; where this is 0, with the channel of the largest weight.
    """
    rows = pixels.reshape(-1, pixels.shape[-1])
    some = rows[np.linspace(0, len(rows) - 1, min(len(rows), PIXELS_FITTED)).astype(np.int64)].astype(
        np.float64
    )
    mean = some.mean(axis=0)
    values, vectors = np.linalg.eigh((some - mean).T @ (some - mean) / len(some))
    values, vectors = values[::-1][:RGB], vectors[:, ::-1][:, :RGB]
    weights = _upright(vectors) / (2 * COLOUR_SPAN * np.sqrt(np.maximum(values, np.finfo(np.float64).tiny)))
    weights[:, values <= NO_VARIANCE * max(float(values[0]), np.finfo(np.float64).tiny)] = 0.0
    shares = (rows @ weights.astype(np.float32)) + (0.5 - mean @ weights).astype(np.float32)
    return (shares * 255).round().clip(0, 255).astype(np.uint8).reshape(*pixels.shape[:-1], RGB)


def _upright(vectors: Float64[np.ndarray, "C k"]) -> Float64[np.ndarray, "C k"]:
    """Components with the signs that `component_colours` says."""
    total = vectors.sum(axis=0)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)[0]
    return vectors * np.where(np.where(np.abs(total) > 1e-6, total, largest) < 0, -1.0, 1.0)


def _rows(channels: int, choice: tuple[int, ...] | None) -> tuple[int, ...]:
    if choice is not None:
        return choice
    return (0, 0, 0) if channels == 1 else tuple(range(min(channels, RGB)))
