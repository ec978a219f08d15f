"""DICOM files: values after the file's own rescale, its window as the range, frames, and packing."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveola.data.decoding import Decoding
from foveola.data.formats import COLOURS, Header
from foveola.data.guard import check_pixels, extra, reading
from foveola.data.sample import BadImage, DataError
from foveola.data.values import Values

AT, MAGIC = 128, b"DICM"
DEFLATED = "1.2.840.10008.1.2.1.99"  # all of the file is compressed, to any size
GDCM = "gdcm"  # what the extra has
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
NEEDED = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored"),
    *("PhotometricInterpretation", "Modality", "SOPClassUID"),
)


def is_dicom(head: bytes) -> bool:
    """Return whether a file of this beginning is a DICOM file."""
    return head[AT : AT + len(MAGIC)] == MAGIC


def dicom_values(data: Path | bytes, decoding: Decoding) -> Values:
    """Return what a DICOM file holds, in the units of its rescale; its window, or else the bits that it
    stores, as the range.

    MONOCHROME1, where high values are dark, is turned over within the stored bits. Raises BadImage for
    several frames of which none is chosen, and DataError for a compression that needs another library.
    """
    pydicom = extra("pydicom", "dicom", "DICOM")
    with reading("DICOM file"):
        frames = _check(_headed(pydicom, data), decoding)
        found: Any = pydicom.Dataset()
        stored = _pixels(pydicom, data, decoding, found)
        if frames and decoding.page == "channels":
            stored = np.moveaxis(stored, 0, 2) if stored.ndim == 3 else stored
        array = stored[:, :, None] if stored.ndim == 2 else stored
        if array.ndim != 3:
            raise BadImage(f"pixels of shape {stored.shape}, where an image is expected")
        kind = str(found.get("PhotometricInterpretation", ""))
        if kind == "PALETTE COLOR":
            array = pydicom.pixels.apply_color_lut(stored, found)
        if decoding.window is not None:
            x0, y0, x1, y1 = decoding.window
            array = array[y0:y1, x0:x1]
        if kind not in MONOCHROME:
            return Values(array, names=COLOURS if array.shape[2] == 3 else ())
        return _grey(found, array, decoding)


def dicom_header(data: Path | bytes, decoding: Decoding) -> Header:
    """Return the size of a frame, and how many frames there are, without reading pixels."""
    pydicom = extra("pydicom", "dicom", "DICOM")
    with reading("DICOM file"):
        found = _headed(pydicom, data)
        _check_pixels(found)
        bits = 8 if int(found.get("BitsStored", 8)) <= 8 else 16
        channels = int(found.get("SamplesPerPixel", 1))
        return Header(int(found.Columns), int(found.Rows), 1, channels, bits, _frames(found))


# -- reading -----------------------------------------------------------------------------------------------


def _file(data: Path | bytes) -> Any:
    return io.BytesIO(data) if isinstance(data, bytes) else str(data.absolute())


def _headed(pydicom: Any, data: Path | bytes) -> Any:
    meta = pydicom.filereader.read_file_meta_info(_file(data)) if isinstance(data, Path) else None
    if meta is None:
        meta = pydicom.filereader._read_file_meta_info(_after_preamble(data))
    if str(meta.get("TransferSyntaxUID", "")) == DEFLATED:
        raise BadImage("a DICOM file of the deflated transfer syntax, which is not read")
    return pydicom.dcmread(_file(data), stop_before_pixels=True, specific_tags=list(NEEDED))


def _after_preamble(data: Any) -> io.BytesIO:
    file = io.BytesIO(data)
    file.seek(AT + len(MAGIC))
    return file


def _frames(found: Any) -> int:
    return max(int(found.get("NumberOfFrames", None) or 1), 1)


def _check_pixels(found: Any) -> None:
    if "Rows" not in found or "Columns" not in found:
        raise BadImage(f"a DICOM file without an image ({found.get('Modality', 'of no modality')})")


def _check(found: Any, decoding: Decoding) -> bool:
    """Whether it has several frames, of which some are chosen."""
    _check_pixels(found)
    count = _frames(found)
    page = decoding.page
    if page is None and count > 1:
        raise BadImage(
            f"a DICOM file of {count} frames; pages=first in the data string takes the first of each, "
            "pages=channels all of them as channels, pages=each makes an image of each"
        )
    if isinstance(page, int) and page >= count:
        raise BadImage(f"has {count} frame(s), and frame {page + 1} is asked for")
    many = count if page == "channels" else 1
    samples = int(found.get("SamplesPerPixel", 1)) * many
    check_pixels(int(found.Columns), int(found.Rows), samples, int(found.get("BitsAllocated", 16)) // 8 or 1)
    return count > 1


def _pixels(pydicom: Any, data: Path | bytes, decoding: Decoding, found: Any) -> np.ndarray:
    """Pixels of a frame, or of all, as they are stored; colours as RGB. `found` gets what describes them."""
    page = decoding.page
    index = None if page == "channels" else page if isinstance(page, int) else 0
    try:
        return pydicom.pixels.pixel_array(_file(data), ds_out=found, index=index)
    except (RuntimeError, ImportError) as error:
        syntax = found.file_meta.TransferSyntaxUID if hasattr(found, "file_meta") else _syntax(pydicom, data)
        try:
            decoder = pydicom.pixels.get_decoder(syntax)
        except NotImplementedError:
            raise BadImage(f"a DICOM file of {syntax.name}, which is not read") from error
        if decoder.is_available:
            raise
        needed = [name for name in decoder.missing_dependencies if not name.startswith(GDCM)]
        if len(needed) < len(decoder.missing_dependencies):
            needed.insert(0, "pip install 'foveola[dicom]'")
        raise DataError(
            f"DICOM files of {syntax.name} need a library that decodes them: {' or '.join(needed)}"
        ) from error


def _syntax(pydicom: Any, data: Path | bytes) -> Any:
    return pydicom.dcmread(_file(data), stop_before_pixels=True).file_meta.TransferSyntaxUID


# -- grey values -------------------------------------------------------------------------------------------


def _grey(found: Any, array: np.ndarray, decoding: Decoding) -> Values:
    missing = _padding(found, array)
    bits, signed = int(found.BitsStored), int(found.get("PixelRepresentation", 0)) == 1
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = _rescale(found, decoding.page)
    if array.dtype.kind == "f":
        slope, intercept, ends = 1.0, 0.0, (0, 1)
    if (slope, intercept) != (1.0, 0.0):
        whole = float(slope).is_integer() and float(intercept).is_integer()
        array = _rescaled(array, int(slope), int(intercept)) if whole else array * slope + intercept
    low, high = sorted(end * slope + intercept for end in ends)
    turned = str(found.PhotometricInterpretation) == "MONOCHROME1"
    if turned:
        array = (np.array(low + high).astype(array.dtype) - array).astype(array.dtype)
    window = _window(found, decoding)
    if window is not None:
        start, end = window
        start, end = (low + high - end, low + high - start) if turned else (start, end)
    elif array.dtype.kind == "f" and slope == 1.0 and intercept == 0.0 and "BitsStored" not in found:
        return Values(array, missing=missing)
    else:
        start, end = low, high
    return Values(array, float(start), float(end), missing=missing)


def _rescaled(array: np.ndarray, slope: int, intercept: int) -> np.ndarray:
    """Whole numbers in 32 bits, or in 64 where some would not fit."""
    about = np.iinfo(array.dtype)
    fits = all(abs(int(end) * slope + intercept) < 2**31 for end in (about.min, about.max))
    array = array.astype(np.int32 if fits else np.int64)
    array *= slope
    array += intercept
    return array


def _groups(found: Any, name: str, page: int | str | None) -> Any:
    """A functional group of an enhanced file: of the frame, or of all frames; else the file itself."""
    frame = page if isinstance(page, int) else 0
    for sequence, index in (
        ("PerFrameFunctionalGroupsSequence", frame),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        groups = found.get(sequence)
        if groups is not None and index < len(groups) and name in groups[index]:
            return groups[index][name].value[0]
    return found


def _rescale(found: Any, page: int | str | None) -> tuple[float, float]:
    if "ModalityLUTSequence" in found:
        raise BadImage("values that a table of the file (Modality LUT) describes, which is not read")
    group = _groups(found, "PixelValueTransformationSequence", page)
    slope, intercept = group.get("RescaleSlope", None), group.get("RescaleIntercept", None)
    slope = 1.0 if slope is None else float(slope)
    return slope or 1.0, 0.0 if intercept is None else float(intercept)


def _window(found: Any, decoding: Decoding) -> tuple[float, float] | None:
    """The values that are black and white by the first window of the file (PS3.3, C.11.2.1.2)."""
    group = _groups(found, "FrameVOILUTSequence", decoding.page)
    centre, width = _first(group.get("WindowCenter", None)), _first(group.get("WindowWidth", None))
    if centre is None or width is None or not width > 0:
        return None
    function = str(group.get("VOILUTFunction", None) or "LINEAR")
    if function == "SIGMOID" and not decoding.ranged:
        raise BadImage("a window of the function SIGMOID, which is no range; give one, such as range=0-4095")
    if function == "LINEAR" and width > 1:
        return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    return centre - width / 2, centre + width / 2


def _first(value: Any) -> float | None:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if len(value) else None
    return None if value in (None, "") else float(value)


def _padding(found: Any, array: np.ndarray) -> np.ndarray | None:
    """Pixels that stand for nothing, beyond the border of what was measured."""
    value = found.get("PixelPaddingValue", None)
    if value is None or array.shape[2] != 1:
        return None
    ends = sorted((int(value), int(found.get("PixelPaddingRangeLimit", None) or value)))
    return ((array >= ends[0]) & (array <= ends[1]))[:, :, 0]
