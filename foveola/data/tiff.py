"""TIFF files that PIL does not read, or not in parts: stacks, many channels, planes, BigTIFF, tiles, OME.

Axes are those that the file names: rows, columns and samples make an image; channels (C) belong to it; all
others (Z, T, pages without a name) make a stack, of which a page is chosen.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from foveola.data.decoding import Decoding, Window
from foveola.data.formats import ALPHA, COLOURS, GREY, ORIENTATION, Header, turn
from foveola.data.guard import MAX_PIXELS, check_pixels, extra, reading, silence
from foveola.data.sample import BadImage, DataError
from foveola.data.values import Values

IMAGE_AXES = "YXS"
WHITE_IS_ZERO, BLACK_IS_ZERO, RED_GREEN_BLUE, INDEXED = 0, 1, 2, 3  # photometric interpretations
YCC = 6
CODEC_MISSING = "imagecodecs"


class Page(NamedTuple):
    """One image of a file: a page of tifffile, or part of a contiguous array, and its channels."""

    series: Any
    numbers: tuple[int, ...]  # which of the series' planes are its channels


def tiff_values(data: Path | bytes, decoding: Decoding) -> Values:
    """Return what a page of a TIFF holds: the part `decoding.window` alone where one is asked for.

    Raises BadImage for stacks of which no page is chosen, other files that it refers to, and damage.
    """
    with _opened(data) as file:
        pages = _chosen(_pages(file), decoding.page)
        first = pages[0].series.keyframe
        orientation = _orientation(first)
        window = decoding.window if orientation == 1 else None
        arrays = [_read(file, data, page, window) for page in pages]
        if any(array.shape[:2] != arrays[0].shape[:2] for array in arrays):
            raise BadImage("pages of several sizes, which cannot be channels of one image")
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=2)
        names = _names(file, first, array.shape[2]) if len(pages) == 1 else ()
        low, high = _stated(first)
    if orientation != 1:
        array = turn(array, orientation)
        if decoding.window is not None:
            x0, y0, x1, y1 = decoding.window
            array = array[y0:y1, x0:x1]
    return Values(np.ascontiguousarray(array), low, high, names)


def tiff_header(data: Path | bytes, decoding: Decoding) -> Header:
    """Return the size of the first page, and how many pages there are, without decoding any."""
    with _opened(data) as file:
        pages = _pages(file)
        key = pages[0].series.keyframe
        channels = len(pages[0].numbers) * key.samplesperpixel
        bits = max(8, key.dtype.itemsize * 8)
        return Header(key.imagewidth, key.imagelength, _orientation(key), channels, bits, len(pages))


# -- which pages -------------------------------------------------------------------------------------------


@contextmanager
def _opened(data: Path | bytes) -> Iterator[Any]:
    tifffile = extra("tifffile", "tiff", "this TIFF")
    silence("tifffile")
    opened = io.BytesIO(data) if isinstance(data, bytes) else str(data.absolute())
    try:
        with reading("TIFF"), tifffile.TiffFile(opened, _multifile=False) as file:
            _check_references(file)
            yield file
    except BadImage as error:
        if CODEC_MISSING in str(error) and "requires" in str(error):
            raise DataError(f"this TIFF needs imagecodecs ({error}); pip install 'foveola[tiff]'") from error
        raise


def _check_references(file: Any) -> None:
    """OME's XML may name other files, and entities that are larger than memory."""
    if not file.is_ome:
        return
    text = file.ome_metadata or ""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise BadImage("OME metadata with a document type, which may hide anything")
    if "BinaryOnly" in text:
        raise BadImage("OME metadata that are in a companion file, which is not read")


def _pages(file: Any) -> list[Page]:
    found = []
    for series in file.series:
        key = series.keyframe
        if series.kind.lower() != "ome" and key.is_reduced:
            continue
        if not set("YX") <= set(series.axes):
            raise BadImage(f"axes {series.axes}, where rows and columns are expected")
        within = sum(axis in IMAGE_AXES for axis in series.axes)
        axes, shape = series.axes, series.shape
        outer = [i for i, axis in enumerate(axes) if axis not in IMAGE_AXES]
        if outer != list(range(len(axes) - within)):
            raise BadImage(f"axes {axes}, whose order is not read")
        planes = np.arange(math.prod(shape[i] for i in outer)).reshape([shape[i] for i in outer])
        if "C" in axes:
            planes = np.moveaxis(planes, axes.index("C"), -1)
            planes = planes.reshape(-1, shape[axes.index("C")])
        else:
            planes = planes.reshape(-1, 1)
        found += [Page(series, tuple(numbers.tolist())) for numbers in planes]
    if not found:
        raise BadImage("a TIFF without an image")
    return found


