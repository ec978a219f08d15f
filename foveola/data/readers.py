"""Readers of image files: from a file to its `Values`, by what it begins with or by the end of its name.

PIL reads what no other reader here does. Libraries that not everybody has are imported by the function that
needs them, which says how they are installed.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveola.data.decoding import Decoding, StoredFile
from foveola.data.formats import Header, image_header
from foveola.data.pil_values import pil_values
from foveola.data.sample import BadImage
from foveola.data.values import Values


@dataclass(frozen=True)
class Reader:
    """How one kind of file is read.

    `magic` are bytes that it may begin with, `suffixes` (small letters, with the dot) what its name may end
    with. `values` returns what is in a file, of the part and pages that the decoding says; `header` the size
    of the image without its pixels. Both get the bytes of the file, or with `by_path` its path, and raise
    BadImage.
    """

    values: Callable[[Any, Decoding], Values]
    header: Callable[[Any], Header]
    suffixes: tuple[str, ...] = ()
    magic: tuple[bytes, ...] = ()
    by_path: bool = False


def reader_of(data: Path | bytes) -> Reader | None:
    """Return the reader of a file: by the beginning of bytes, or the end of a path; None where PIL reads it.

    Of paths only readers are found that need one: others get the bytes.
    """
    if isinstance(data, Path):
        suffix = data.suffix.lower()
        return next((each for each in READERS if each.by_path and suffix in each.suffixes), None)
    return next((each for each in READERS if each.magic and data.startswith(each.magic)), None)


def contents(data: StoredFile | bytes) -> Path | bytes:
    """Return the bytes of a file, or its path where its reader takes that. Raises OSError."""
    if isinstance(data, bytes) or (isinstance(data, Path) and reader_of(data) is not None):
        return data
    return data.read_bytes()


def read_header(data: StoredFile | bytes) -> Header:
    """Return the size and orientation of an image file, from its header alone. Raises BadImage and
    OSError.
    """
    found = contents(data)
    reader = reader_of(found)
    if reader is not None:
        return reader.header(found)
    assert isinstance(found, bytes)
    return image_header(found)


def values_in(data: StoredFile | bytes, reading: Decoding) -> Values:
    """Return what an image file holds. Raises BadImage, OSError, and what PIL raises."""
    found = contents(data)
    reader = reader_of(found)
    if reader is not None:
        return reader.values(found, reading)
    assert isinstance(found, bytes)
    return pil_values(found, reading)


# -- arrays of NumPy ---------------------------------------------------------------------------------------


def _npy(data: bytes, reading: Decoding) -> Values:
    array = _npy_array(data)
    if reading.window is not None:
        x0, y0, x1, y1 = reading.window
        array = array[y0:y1, x0:x1]
    kind = array.dtype.kind
    if kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.int8:
        array = array.astype(np.int16)
    return Values(array)


def _npy_header(data: bytes) -> Header:
    array = _npy_array(data)
    height, width, channels = array.shape
    return Header(width, height, channels=channels, bits=8 * array.dtype.itemsize)


def _npy_array(data: bytes) -> np.ndarray:
    """[H, W, C]; the shortest of three axes is that of the channels, if it is the first or the last."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
    except (ValueError, EOFError) as error:
        raise BadImage(f"a damaged .npy file: {error}") from error
    if dtype.kind not in "buif":
        raise BadImage(f"an array of {dtype}, where numbers are expected")
    count = int(np.prod([int(side) for side in shape], dtype=object)) if shape else 1
    if count * dtype.itemsize > len(data) - file.tell():
        raise BadImage(f"a .npy file of {shape} that ends before its values do")
    array = np.frombuffer(data, dtype, count, file.tell()).reshape(shape, order="F" if fortran else "C")
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise BadImage(f"an array of shape {shape}; expected [rows, columns] or [rows, columns, channels]")
    return np.moveaxis(array, 0, 2) if shape[0] < min(shape[1:]) else array


READERS: list[Reader] = [Reader(_npy, _npy_header, (".npy",), (b"\x93NUMPY",))]
