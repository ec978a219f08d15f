"""Opening image files: the formats that are promised and no others, which way up, and how many pages.

The only file of the package that asks PIL to open a file: without a list of formats it would hand a file
that begins like PostScript to Ghostscript, whatever its name.
"""

import io
import struct
import sys
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from foveola.data.sample import BadImage

# JPEG includes MPO: the first of several images, which cameras write.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
FILE_KINDS = ("image", "slide", "video")
ORIENTATION = 0x0112  # the EXIF tag
SUBFILE, BITS, CHANNELS, PLANAR = 254, 258, 277, 284  # TIFF tags
ALPHA = "alpha"  # the name of a channel that says how opaque the others are
GREY, COLOURS = "L", ("R", "G", "B")
# In the names that PIL has for the order of the bytes of 16 bits: and the opposite one.
BYTE_ORDERS = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
# What PIL raises on damaged files: OSError (truncated, of an unknown kind) and, from its plugins, the others.
DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, Image.DecompressionBombError),
)


@dataclass(frozen=True)
class Header:
    """What the header of an image file says: pixels as stored, and the EXIF orientation (1 to 8).

    `bits` are those of a channel: 8, 16, or 32 for whole numbers and floating-point ones of that size.
    """

    width: int
    height: int
    orientation: int = 1
    channels: int = 3
    bits: int = 8
    pages: int = 1
    kind: Literal["image", "slide", "video"] = "image"

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height of the pixels in the file."""
        return self.width, self.height

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the image the right way up, as `decode` gives it."""
        return (self.height, self.width) if self.orientation >= 5 else self.stored


def open_image(data: Any, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Return an image file (bytes, or an open file) of which only the header is read.

    Raises BadImage, with the reason on one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; damage to the pixels is an error
            return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=formats)
    except DAMAGED as error:
        raise BadImage(reason(data if isinstance(data, bytes) else b"file", error)) from error


def reason(data: bytes, error: Exception) -> str:
    """Return what PIL's error means, on one line."""
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return _unknown_tiff(data) or "not an image of a known kind"
    return (str(error) or type(error).__name__).splitlines()[0]


def image_header(data: Any) -> Header:
    """Return the size and orientation of a file that PIL reads (bytes, or an open file), from its header
    alone. Raises BadImage.
    """
    known = data if isinstance(data, bytes) else b""
    jpeg = jpeg_header(known)
    if jpeg is not None:
        return jpeg
    with open_image(data) as image:
        orientation = orientation_of(image, late=not known or _has_late_metadata(known))
        turned = image.format == "TIFF" and orientation >= 5  # PIL says the size the right way up already
        width, height = image.size[::-1] if turned else image.size
        return Header(
            width,
            height,
            orientation,
            len(channel_names(image)),
            bits_of(image),
            len(whole_pages(image)) if image.format == "TIFF" else 1,
        )


def orientation_of(image: Image.Image, late: bool = True) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none, and where its block is damaged: no image is
    lost for that. `late`: look also behind the pixels of a PNG, which decodes it.
    """
    try:
        exif = image.getexif() if late else Image.Image.getexif(image)
        found = exif.get(ORIENTATION, 1)
    except Exception:  # whatever PIL's reader of metadata stumbles over
        return 1
    return found if found in range(1, 9) else 1


def is_single(image: Image.Image) -> bool:
    """Return whether an image is grey of more than 8 bits, which PIL has as it is stored."""
    return image.mode.startswith("I") or image.mode == "F"


def bits_of(image: Image.Image) -> int:
    """Return the bits of a channel of an image, its pixels not yet loaded: 8, 16 or 32."""
    if is_single(image):
        return 16 if image.mode.startswith("I;16") else 32
    return 16 if any(raw_mode(tile)[-4:] in BYTE_ORDERS for tile in getattr(image, "tile", ())) else 8


def gives_all_bits(image: Image.Image) -> bool:
    """Return whether PIL gives all bits of an image, its pixels not yet loaded: of colours of 16 bits it does
    in one way of storing them.
    """
    if is_single(image) or bits_of(image) == 8:
        return True
    raw = [raw_mode(tile) for tile in getattr(image, "tile", ())]
    planes = image.format == "TIFF" and image.tag_v2.get(PLANAR) == 2  # type: ignore[attr-defined]
    return not planes and all(name[:-4] == image.mode and name[-4:] in BYTE_ORDERS for name in raw)


def raw_mode(tile: Any) -> str:
    """Return PIL's name of the layout of pixels in a part of a file, such as RGB;16B."""
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def channel_names(image: Image.Image) -> tuple[str, ...]:
    """Return the names of the channels that an image has for us; palettes, CMYK and others are RGB."""
    if is_single(image):
        return (GREY,)
    clear = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    colours = (GREY,) if image.mode in ("1", "L", "LA", "La") else COLOURS
    return (*colours, ALPHA) if clear else colours


