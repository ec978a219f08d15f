"""Whole slides: a level of their pyramid by number or microns a pixel, parts of it, and where tissue is."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from foveola.data.decoding import Decoding, Window
from foveola.data.formats import COLOURS, Header
from foveola.data.guard import check_pixels, extra, reading
from foveola.data.sample import BadImage, DataError
from foveola.data.values import Values

SATURATED = 20 / 255  # a pixel whose colours differ by this fraction of the largest shows tissue
CELLS = 16  # pixels of the overview that a side of a tile has at least
OVERVIEW = 2**25  # pixels of it, where the slide has a coarser level
MPP = ("openslide.mpp-x", "tiffslide.mpp-x")
REACH = 3  # pixels around a part that its shrunk pixels depend on, in units of these
WITHIN = (
    "a whole slide is read from a file of its own, in parts; `foveola pack 'folder:/slides?tiles=512' "
    "out=FOLDER format=jpeg` makes shards of its tiles"
)
SAME = 1e-3  # up to this relative difference two resolutions are one


class Level(NamedTuple):
    """What is read of a slide: a level, and the size of the image that it makes.

    `scale` is how many pixels of the level make one of the image, 1 where none is shrunk; `downsample` how
    many pixels of the finest level make one of this.
    """

    number: int
    downsample: float
    scale: float
    width: int
    height: int


def slide_values(path: Path | bytes, decoding: Decoding) -> Values:
    """Return RGB pixels of a slide, at the level or the microns a pixel of the decoding; of a part of it.

    What no tile of the slide covers is white. Raises BadImage.
    """
    with _opened(path) as slide:
        level = level_of(slide, decoding)
        window = decoding.window or (0, 0, level.width, level.height)
        return Values(_region(slide, level, window), names=COLOURS)


def slide_header(path: Path | bytes, decoding: Decoding) -> Header:
    """Return the size of a slide, at the level or the microns a pixel of the decoding."""
    with _opened(path) as slide:
        level = level_of(slide, decoding)
        return Header(level.width, level.height, kind="slide")


def tissue_of(path: Path | bytes, decoding: Decoding, tile: int) -> Bool[np.ndarray, "h w"]:
    """Return where tissue is on an overview of a slide, of which a tile has `CELLS` pixels a side at least.

    A pixel shows tissue where its colours differ: (max - min) / max of red, green and blue is at least
    20/255. Glass is grey.
    """
    with _opened(path) as slide:
        level = level_of(slide, decoding)
        wanted = level.downsample * level.scale * tile / CELLS
        numbers = range(slide.level_count)
        number = max((n for n in numbers if slide.level_downsamples[n] <= wanted), default=0)
        while number + 1 < slide.level_count and math.prod(slide.level_dimensions[number]) > OVERVIEW:
            number += 1
        width, height = slide.level_dimensions[number]
        check_pixels(width, height, 4)
        pixels = _region(slide, Level(number, slide.level_downsamples[number], 1, width, height),
                         (0, 0, width, height)).astype(np.float32)  # fmt: skip
    largest = pixels.max(axis=2)
    return (largest - pixels.min(axis=2)) >= np.maximum(largest, 1) * SATURATED


def level_of(slide: Any, decoding: Decoding) -> Level:
    """Return the level that is meant. Raises BadImage where it is not there.

    For microns a pixel, it is the coarsest that is no coarser; what is finer is shrunk.
    """
    if decoding.mpp is None:
        number = decoding.level or 0
        if number >= slide.level_count:
            raise BadImage(f"has {slide.level_count} level(s), and level={number} is asked for (from 0)")
        return Level(number, slide.level_downsamples[number], 1.0, *slide.level_dimensions[number])
    found = next((slide.properties[name] for name in MPP if slide.properties.get(name)), None)
    if found is None:
        raise BadImage("a slide that does not say its microns a pixel; level= chooses by number")
    finest = float(found)
    if finest > decoding.mpp * (1 + SAME):
        raise BadImage(f"a slide of {finest:g} microns a pixel, and mpp={decoding.mpp:g} is finer than that")
    downs = slide.level_downsamples
    number = max(n for n in range(slide.level_count) if finest * downs[n] <= decoding.mpp * (1 + SAME))
    scale = decoding.mpp / (finest * downs[number])
    width, height = slide.level_dimensions[number]
    if abs(scale - 1) <= SAME:
        return Level(number, downs[number], 1.0, width, height)
    return Level(number, downs[number], scale, int(width / scale), int(height / scale))


def _region(slide: Any, level: Level, window: Window) -> UInt8[np.ndarray, "h w 3"]:
    x0, y0, x1, y1 = window
    if not (0 <= x0 < x1 <= level.width and 0 <= y0 < y1 <= level.height):
        raise BadImage(f"is {level.width}x{level.height} pixels, and the part {window} is asked for")
    width, height = slide.level_dimensions[level.number]
    beyond = 0 if level.scale == 1 else math.ceil(REACH * level.scale)  # so that parts meet without a seam
    left, top = (max(math.floor(low * level.scale) - beyond, 0) for low in (x0, y0))
    right, bottom = (
        min(math.ceil(high * level.scale) + beyond, side) for high, side in ((x1, width), (y1, height))
    )
    check_pixels(right - left, bottom - top, 4)
    start = round(left * level.downsample), round(top * level.downsample)
    image = slide.read_region(start, level.number, (right - left, bottom - top)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    if level.scale != 1:
        ends = min(x1 * level.scale - left, image.width), min(y1 * level.scale - top, image.height)
        box = (x0 * level.scale - left, y0 * level.scale - top, *ends)
        image = image.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)


@contextmanager
def _opened(path: Path | bytes) -> Iterator[Any]:
    if isinstance(path, bytes):
        raise BadImage(WITHIN)
    opener = _opener()
    with reading("whole slide"), opener(str(path)) as slide:
        yield slide


def _opener() -> Any:
    """OpenSlide, or tiffslide, which reads TIFF-like slides without the C library."""
    try:
        return extra("openslide", "slides", "a whole slide").OpenSlide
    except DataError:
        try:
            return extra("tiffslide", "slides", "a whole slide").TiffSlide
        except DataError:
            pass
        raise
