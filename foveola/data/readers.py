"""Readers of image files: which library reads a file, as its first bytes say, and what it may be called.

PIL reads what no other reader here does. Libraries that not everybody has are imported by the function that
needs them, which says how they are installed. Of a TIFF, its tags say whose it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from foveola.data.arrays import NPY_MAGIC, ZIP_MAGIC, npy_header, npy_values, npz_header, npz_values
from foveola.data.decoding import Decoding, StoredFile
from foveola.data.dicom import dicom_header, dicom_values, is_dicom
from foveola.data.formats import Header, image_header
from foveola.data.geotiff import JP2_MAGIC, geo_header, geo_values
from foveola.data.newer import (
    avif_header,
    avif_values,
    heif_header,
    heif_values,
    is_avif,
    is_heif,
    is_jxl,
    jxl_header,
    jxl_values,
)
from foveola.data.pil_values import pil_values
from foveola.data.slides import slide_header, slide_values
from foveola.data.tags import TIFF_MAGIC, library_of
from foveola.data.tiff import tiff_header, tiff_values
from foveola.data.values import Values
from foveola.data.video import is_video, video_header, video_values

HEAD_BYTES = 256  # bytes by which a file is known
FIRST_BYTES = 2**16  # of a file that are read at once: all of a small one
LARGE_IMAGE = 2**24  # pixels of an image beyond which a look takes parts of it
SEEN_SQUARES, SEEN_SIDE = 4, 256  # these: how many along a side, and their pixels a side
USUAL_MAGIC = (b"\xff\xd8\xff", b"\x89PNG")  # of what PIL reads, which most files are


@dataclass(frozen=True)
class Reader:
    """How one kind of file is read.

    `begins` says whether a file is one, by its first `HEAD_BYTES`; `suffixes` (small letters, with the dot)
    are the names under which a folder is searched for it. `values` returns what is in a file, of the part and
    page that the decoding says; `header` its size without its pixels. Both get the bytes of the file, or with
    `by_path` its path where it has one, and raise BadImage.
    """

    values: Callable[[Any, Decoding], Values]
    header: Callable[[Any, Decoding], Header]
    suffixes: tuple[str, ...]
    begins: Callable[[bytes], bool]
    by_path: bool = False


def _starts(*magic: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magic)


def _no(head: bytes) -> bool:
    return False


# Of TIFFs: `library_of` says which of these three, or PIL, reads it.
TIFF = Reader(tiff_values, tiff_header, (".tif", ".tiff", ".ome.tif", ".btf"), _no, True)
SCENE = Reader(geo_values, geo_header, (".jp2", ".j2k"), _starts(*JP2_MAGIC), True)
SLIDE = Reader(slide_values, slide_header, (".svs", ".ndpi", ".scn", ".bif"), _no, True)
VIDEO = Reader(video_values, video_header, (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"), is_video, True)
READERS = (
    Reader(npy_values, npy_header, (".npy",), _starts(NPY_MAGIC), True),
    Reader(npz_values, npz_header, (".npz",), _starts(ZIP_MAGIC)),
    Reader(dicom_values, dicom_header, (".dcm", ".dicom"), is_dicom, True),
    Reader(avif_values, avif_header, (".avif",), is_avif),
    Reader(heif_values, heif_header, (".heic", ".heif", ".hif"), is_heif),
    Reader(jxl_values, jxl_header, (".jxl",), is_jxl),
    *(TIFF, SCENE, SLIDE, VIDEO),
)
PIL_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm")
SUFFIXES = frozenset((*PIL_SUFFIXES, *(suffix for each in READERS for suffix in each.suffixes)))
VIDEO_SUFFIXES = frozenset(VIDEO.suffixes)  # of which frames are taken where a data string says which


def open_file(data: StoredFile | bytes, decoding: Decoding) -> tuple[Path | bytes, Reader | None]:
    """Return the bytes of a file, or its path where its reader takes that; and the reader, None where PIL
    reads it. Raises OSError, and BadImage.
    """
    if not isinstance(data, Path):
        data = data if isinstance(data, bytes) else data.read_bytes()
        return data, reader_of(data, decoding)
    with data.open("rb", buffering=0) as file:
        head = file.read(FIRST_BYTES)
        reader = _reader(head[:HEAD_BYTES], data, decoding)
        if reader is not None and reader.by_path:
            return data, reader
        return head + file.readall(), reader


def reader_of(data: StoredFile | bytes, decoding: Decoding) -> Reader | None:
    """Return the reader of a file, None where PIL reads it. Raises OSError and BadImage."""
    if not isinstance(data, Path):
        data = data if isinstance(data, bytes) else data.read_bytes()
        return _reader(data[:HEAD_BYTES], data, decoding)
    with data.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return _reader(head, data, decoding)


def _reader(head: bytes, data: Path | bytes, decoding: Decoding) -> Reader | None:
    if head.startswith(USUAL_MAGIC) and not is_dicom(head):
        return None
    if head.startswith(TIFF_MAGIC) and not is_dicom(head):  # whose first 128 bytes may be those of a TIFF
        library = library_of(data, decoding)
        return {"pil": None, "tifffile": TIFF, "rasterio": SCENE, "slide": SLIDE}[library]
    return next((each for each in READERS if each.begins(head)), None)


def contents(data: StoredFile | bytes) -> Path | bytes:
    """Return the bytes of a file, or its path where parts of it may be read. Raises OSError and BadImage."""
    if not isinstance(data, Path):
        return data if isinstance(data, bytes) else data.read_bytes()
    with data.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if head.startswith(TIFF_MAGIC) or any(each.by_path and each.begins(head) for each in READERS):
            return data
        return head + file.read()


def read_header(data: StoredFile | bytes, decoding: Decoding = Decoding()) -> Header:  # noqa: B008 (frozen)
    """Return the size and orientation of an image file, from its header alone. Raises BadImage and
    OSError.
    """
    data = data if isinstance(data, bytes | Path) else data.read_bytes()
    reader = reader_of(data, decoding)
    if reader is not None:
        return reader.header(
            data if reader.by_path or isinstance(data, bytes) else data.read_bytes(), decoding
        )
    if isinstance(data, bytes):
        return image_header(data)
    with data.open("rb") as file:
        tiff = file.read(4) in TIFF_MAGIC
        file.seek(0)
        return image_header(file if tiff else file.read())


def values_in(data: StoredFile | bytes, decoding: Decoding) -> Values:
    """Return what an image file holds. Raises BadImage, OSError, and what PIL raises."""
    found, reader = open_file(data, decoding)
    if reader is not None:
        return reader.values(found, decoding)
    assert isinstance(found, bytes)
    return pil_values(found, decoding)


def values_seen(data: StoredFile | bytes, decoding: Decoding) -> Values:
    """Return values for a look at a file: of all of it, or, of one of more than 16 million pixels that need
    not be decoded whole, of 16 squares that are spread evenly over it, side by side. Raises as `values_in`.
    """
    reader = reader_of(data, decoding)
    if reader is None or not reader.by_path or decoding.window is not None:
        return values_in(data, decoding)
    width, height = read_header(data, decoding).upright
    if width * height <= LARGE_IMAGE:
        return values_in(data, decoding)
    side, found = min(SEEN_SIDE, width, height), []
    for y, x in product(range(SEEN_SQUARES), repeat=2):
        x0, y0 = ((n * (all_ - side)) // (SEEN_SQUARES - 1) for n, all_ in ((x, width), (y, height)))
        found.append(values_in(data, decoding.at((x0, y0, x0 + side, y0 + side))))
    missing = [
        np.zeros(each.array.shape[:2], bool) if each.missing is None else each.missing for each in found
    ]
    arrays = np.concatenate([each.array for each in found], axis=1)
    return replace(found[0], array=arrays, missing=np.concatenate(missing, axis=1))