def jpeg_header(data: bytes) -> Header | None:
    """Read the header of a JPEG of 8 bits a channel in grey or colour, without PIL; else None."""
    at, size, orientation, channels = 2, None, None, 3
    if data[:2] != b"\xff\xd8":
        return None
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # start of scan
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            if marker not in (0xC0, 0xC1, 0xC2) or bits != 8 or channels not in (1, 3):
                return None
            size = width, height
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and orientation is None and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 4 : end])
        at = end
    return None if size is None else Header(*size, orientation or 1, channels)


def _exif_orientation(block: bytes) -> int:
    """The orientation tag of an EXIF block (a TIFF header and its first directory); 1 where there is none."""
    while block.startswith(b"Exif\0\0"):  # some programs write it twice
        block = block[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None or len(block) < 10:
        return 1
    (at,) = struct.unpack_from(order + "I", block, 4)
    if at + 2 > len(block):
        return 1
    (entries,) = struct.unpack_from(order + "H", block, at)
    for entry in range(at + 2, min(at + 2 + 12 * entries, len(block) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", block, entry)
        if tag == ORIENTATION:
            (found,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), block, entry + 8)
            return found if 1 <= found <= 8 else 1
    return 1


def _has_late_metadata(data: bytes) -> bool:
    """Whether a PNG has metadata behind its pixels, which PIL finds only by decoding them."""
    at, pixels = 8, False
    while data[:4] == b"\x89PNG" and at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        pixels = pixels or kind == b"IDAT"
        if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            return True
        at += 12 + length
    return False


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels [H, W, ...] the right way up: EXIF 2 to 8 are the flips and quarter turns."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def turn_boxes(boxes: np.ndarray, orientation: int) -> np.ndarray:
    """Return boxes [K, 4] in the unit square, turned as `turn` turns the pixels that they were drawn on."""
    x0, y0, x1, y1 = boxes.T
    if orientation >= 5:
        x0, y0, x1, y1 = y0, x0, y1, x1
    if orientation in (2, 3, 6, 7):
        x0, x1 = 1 - x1, 1 - x0
    if orientation in (3, 4, 7, 8):
        y0, y1 = 1 - y1, 1 - y0
    return np.stack([x0, y0, x1, y1], axis=1)


def page_indices(image: Image.Image, page: int | str | None) -> list[int]:
    """Return the pages of a file, from 0, that are meant by `Decoding.page`.

    Raises BadImage for a TIFF of several where none is chosen (reduced copies are no pages), and for one that
    is not there. Of an animation the first frame is meant.
    """
    count = getattr(image, "n_frames", 1)
    if isinstance(page, int):
        if page >= count:
            raise BadImage(f"has {count} page(s), and page {page + 1} is asked for")
        return [page]
    if page is None and image.format != "TIFF":
        return [0]
    whole = whole_pages(image)
    if page is None and len(whole) > 1:
        raise BadImage(
            f"a TIFF of {count} pages; pages=first in the data string takes the first of each, "
            "pages=channels all of them as channels, pages=each makes an image of each"
        )
    return whole if page == "channels" else [0]


def whole_pages(image: Image.Image) -> list[int]:
    """Return the pages of a file, from 0, that are no reduced copies."""
    count = getattr(image, "n_frames", 1)
    whole = [number for number in range(count) if not _is_reduced(image, number)]
    if count > 1:
        image.seek(0)
    return whole


def _is_reduced(image: Image.Image, page: int) -> bool:
    if image.format != "TIFF":
        return False
    image.seek(page)
    return bool(image.tag_v2.get(SUBFILE, 0) & 1)  # type: ignore[attr-defined]


def _unknown_tiff(data: bytes) -> str | None:
    """Why PIL does not know a TIFF file: its channels and bits."""
    try:
        big = data[2:3] == b"+" or data[3:4] == b"+"  # BigTIFF
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if big else 8])
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        channels, bits = directory.get(CHANNELS, 1), directory.get(BITS, (1,))
    except Exception:  # no TIFF, or none that can be read so far
        return None
    same = all(a == b for a, b in pairwise(bits))
    about = f"{bits[0]} bits" if same else f"{', '.join(map(str, bits))} bits"
    return (
        f"a TIFF of {channels} channel(s) of {about}: only grey and RGB, with or without alpha, can be read"
    )