def _chosen(pages: list[Page], page: int | str | None) -> list[Page]:
    if isinstance(page, int):
        if page >= len(pages):
            raise BadImage(f"has {len(pages)} page(s), and page {page + 1} is asked for")
        return [pages[page]]
    if page == "each":  # a look at what the pages are like
        return pages[:1]
    if page is None and len(pages) > 1:
        raise BadImage(
            f"a TIFF of {len(pages)} pages; pages=first in the data string takes the first of each, "
            f"pages=channels all of them as channels, pages=each makes an image of each (axes "
            f"{pages[0].series.axes})"
        )
    return pages


# -- values ------------------------------------------------------------------------------------------------


def _read(file: Any, data: Path | bytes, page: Page, window: Window | None) -> Shaped[np.ndarray, "h w c"]:
    series = page.series
    key = series.keyframe
    if key.photometric == YCC and key.compression == 1:
        raise BadImage("colours as YCbCr without compression, which is not read")
    if key.photometric > YCC and key.photometric < 32803:  # CIELab and its relatives
        raise BadImage(f"colours as {key.photometric!r}, which are not read")
    width, height = key.imagewidth, key.imagelength
    x0, y0, x1, y1 = window or (0, 0, width, height)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise BadImage(f"is {width}x{height} pixels, and the part {x0},{y0} to {x1},{y1} is asked for")
    count = key.samplesperpixel * len(page.numbers)
    check_pixels(x1 - x0, y1 - y0, count, key.dtype.itemsize)
    planes = [_plane(file, data, series, number, (x0, y0, x1, y1)) for number in page.numbers]
    array = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.int8:
        array = array.astype(np.int16)
    if array.dtype.kind not in "uif":
        raise BadImage(f"values of {array.dtype}, where numbers are expected")
    if key.photometric == WHITE_IS_ZERO and array.dtype.kind == "u":
        top = 255 if key.bitspersample == 1 else 2**key.bitspersample - 1
        array = array.dtype.type(top) - array
    if key.photometric == INDEXED and key.colormap is not None:
        array = np.moveaxis(key.colormap[:, array[:, :, 0]], 0, 2)
        array = (array >> 8).astype(np.uint8)  # as PIL does
    return array


def _plane(file: Any, data: Path | bytes, series: Any, number: int, window: Window) -> np.ndarray:
    """One plane [h, w, samples] of a series, or part of it."""
    x0, y0, x1, y1 = window
    key = series.keyframe
    if series.dataoffset is not None:
        array = _contiguous(file, data, series)
        planes = array.reshape(-1, *(side for side, axis in zip(series.shape, series.axes, strict=True)
                                     if axis in IMAGE_AXES))  # fmt: skip
        return _last(planes[number], series.axes)[y0:y1, x0:x1].astype(key.dtype)
    page = series.pages[number]
    if page is None:
        raise BadImage("OME metadata that refer to other files, which are not read")
    if (x0, y0, x1, y1) == (0, 0, key.imagewidth, key.imagelength):
        return _last(page.asarray(maxworkers=1), series.axes)
    return _segments(file, page, window)


def _contiguous(file: Any, data: Path | bytes, series: Any) -> np.ndarray:
    dtype = np.dtype(series.dtype).newbyteorder(file.byteorder)
    count = math.prod(series.shape)
    if series.dataoffset + count * dtype.itemsize > file.filehandle.size:
        raise BadImage("a TIFF that ends before its values do")
    if isinstance(data, bytes):
        return np.frombuffer(data, dtype, count, series.dataoffset).reshape(series.shape)
    return np.memmap(data, dtype, "r", series.dataoffset, tuple(series.shape))


