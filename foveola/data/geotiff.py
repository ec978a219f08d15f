"""GeoTIFF and JPEG 2000 scenes: bands with their names, nodata, and parts without decoding the whole."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from foveola.data.decoding import Decoding
from foveola.data.formats import ALPHA, Header
from foveola.data.guard import check_pixels, extra, reading
from foveola.data.sample import BadImage
from foveola.data.values import Values

JP2_MAGIC = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
# The file alone is read: none beside it, and nothing that it refers to.
FILE_ALONE = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO", "GDAL_NUM_THREADS": "1"}
BAND_NAMES = {"red": "R", "green": "G", "blue": "B", "alpha": ALPHA}


def geo_values(data: Path | bytes, decoding: Decoding) -> Values:
    """Return the bands of a scene, in units of its own scale and offset; of a part of it where one is asked
    for.

    A pixel is missing where all bands are the scene's nodata, or any is not a number. Raises BadImage.
    """
    with _opened(data, decoding.page) as scene:
        window = decoding.window or (0, 0, scene.width, scene.height)
        x0, y0, x1, y1 = window
        if not (0 <= x0 < x1 <= scene.width and 0 <= y0 < y1 <= scene.height):
            raise BadImage(f"is {scene.width}x{scene.height} pixels, and the part {window} is asked for")
        check_pixels(x1 - x0, y1 - y0, scene.count, np.dtype(scene.dtypes[0]).itemsize)
        bands = scene.read(window=((y0, y1), (x0, x1)))
        missing, array = _missing(bands, scene.nodatavals), np.moveaxis(bands, 0, 2)
        if array.dtype.kind not in "uif":
            raise BadImage(f"values of {array.dtype}, where numbers are expected")
        scales, offsets = np.array(scene.scales), np.array(scene.offsets)
        if (scales != 1).any() or offsets.any():
            array = array * scales + offsets
        if array.dtype == np.int8:
            array = array.astype(np.int16)
        return Values(array, names=_names(scene), missing=missing)


def geo_header(data: Path | bytes, decoding: Decoding) -> Header:
    """Return the size of a scene, from its header alone."""
    with _opened(data, 0) as scene:
        bits = 8 * np.dtype(scene.dtypes[0]).itemsize
        return Header(scene.width, scene.height, 1, scene.count, bits, max(1, len(scene.subdatasets)))


@contextmanager
def _opened(data: Path | bytes, page: int | str | None) -> Iterator[Any]:
    rasterio = extra("rasterio", "geo", "GeoTIFF")
    head = data[:12] if isinstance(data, bytes) else _head(data)
    driver = "JP2OpenJPEG" if head.startswith(JP2_MAGIC) else "GTiff"
    with reading("scene"), rasterio.Env(**FILE_ALONE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is nowhere on the earth
        if isinstance(data, bytes):
            with rasterio.MemoryFile(data) as memory, memory.open(driver=driver) as scene:
                yield _checked(scene, page)
        else:
            with rasterio.open(str(data.absolute()), driver=driver) as scene:
                yield _checked(scene, page)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(12)


def _checked(scene: Any, page: int | str | None) -> Any:
    count = max(1, len(scene.subdatasets))
    if count > 1 and page is None:
        raise BadImage(f"a GeoTIFF of {count} pages; pages=first in the data string takes the first of each")
    if isinstance(page, int) and page > 0:
        raise BadImage(f"page {page + 1} of a GeoTIFF is asked for, of which only the first is read")
    return scene


def _missing(bands: np.ndarray, nodata: tuple) -> np.ndarray | None:
    """Where all bands [C, H, W] say that there is nothing, or a value is not a number; None where all is
    there.
    """
    found = np.zeros(bands.shape[1:], bool)
    if bands.dtype.kind == "f":
        found[:] = np.isnan(bands).any(axis=0)
    if all(value is not None and value == value for value in nodata):
        nothing = bands[0] == nodata[0]
        for band, value in zip(bands[1:], nodata[1:], strict=True):
            if not nothing.any():
                break
            nothing &= band == value
        found |= nothing
    return found if found.any() else None


def _names(scene: Any) -> tuple[str, ...]:
    own = tuple(name or "" for name in scene.descriptions)
    if all(own) and len(set(own)) == len(own):
        return own
    colours = tuple(BAND_NAMES.get(each.name, "") for each in scene.colorinterp)
    return colours if all(colours) and len(set(colours)) == len(colours) else ()
