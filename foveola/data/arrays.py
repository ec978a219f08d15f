"""Arrays that NumPy wrote: `.npy` and `.npz`, rows and columns, perhaps channels."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foveola.data.decoding import Decoding
from foveola.data.formats import Header
from foveola.data.guard import MAX_BYTES, check_pixels, reading
from foveola.data.sample import BadImage
from foveola.data.values import Values

NPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"
IMAGE = "image"  # which array of several in an .npz is meant


def npy_values(data: Path | bytes, decoding: Decoding) -> Values:
    """Return an array [H, W] or [H, W, C] ([C, H, W] where the first axis is the shortest).

    Raises BadImage.
    """
    with reading(".npy file"):
        return _values(_mapped(data), decoding)


def npy_header(data: Path | bytes, decoding: Decoding) -> Header:
    """Return the size of an array, from its header alone."""
    with reading(".npy file"):
        return _header(_mapped(data))


def npz_values(data: Path | bytes, decoding: Decoding) -> Values:
    """Return the only array of an `.npz`, or the one that is called `image`. Raises BadImage."""
    with reading(".npz file"):
        unpacked = _unpacked(data)
        _part(unpacked.like, decoding)  # before all of it is read
        return _values(unpacked.read(), decoding)


def npz_header(data: Path | bytes, decoding: Decoding) -> Header:
    """Return the size of the array in an `.npz`."""
    with reading(".npz file"):
        return _header(_unpacked(data).like)


def _part(array: np.ndarray, decoding: Decoding) -> np.ndarray:
    if decoding.page is not None:
        raise BadImage("pages= is asked for, of an array, which has none")
    array = _rows_columns_channels(array)
    if decoding.window is not None:
        x0, y0, x1, y1 = decoding.window
        array = array[y0:y1, x0:x1]
    check_pixels(array.shape[1], array.shape[0], array.shape[2], array.itemsize)
    return array


def _values(array: np.ndarray, decoding: Decoding) -> Values:
    array = _part(array, decoding)
    array = array.astype(array.dtype.newbyteorder("="))  # out of the mapped file
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.int8:
        array = array.astype(np.int16)
    return Values(array)


def _header(array: np.ndarray) -> Header:
    height, width, channels = _rows_columns_channels(array).shape
    return Header(width, height, 1, channels, max(8, array.itemsize * 8))


def _rows_columns_channels(array: np.ndarray) -> np.ndarray:
    """[H, W, C]; the shortest of three axes is that of the channels, if it is the first or the last."""
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise BadImage(
            f"an array of shape {array.shape}; expected [rows, columns] or [rows, columns, channels]"
        )
    return np.moveaxis(array, 0, 2) if array.shape[0] < min(array.shape[1:]) else array


def _mapped(data: Path | bytes) -> np.ndarray:
    """The array of a file, of which only what is used will be read."""
    file: Any = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")
    with file:
        shape, fortran, dtype = _described(file)
        offset = file.tell()
        file.seek(0, io.SEEK_END)
        count = int(np.prod([int(side) for side in shape], dtype=object)) if shape else 1
        if dtype.kind not in "buif":
            raise BadImage(f"an array of {dtype}, where numbers are expected")
        if count * dtype.itemsize > file.tell() - offset:
            raise BadImage(f"a .npy file of {shape} that ends before its values do")
    if not count:
        raise BadImage(f"an array of shape {shape}, which holds nothing")
    order = "F" if fortran else "C"
    if isinstance(data, bytes):
        return np.frombuffer(data, dtype, count, offset).reshape(shape, order=order)
    return np.memmap(data, dtype, "r", offset, shape, order=order)


def _described(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


class _Unpacked(NamedTuple):
    """An array in an `.npz`: `like` has its shape and dtype, and no values of its own."""

    like: np.ndarray
    read: Callable[[], np.ndarray]


def _unpacked(data: Path | bytes) -> _Unpacked:
    with zipfile.ZipFile(io.BytesIO(data) if isinstance(data, bytes) else data) as packed:
        names = [each.filename for each in packed.infolist()]
        arrays = [name for name in names if name.endswith(".npy")]
        chosen = f"{IMAGE}.npy" if f"{IMAGE}.npy" in arrays else arrays[0] if len(arrays) == 1 else None
        if chosen is None:
            found = ", ".join(name.removesuffix(".npy") for name in arrays[:5]) or "none"
            raise BadImage(f"an .npz of the arrays {found}, where one, or one called {IMAGE!r}, is expected")
        with packed.open(chosen) as file:
            shape, _, dtype = _described(file)
        count = int(np.prod([int(side) for side in shape], dtype=object))
        size = count * dtype.itemsize
        if size > MAX_BYTES or size + 2**16 < packed.getinfo(chosen).file_size:
            raise BadImage(f"an array of {dtype} {shape}, which is more than memory should be given for")
        if dtype.kind not in "buif" or not count:
            raise BadImage(f"an array of {dtype} {shape}, where numbers are expected")

    def read() -> np.ndarray:
        with zipfile.ZipFile(io.BytesIO(data) if isinstance(data, bytes) else data) as packed:
            return _mapped(packed.read(chosen))

    return _Unpacked(np.broadcast_to(np.zeros((), dtype), shape), read)