def _last(array: np.ndarray, axes: str) -> np.ndarray:
    """[h, w, samples] of an array whose axes are rows, columns and perhaps samples, in any order."""
    inner = "".join(axis for axis in axes if axis in IMAGE_AXES)
    if "S" not in inner:
        return array.reshape(*array.shape[-2:], 1)
    return np.moveaxis(array, inner.index("S"), 2)


def _segments(file: Any, page: Any, window: Window) -> np.ndarray:
    """Part of a page, of which only the tiles or strips that it touches are read and decoded."""
    key = page.keyframe
    x0, y0, x1, y1 = window
    tall, wide = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
    tall = min(tall, key.imagelength) if not key.is_tiled else tall
    if key.imagedepth != 1 or tall * wide > MAX_PIXELS or not tall * wide:
        raise BadImage(f"tiles of {wide}x{tall}x{key.imagedepth} pixels")
    across, down = -(-key.imagewidth // wide), -(-key.imagelength // tall)
    planes = key.samplesperpixel if key.planarconfig == 2 else 1
    samples = key.samplesperpixel if planes == 1 else 1
    out = np.zeros((y1 - y0, x1 - x0, planes * samples), key.dtype)
    for plane in range(planes):
        for row in range(y0 // tall, -(-y1 // tall)):
            for column in range(x0 // wide, -(-x1 // wide)):
                index = (plane * down + row) * across + column
                part = _segment(file, page, index)
                if part is None:
                    continue  # sparse: nothing was written there
                top, left = row * tall, column * wide
                ys = slice(max(y0, top), min(y1, top + part.shape[0]))
                xs = slice(max(x0, left), min(x1, left + part.shape[1]))
                out[ys.start - y0 : ys.stop - y0, xs.start - x0 : xs.stop - x0,
                    plane * samples : (plane + 1) * samples] = (
                    part[ys.start - top : ys.stop - top, xs.start - left : xs.stop - left]
                )  # fmt: skip
    return out


def _segment(file: Any, page: Any, index: int) -> np.ndarray | None:
    if index >= len(page.dataoffsets):
        raise BadImage("a TIFF that ends before its values do")
    size = page.databytecounts[index]
    if not size:
        return None
    file.filehandle.seek(page.dataoffsets[index])
    raw = file.filehandle.read(size)
    key = page.keyframe
    found, _, _ = key.decode(raw, index, jpegtables=page.jpegtables, jpegheader=key.jpegheader)
    return None if found is None else found[0]


# -- what the tags say -------------------------------------------------------------------------------------


def _orientation(key: Any) -> int:
    tag = key.tags.get(ORIENTATION)
    found = 1 if tag is None else int(tag.value)
    return found if 1 <= found <= 8 else 1


def _stated(key: Any) -> tuple[float, float] | tuple[None, None]:
    """The range of values of a file that says it uses fewer bits than its numbers have."""
    bits = key.bitspersample
    if key.dtype is None or key.dtype.kind != "u" or bits in (1, 8, 16, 32, 64) or key.photometric == INDEXED:
        return None, None
    return 0.0, float(2**bits - 1)


def _names(file: Any, key: Any, count: int) -> tuple[str, ...]:
    if file.is_ome and (found := _ome_names(file.ome_metadata or "")) and len(found) == count:
        return found
    alpha = len(key.extrasamples) == 1 and int(key.extrasamples[0]) in (1, 2)
    colours = COLOURS if key.photometric in (RED_GREEN_BLUE, YCC) else (GREY,)
    if (
        key.photometric in (RED_GREEN_BLUE, YCC, BLACK_IS_ZERO, WHITE_IS_ZERO)
        and count == len(colours) + alpha
    ):
        return (*colours, *((ALPHA,) if alpha else ()))
    return ()


def _ome_names(text: str) -> tuple[str, ...]:
    """Names of the channels of the first image, if each has one of its own."""
    from xml.etree import ElementTree

    root = ElementTree.fromstring(text)
    image = root.find("{*}Image/{*}Pixels")
    names = (
        tuple(each.get("Name") or "" for each in image.iterfind("{*}Channel")) if image is not None else ()
    )
    return names if all(names) and len(set(names)) == len(names) else ()
