"""Images of any channels and depth as people see them: RGB of 8 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped, UInt8
from torch import Tensor

from foveola.data.decode import decode
from foveola.data.decoding import RGB, ImageFile, ShownAs, ShownComponents
from foveola.data.sample import DataError

COLOUR_SPAN = 2.3  # standard deviations on each side of the mean that a colour spans, as in figures.pca
IMAGES_FITTED = 32  # images of a source, evenly spread, of which components are measured
PIXELS_FITTED = 2**18  # pixels, evenly spread, of which components are computed
NO_VARIANCE = 1e-9  # of the largest component: below it, a component is rounding
MEAN_ROUNDING = 1e-24  # of the square of the mean: below it, so is the largest

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


def shown_alike(source: Any, other: Any) -> tuple[ShownAs | None, ShownAs | None]:
    """Return the same of two sources that stand side by side: where both show components, those of `other`
    for both, so that equal colours mean the same.
    """
    first, second = shown_channels(source), shown_channels(other)
    alike = isinstance(first, ShownComponents) and isinstance(second, ShownComponents)
    return (second if alike else first), second


def rgb_of(pixels: Shaped[np.ndarray, "H W C"], choice: ShownAs | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Return pixels of uint8 or uint16 as RGB: three channels of them, or the principal components of all.

    Without a choice, here or by `showing`, these are the first three, or grey. Of two channels blue stays
    black.
    """
    choice = choice or _asked.get()
    if pixels.dtype == np.uint8 and pixels.shape[2] == RGB and choice is None:
        return pixels
    if choice is not None and not isinstance(choice, tuple):
        return component_colours(pixels, None if choice == "pca" else choice)
    chosen = pixels[:, :, list(_rows(pixels.shape[2], choice))]
    if chosen.shape[2] < RGB:
        chosen = np.concatenate([chosen, np.zeros_like(chosen[:, :, :1])], axis=2)
    return chosen if chosen.dtype == np.uint8 else ((chosen.astype(np.int64) + 128) // 257).astype(np.uint8)


def drawn_rgb(images: Float[Tensor, "*B C H W"], choice: ShownAs | None = None) -> UInt8[Tensor, "*B 3 H W"]:
    """Return images in [0, 1] as `rgb_of` shows them; "pca" are the components of all of them together."""
    choice = choice or _asked.get()
    if choice is not None and not isinstance(choice, tuple):
        pixels = images.detach().clamp(0, 1).movedim(-3, -1).cpu().numpy()
        seen = component_colours(pixels, None if choice == "pca" else choice)
        return torch.from_numpy(seen).to(images.device).movedim(-1, -3)
    chosen = images[..., list(_rows(images.shape[-3], choice)), :, :]
    if chosen.shape[-3] < RGB:
        chosen = torch.cat([chosen, torch.zeros_like(chosen[..., :1, :, :])], dim=-3)
    return (chosen * 255).round().clamp(0, 255).byte()


def with_components(source: Any) -> Any:
    """Return a source; one with `show=pca` shows from now on the components of its images, measured here.

    They are those of 32 images, evenly spread: a function of the files alone. Where none of these can be
    read, as where an encoder has yet to say which channels there are, each image is shown by its own.
    """
    reading = getattr(source, "reading", None)
    if reading is None or reading.shown is None or isinstance(reading.shown, tuple):
        return source
    found: list[np.ndarray] = []
    for index in np.linspace(0, len(source) - 1, min(IMAGES_FITTED, len(source))).astype(int).tolist():
        try:
            pixels = decode(source[index].image)
        except (DataError, OSError):
            continue
        found.append(_fractions(_spread(pixels, PIXELS_FITTED // IMAGES_FITTED)))
    measured = components_of(np.concatenate(found)) if found else "pca"
    source.read_as(replace(reading, shown=measured))
    return source


def components_of(rows: Float64[np.ndarray, "n C"]) -> ShownComponents:
    """Return the first three principal components of C >= 3 channels as red, green and blue.

    They are those of the covariance of these rows. Each component spans 2.3 standard deviations on each side
    of its mean, which is 127.5; one without variance is grey throughout. Signs, which are arbitrary, are such
    that a component rises with the sum of its channels; where this is 0, with the channel of the largest
    weight.
    """
    mean = rows.mean(axis=0)
    values, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, vectors = values[::-1][:RGB], vectors[:, ::-1][:, :RGB]
    rounding = max(
        NO_VARIANCE * float(values[0]), MEAN_ROUNDING * float(mean @ mean), np.finfo(np.float64).tiny
    )
    weights = _upright(vectors) / (2 * COLOUR_SPAN * np.sqrt(np.maximum(values, rounding)))
    weights[:, values <= rounding] = 0.0
    return ShownComponents(tuple(map(tuple, weights.T.tolist())), tuple((0.5 - mean @ weights).tolist()))


def component_colours(
    pixels: Shaped[np.ndarray, "*S C"], components: ShownComponents | None = None
) -> UInt8[np.ndarray, "*S 3"]:
    """Return components of C >= 3 channels as colours; without any, those of these very pixels."""
    components = components or components_of(_fractions(_spread(pixels, PIXELS_FITTED)))
    weights = np.array(components.weights, np.float32).T / np.float32(_largest(pixels))
    values = pixels.reshape(-1, pixels.shape[-1]) @ weights + np.array(components.added, np.float32)
    return (values * 255).round().clip(0, 255).astype(np.uint8).reshape(*pixels.shape[:-1], RGB)


def _largest(pixels: Shaped[np.ndarray, "*S C"]) -> int:
    """The value that is white: that of the container of whole numbers, 1 of others."""
    return 1 if pixels.dtype.kind == "f" else int(np.iinfo(pixels.dtype).max)


def _fractions(pixels: Shaped[np.ndarray, "*S C"]) -> Float64[np.ndarray, "*S C"]:
    return pixels.astype(np.float64) / _largest(pixels)


def _spread(pixels: Shaped[np.ndarray, "*S C"], count: int) -> Shaped[np.ndarray, "n C"]:
    """So many of the pixels, evenly spread."""
    rows = pixels.reshape(-1, pixels.shape[-1])
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(np.int64)]


def _upright(vectors: Float64[np.ndarray, "C k"]) -> Float64[np.ndarray, "C k"]:
    """Components with the signs that `component_colours` says."""
    total = vectors.sum(axis=0)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)[0]
    return vectors * np.where(np.where(np.abs(total) > 1e-6, total, largest) < 0, -1.0, 1.0)


def _rows(channels: int, choice: tuple[int, ...] | None) -> tuple[int, ...]:
    if choice is not None:
        return choice
    return (0, 0, 0) if channels == 1 else tuple(range(min(channels, RGB)))
