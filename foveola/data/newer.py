"""HEIC, AVIF and JPEG XL: the newer formats of photographs, by Pillow, its plug-in and a codec."""

import struct
import warnings
from typing import Any

import numpy as np
from PIL import features
from PIL.Image import Image

from foveola.data.decoding import Decoding
from foveola.data.formats import ALPHA, COLOURS, GREY, Header, open_image, orientation_of, turn
from foveola.data.guard import check_pixels, extra, reading
from foveola.data.sample import BadImage, DataError
from foveola.data.values import CONTAINER, Values

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
JXL_MAGIC = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
NAMES = {1: (GREY,), 2: (GREY, ALPHA), 3: COLOURS, 4: (*COLOURS, ALPHA)}


def is_avif(head: bytes) -> bool:
    """Return whether a file of this beginning is an AVIF."""
    return head[4:8] == b"ftyp" and _brands(head) & {*AVIF_BRANDS} != set()


def is_heif(head: bytes) -> bool:
    """Return whether a file of this beginning is a HEIC or another HEIF that is no AVIF."""
    return head[4:8] == b"ftyp" and not is_avif(head) and head[8:12] in HEIF_BRANDS


def is_jxl(head: bytes) -> bool:
    """Return whether a file of this beginning is a JPEG XL."""
    return head.startswith(JXL_MAGIC)


def _brands(head: bytes) -> set[bytes]:
    end = min(struct.unpack(">I", head[:4])[0], len(head))
    return {head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))}


# -- HEIC --------------------------------------------------------------------------------------------------


def heif_values(data: bytes, decoding: Decoding) -> Values:
    """Return the main image of a HEIF; of 10 and 12 bits all of them, scaled to 16, as the file means it."""
    with reading("HEIF"):
        image = _heif(data)
        check_pixels(image.size[0], image.size[1], 4, 2)
        array = np.asarray(image)
        array = array[:, :, None] if array.ndim == 2 else array
        array = _part(array, decoding)
        deep = array.dtype.itemsize > 1
        return Values(array, *((0.0, float(CONTAINER)) if deep else ()), names=NAMES[array.shape[2]])


def heif_header(data: bytes, decoding: Decoding) -> Header:
    """Return the size of the main image: the decoder turns it the right way up."""
    with reading("HEIF"):
        image = _heif(data)
        return Header(image.size[0], image.size[1], 1, 3, 16 if ";16" in image.mode else 8)


def _heif(data: bytes) -> Any:
    pillow_heif = extra("pillow_heif", "heif", "HEIC")
    pillow_heif.options.DECODE_THREADS = 1
    return pillow_heif.open_heif(data, convert_hdr_to_8bit=False)


# -- AVIF --------------------------------------------------------------------------------------------------


def avif_values(data: bytes, decoding: Decoding) -> Values:
    """Return an AVIF as Pillow has it, 8 bits a channel."""
    with reading("AVIF"):
        image = _avif(data)
        check_pixels(*image.size, 4)
        array = turn(np.asarray(image), orientation_of(image))
        array = _part(array[:, :, None] if array.ndim == 2 else array, decoding)
        return Values(array, names=NAMES[array.shape[2]])


def avif_header(data: bytes, decoding: Decoding) -> Header:
    """Return the size of an AVIF, from its header alone."""
    with reading("AVIF"):
        image = _avif(data)
        return Header(*image.size, orientation_of(image))


def _avif(data: bytes) -> Image:
    if not features.check("avif"):
        raise DataError("AVIF needs Pillow 11.3 or later with AVIF; pip install 'foveola[heif]'")
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    return open_image(data, ("AVIF",))


# -- JPEG XL -----------------------------------------------------------------------------------------------


def jxl_values(data: bytes, decoding: Decoding) -> Values:
    """Return the values of a JPEG XL: 8 or 16 bits, or floating point."""
    imagecodecs = extra("imagecodecs", "jxl", "JPEG XL")
    with reading("JPEG XL"), warnings.catch_warnings():
        check_pixels(*jxl_header(data, decoding).stored, 4, 2)
        array = imagecodecs.jpegxl_decode(data, numthreads=1)
        array = array[:, :, None] if array.ndim == 2 else array
        if array.ndim != 3:
            array = array[0] if array.ndim == 4 else array  # the first frame of an animation
        return Values(_part(array, decoding), names=NAMES.get(array.shape[2], ()))


def jxl_header(data: bytes, decoding: Decoding) -> Header:
    """Return the size and orientation of a JPEG XL (ISO 18181-1, SizeHeader and ImageMetadata)."""
    with reading("JPEG XL"):
        bits = _Bits(_codestream(data))
        assert bits.take(16) == 0x0AFF
        small = bits.take(1)
        height = _side(bits, small)
        ratio = bits.take(3)
        width = _side(bits, small) if ratio == 0 else height * _RATIOS[ratio][0] // _RATIOS[ratio][1]
        if bits.take(1):  # all is as usual
            return Header(width, height)
        orientation, more = 1, False
        if bits.take(1):
            orientation = bits.take(3) + 1
            more = bool(bits.take(3))  # another size, a preview, an animation: what follows is not read
        depth = 8 if more else _depth(bits)
        return Header(width, height, orientation, bits=8 if depth <= 8 else 16 if depth <= 16 else 32)


_RATIOS = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


class _Bits:
    """Bits of a codestream, the lowest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data, "little"), len(data) * 8

    def take(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise BadImage("a JPEG XL that ends in its header")
        found = self.value & ((1 << count) - 1)
        self.value >>= count
        return found


def _side(bits: _Bits, small: int) -> int:
    if small:
        return 8 * (bits.take(5) + 1)
    return bits.take((9, 13, 18, 30)[bits.take(2)]) + 1


def _depth(bits: _Bits) -> int:
    floating, choice = bits.take(1), bits.take(2)
    if choice == 3:
        return bits.take(6) + 1
    return ((32, 16, 24) if floating else (8, 10, 12))[choice]


def _codestream(data: bytes) -> bytes:
    """The first bytes of the codestream, which may lie in a box of a container."""
    at = 0
    if data.startswith(JXL_MAGIC[0]):
        return data[:32]
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 16 if size == 1 else 8
        if kind in (b"jxlc", b"jxlp"):
            start = at + head + (4 if kind == b"jxlp" else 0)
            return data[start : start + 32]
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
        if size < 8:
            break
        at += size
    raise BadImage("a JPEG XL without an image")


def _part(array: np.ndarray, decoding: Decoding) -> np.ndarray:
    if decoding.page not in (None, 0):
        raise BadImage("a page is asked for, of a file that has one")
    if decoding.window is not None:
        x0, y0, x1, y1 = decoding.window
        array = array[y0:y1, x0:x1]
    return np.ascontiguousarray(array)
