"""Any picture file to RGB pixels the right way up, and pixels to the canvas.

Ordinary JPEGs go through simplejpeg (libjpeg-turbo, strict: a damaged file is an error, not a grey area), the
rest through PIL; the file's header decides which, so that nothing is tried twice.
"""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from foveola.data.sample import BadImage

MIN_SIDE = 8  # pixels; smaller pictures are tracking pixels, icons and broken exports
MAX_PIXELS = 178_956_970  # PIL's limit, for all kinds: damaged headers ask for anything
ORIENTATION = 0x0112  # the EXIF tag
# What PIL raises on damaged files: OSError (truncated, of an unknown kind) and, from its plugins, the others.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


class Scratch:
    """Memory for pixels that are used up before the next decode: fresh pages cost 10 % of a JPEG."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)

    def room(self, count: int) -> UInt8[np.ndarray, "count"]:
        """At least `count` bytes, the same as last time."""
        if len(self.memory) < count:
            self.memory = np.empty(count, np.uint8)
        return self.memory[:count]


def decode(
    image: Path | bytes | UInt8[np.ndarray, "H W 3"], scratch: Scratch | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of a picture: a path, the bytes of a file, or pixels (returned as they are).

    EXIF orientation is applied; grey, palette and CMYK become RGB; 16 bits are scaled to 8; transparent parts
    are laid on white; of an animation the first frame is taken. Raises BadImage, with the reason, for files
    that are missing, empty, damaged, of an unknown kind, or less than 8 pixels on a side.
    """
    if isinstance(image, Path):
        try:
            image = image.read_bytes()
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error
    if isinstance(image, bytes):
        size = _jpeg_size(image)
        if size is not None and size[0] * size[1] > MAX_PIXELS:
            raise BadImage(f"{size[1]}x{size[0]} pixels are more than memory should be given for")
        room = None if scratch is None or size is None else scratch.room(size[0] * size[1] * 3)
        pixels = _decode_other(image) if size is None else _decode_jpeg(image, room)
    else:
        pixels = image
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise BadImage(f"{pixels.shape[1]}x{pixels.shape[0]} pixels is less than {MIN_SIDE} on a side")
    return pixels


def to_canvas(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[Tensor, "3 h w"]:
    """Pixels that fit on a canvas of `size` a side: an axis that is longer is shrunk to it, another stays.

    So no detail is lost that the canvas has room for. Antialiased bicubic, PIL's BICUBIC within 1 level. The
    result is the memory of `pixels` where nothing is shrunk.
    """
    if not pixels.flags.writeable:  # torch warns about memory that it could write to by mistake
        pixels = pixels.copy()
    picture = torch.from_numpy(pixels).permute(2, 0, 1)
    height, width = (min(side, size) for side in picture.shape[1:])
    if picture.shape[1:] == (height, width):
        return picture
    return torch.nn.functional.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height of a picture file the right way up, from its header alone. Raises BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data))
            turned = picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except DAMAGED as error:
        raise BadImage(_reason(data, error)) from error
    return (picture.height, picture.width) if turned else picture.size


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG of 8 bits a channel in grey or colour, by its header; else None."""
    at = 2
    if data[:2] != b"\xff\xd8":
        return None
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            ordinary = marker in (0xC0, 0xC1, 0xC2) and bits == 8 and channels in (1, 3)
            return (height, width) if ordinary else None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _decode_jpeg(data: bytes, buffer: UInt8[np.ndarray, "N"] | None) -> UInt8[np.ndarray, "H W 3"]:
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
    except ValueError as error:
        raise BadImage(str(error)) from error
    start = data.find(b"Exif\0\0", 0, 1 << 16)
    return pixels if start < 0 else _turn(pixels, _exif_orientation(data[start + 6 : start + 6 + (1 << 16)]))


def _decode_other(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; damage to the pixels is an error
            picture = Image.open(io.BytesIO(data))
            return upright(picture)
    except DAMAGED as error:
        raise BadImage(_reason(data, error)) from error


def upright(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of an image that PIL has opened, as `decode` makes them of its file. Raises as PIL does."""
    picture.load()
    return _turn(_to_rgb(picture), picture.getexif().get(ORIENTATION, 1))


def _reason(data: bytes, error: Exception) -> str:
    """What PIL's error means, on one line."""
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known kind"
    return (str(error) or type(error).__name__).splitlines()[0]


def _to_rgb(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if picture.mode.startswith("I"):  # 16 bits of grey: PIL would clip to 255 rather than scale
        levels = np.asarray(picture).astype(np.int64)
        if levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
            raise BadImage("grey levels beyond 16 bits")
        return np.repeat(((levels + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.mode == "F":
        raise BadImage("floating-point pixels have no known range")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return np.array(Image.alpha_composite(white, picture).convert("RGB"))
    return np.array(picture.convert("RGB"))


def _exif_orientation(block: bytes) -> int:
    """The orientation tag of an EXIF block (a TIFF header and its first directory); 1 where there is none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None or len(block) < 10:
        return 1
    (at,) = struct.unpack_from(order + "I", block, 4)
    if at + 2 > len(block):
        return 1
    (entries,) = struct.unpack_from(order + "H", block, at)
    for entry in range(at + 2, min(at + 2 + 12 * entries, len(block) - 11), 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", block, entry)
        if tag == ORIENTATION:
            return value
    return 1


def _turn(pixels: UInt8[np.ndarray, "H W 3"], orientation: int) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels the right way up. EXIF 2-8 are the flips and quarter turns; any other value leaves them."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
