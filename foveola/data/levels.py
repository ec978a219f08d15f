"""Levels: where the values of each channel lie, and the options of a data string that fit such files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

from foveola.data.decoding import RGB, Decoding
from foveola.data.formats import ALPHA
from foveola.data.values import CONTAINER, Values, chosen_channels

OF_AN_IMAGE = 1024  # of each channel of an image that tell percentiles
PERCENTILES = (0.5, 50, 99.5)
TIMES_APART = (
    4.0  # times by which high ends of channels differ, or values lie beyond them, that one range does not fit
)
IN_A_LINE = 8  # channels in a line


@dataclass(frozen=True)
class ChannelLevels:
    """Values of a channel over images that count alike: the least and largest, and percentiles."""

    name: str
    least: float
    low: float  # 0.5 %
    middle: float  # 50 %
    high: float  # 99.5 %
    most: float


@dataclass(frozen=True, eq=False)
class ImageLevels:
    """Some values of each channel of an image, as they are stored, and what its file says of them."""

    values: Float64[np.ndarray, "n C"]
    ends: Float64[np.ndarray, "2 C"]  # the least and the largest
    names: tuple[str, ...] = ()
    bits: int = 8
    stated: bool = False  # whether the file says which values are black and white
    floating: bool = False


def levels_of(values: Values, reading: Decoding, bits: int) -> ImageLevels | None:
    """Return the levels of what a file holds, of the channels that are meant or else of all but alpha; None
    where no pixel has a value. Raises BadImage for channels that are not there.
    """
    stated = values.high is not None
    if reading.channels is not None:
        values = chosen_channels(values, reading)
    count = values.array.shape[2] - (reading.channels is None and values.names[-1:] == (ALPHA,))
    rows = values.array[:, :, :count].reshape(-1, count)
    if values.missing is not None:
        rows = rows[~values.missing.ravel()]
    return levels_of_rows(rows, values.names[:count], bits, stated)


def levels_of_rows(
    rows: Shaped[np.ndarray, "N C"], names: tuple[str, ...] = (), bits: int = 8, stated: bool = False
) -> ImageLevels | None:
    """Return the levels of pixels; None where none is finite."""
    floating = rows.dtype.kind == "f"
    if floating:
        rows = rows[np.isfinite(rows).all(axis=1)]
    if not len(rows):
        return None
    ends = np.stack([rows.min(axis=0), rows.max(axis=0)]).astype(np.float64)
    sampled = rows[:: -(-len(rows) // OF_AN_IMAGE)].astype(np.float64)
    return ImageLevels(sampled, ends, names, bits, stated, floating)


def levels_together(found: Sequence[ImageLevels]) -> tuple[list[ImageLevels], list[ChannelLevels]]:
    """Return the images of the number of channels that is the most frequent, and the levels of these."""
    if not found:
        return [], []
    (count, _), *_ = Counter(each.values.shape[1] for each in found).most_common()
    alike = [each for each in found if each.values.shape[1] == count]
    names = alike[0].names if len(alike[0].names) == count else tuple(str(i + 1) for i in range(count))
    rows = np.percentile(np.concatenate([each.values for each in alike]), PERCENTILES, axis=0)
    least, most = min_max(alike)
    ends = np.stack([least, *rows, most]).T.tolist()
    return alike, [ChannelLevels(name, *numbers) for name, numbers in zip(names, ends, strict=True)]


def min_max(found: Sequence[ImageLevels]) -> tuple[Float64[np.ndarray, "C"], Float64[np.ndarray, "C"]]:
    """Return the least and the largest value of each channel of images of as many channels."""
    ends = np.stack([each.ends for each in found])
    return ends[:, 0].min(axis=0), ends[:, 1].max(axis=0)


def fitting(found: Sequence[ImageLevels], reading: Decoding) -> dict[str, str]:
    """Return options of a data string that images need, or that fit them better, and that it does not have.

    `channels=all` where there are others than grey or RGB. A range where values have more than 8 bits, no
    file states theirs, and they do not fill 16 bits: whole numbers of so many bits, from the least to the
    largest of floating point; by percentiles where channels differ by 4 times, or a few values lie that far
    beyond all others.
    """
    alike, levels = levels_together(found)
    options: dict[str, str] = {}
    if not alike:
        return options
    if reading.channels is None and len(levels) not in (1, RGB):
        options["channels"] = "all"
    deep = [each for each in alike if each.bits > 8]
    if reading.ranged or reading.deep or not deep or any(each.stated for each in deep):
        return options
    floating = any(each.floating for each in deep)
    low, high = min(each.least for each in levels), max(each.most for each in levels)
    spans = [max(each.high - min(each.low, 0.0), 1e-12) for each in levels]
    apart = len(levels) not in (1, RGB) and max(spans) > TIMES_APART * min(spans)
    apart = apart or high - min(low, 0.0) > TIMES_APART * max(spans)
    if apart and (floating or high <= CONTAINER) and min(each.high - each.low for each in levels) > 0:
        options["range"] = "percentile:0.5-99.5"
    elif floating or low < 0:
        options["range"] = f"{low:.6g}-{high:.6g}"
    elif high <= CONTAINER // 2:
        options["range"] = f"0-{2 ** max(int(high).bit_length(), 8) - 1}"
    return {name: text for name, text in options.items() if name == "channels" or low < high}


def with_options(data: str, options: dict[str, Any]) -> str:
    """Return a data string with further options."""
    for name, text in options.items():
        data += f"{'&' if '?' in data else '?'}{name}={text}"
    return data


def levels_row(levels: Sequence[ChannelLevels]) -> str:
    """Return the levels in a line: 0.5 %, 50 % and 99.5 % of each channel, and the ends of all."""
    parts = [f"{each.name}: {each.low:g}, {each.middle:g}, {each.high:g}" for each in levels[:IN_A_LINE]]
    more = f"; and {len(levels) - IN_A_LINE} more" if len(levels) > IN_A_LINE else ""
    least, most = min(each.least for each in levels), max(each.most for each in levels)
    return f"{'; '.join(parts)}{more}; all from {least:g} to {most:g}"
