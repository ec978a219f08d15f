"""Values: what an image file holds; and how its range, and the channels that are meant, become pixels."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Shaped

from foveola.data.decoding import RGB, Decoding, Range, picked
from foveola.data.formats import ALPHA
from foveola.data.sample import BadImage

ImagePixels = Shaped[np.ndarray, "_ _ ch"]  # of any size and number of channels, uint8 or uint16
SCALED_AT_ONCE = 2**18  # values that are scaled at once
CONTAINER = 65535  # the largest value of 16 bits


@dataclass(frozen=True, eq=False)
class Values:
    """What a file holds, the right way up, before any range.

    `array` has values as they are stored, or as the file's own slope and intercept say. `low` and `high` are
    the values that the file itself says are black and white, if it does. `names` are those of the channels,
    () where they are not known. `missing` pixels hold nothing; they become the low end of the range.
    """

    array: Shaped[np.ndarray, "H W C"]
    low: float | None = None
    high: float | None = None
    names: tuple[str, ...] = ()
    missing: Bool[np.ndarray, "H W"] | None = None

    @property
    def deep(self) -> bool:
        """Whether values have more than 8 bits."""
        return self.array.dtype.itemsize > 1


def is_dark(values: np.ndarray) -> bool:
    """Return whether whole numbers, taken to fill 16 bits, use no more than half of them."""
    return bool(values.dtype.kind != "f" and values.size and values.max() <= CONTAINER // 2)


def to_pixels(values: Values, reading: Decoding) -> Shaped[np.ndarray, "H W C"]:
    """Return pixels, uint8 or uint16 as `reading.depth` says: 0 is the low end of the range, the largest
    value of the dtype its high end; beyond, it is cut off. Raises BadImage.
    """
    chosen = chosen_channels(values, reading)
    dtype = np.uint16 if reading.depth == 16 else np.uint8
    pixels = _scaled(chosen, reading, dtype)
    if chosen.missing is not None:
        pixels[chosen.missing] = 0
    if reading.channels is not None:
        return pixels
    if chosen.names[-1:] == (ALPHA,):
        pixels = _on_white(pixels, chosen.array[:, :, -1:])
    return _as_rgb(pixels) if pixels.shape[2] == 1 else pixels


def _as_rgb(grey: Shaped[np.ndarray, "H W 1"]) -> Shaped[np.ndarray, "H W 3"]:
    """Grey three times; `np.repeat` takes three times as long."""
    pixels = np.empty((*grey.shape[:2], RGB), grey.dtype)
    for channel in range(RGB):
        pixels[:, :, channel] = grey[:, :, 0]
    return pixels


def chosen_channels(values: Values, reading: Decoding) -> Values:
    """Return the channels that are meant: grey or RGB with its alpha, or those of `reading.channels`.

    Raises BadImage where they are not there, and where more are there than are meant.
    """
    array, channels = values.array, reading.channels
    count = array.shape[2]
    if isinstance(channels, tuple):
        try:
            rows = picked(channels, values.names, count)
        except ValueError as error:
            raise BadImage(str(error)) from None
        names = tuple(values.names[row] for row in rows) if values.names else ()
        return replace(values, array=array[:, :, rows], names=names)
    if channels is None and count - (values.names[-1:] == (ALPHA,)) not in (1, RGB):
        raise BadImage(
            f"{count} channels, where grey or RGB is expected; channels=all, or chosen ones such as "
            "channels=3,2,1, in the data string says which are meant"
        )
    if isinstance(channels, int) and channels != count:
        raise BadImage(f"{count} channel(s), where channels={channels} says {channels}")
    return values


def _scaled(values: Values, reading: Decoding, dtype: type[np.unsignedinteger]) -> np.ndarray:
    array, top = values.array, np.iinfo(dtype).max
    ranges = _ranges(values, reading)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        if values.missing is None or not np.isfinite(array[~values.missing]).all():
            raise BadImage("floating-point values that are not finite")
        array = np.where(values.missing[:, :, None], 0, array)
    if ranges == [(0, 255)] and array.dtype == np.uint8:
        return array.copy("C") if top == 255 else np.multiply(array, dtype(257), order="C")
    if ranges == [(0, CONTAINER)] and array.dtype == np.uint16:
        return (
            array.copy("C")
            if top == CONTAINER
            else ((array.astype(np.int32, "C") + 128) // 257).astype(dtype)
        )
    low, high = (np.array(ends, np.float64) for ends in zip(*ranges, strict=True))
    pixels = np.empty(array.shape, dtype)
    rows = max(1, SCALED_AT_ONCE // max(array[0].size, 1))
    memory = np.empty((rows, *array.shape[1:]))  # the same for all: fresh pages take longer than arithmetic
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        scaled = np.subtract(block, low, out=memory[: len(block)], dtype=np.float64)
        scaled *= top / (high - low)
        np.clip(scaled, 0, top, out=scaled)
        pixels[start : start + rows] = np.rint(scaled, out=scaled)
    return pixels


def _ranges(values: Values, reading: Decoding) -> list[Range]:
    """The range of all channels, or that of each."""
    array, count = values.array, values.array.shape[2]
    alpha = values.names[-1:] == (ALPHA,) and reading.channels is None
    if not values.deep:  # a range that a data string says is one of more bits
        return [(0, 255) if values.low is None or values.high is None else (values.low, values.high)]
    if reading.ranges:
        if len(reading.ranges) not in (1, count - alpha):
            raise BadImage(f"{len(reading.ranges)} ranges of values, where it has {count - alpha} channel(s)")
        return list(reading.ranges) + [(0, CONTAINER)] * (alpha and len(reading.ranges) > 1)
    if reading.percentiles is not None:
        raise BadImage("range=percentile: is measured in a data set; an image alone needs one such as 0-4095")
    if values.low is not None and values.high is not None and not reading.container:
        return [(values.low, values.high)]
    if array.dtype.kind == "f":
        raise BadImage("floating-point values have no known range; give one, such as range=0-1")
    if array.min(initial=0) < 0 or array.max(initial=0) > CONTAINER:
        raise BadImage("values beyond 16 bits; give their range, such as range=0-100000")
    return [(0, CONTAINER)]


def _on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours laid on white; `alpha` [H, W, 1] has the whole of its container."""
    top = np.iinfo(pixels.dtype).max
    fraction = alpha / np.float32(np.iinfo(alpha.dtype).max)
    return np.rint(pixels[:, :, :-1] * fraction + top * (1 - fraction)).astype(pixels.dtype)
