"""What is measured in the pixels of a source: ranges by percentiles, mean and deviation of channels."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

from foveola.data.decode import decode
from foveola.data.decoding import Range
from foveola.data.readers import values_seen
from foveola.data.sample import BadImage, DataError
from foveola.data.values import chosen_channels

MEASURED_IMAGES = 200  # images, spread evenly
VALUES = 4096  # of each channel of an image that tell percentiles
SMALLEST_STD = 1 / 255  # deviation that a channel is divided by


def percentile_ranges(source: Any, percentiles: Range) -> tuple[Range, ...]:
    """Return the values between which each channel of a source lies, from one percentile to another.

    Of files of grey and RGB there is one range for all channels, which keeps colours. A function of the files
    alone: each process measures the same. Raises DataError where no value is known.
    """
    found: list[np.ndarray] = []
    for index in _spread(source):
        try:
            image = source[index].image
            values = chosen_channels(values_seen(image.data, image.reading), image.reading)
        except (OSError, DataError, AttributeError):
            continue
        rows = values.array.reshape(-1, values.array.shape[2])
        if values.missing is not None:
            rows = rows[~values.missing.ravel()]
        rows = rows[:: max(len(rows) // VALUES, 1)].astype(np.float64)
        rows = rows[np.isfinite(rows).all(axis=1)]
        if values.deep and len(rows):
            found.append(rows if image.reading.channels is not None else rows.reshape(-1, 1))
    if not found or len({rows.shape[1] for rows in found}) > 1:
        raise DataError(
            f"{source.name}: range=percentile: no values of more than 8 bits were found to measure"
        )
    low, high = np.percentile(np.concatenate(found), percentiles, axis=0)
    ranges = [(float(f"{a:.6g}"), float(f"{b:.6g}")) for a, b in zip(low, high, strict=True)]
    if any(a >= b for a, b in ranges):
        raise DataError(f"{source.name}: range=percentile: a channel has one value alone; say range=LOW-HIGH")
    return tuple(ranges)


def channel_statistics(source: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of each channel, as fractions of the range, over images that count alike.

    Raises DataError where no image can be read.
    """
    sums = [
        (_fractions(pixels).mean(axis=0), (_fractions(pixels) ** 2).mean(axis=0))
        for pixels in _pixels(source)
    ]
    if not sums:
        raise DataError(f"{source.name}: no image could be read to measure mean and deviation of channels")
    mean, square = (np.mean([each[i] for each in sums], axis=0) for i in range(2))
    std = np.sqrt((square - mean**2).clip(0)).clip(SMALLEST_STD)
    return tuple(round(float(m), 6) for m in mean), tuple(round(float(s), 6) for s in std)


def _fractions(pixels: Shaped[np.ndarray, "H W C"]) -> Float64[np.ndarray, "N C"]:
    return pixels.reshape(-1, pixels.shape[2]) / np.float64(np.iinfo(pixels.dtype).max)


def _pixels(source: Any) -> Iterator[np.ndarray]:
    for index in _spread(source):
        try:
            yield decode(source[index].image)
        except (BadImage, OSError):
            continue


def _spread(source: Any) -> list[int]:
    return np.unique(np.linspace(0, len(source) - 1, min(MEASURED_IMAGES, len(source))).astype(int)).tolist()
