"""Any image file to RGB pixels the right way up, and pixels to the canvas.

Ordinary JPEGs go through simplejpeg (libjpeg-turbo, strict: a damaged file is an error, not a grey area), the
rest through PIL; the file's header decides which, so that nothing is tried twice.
"""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from foveola.config import kind_of
from foveola.data.decoding import RGB, Decoding, ImageFile, StoredFile
from foveola.data.formats import (
    DAMAGED,
    bits_of,
    is_single,
    jpeg_header,
    open_image,
    orientation_of,
    page_indices,
    reason,
    turn,
)
from foveola.data.guard import MAX_PIXELS
from foveola.data.pil_values import opened_values, pil_values
from foveola.data.readers import open_file, values_in
from foveola.data.sample import BadImage, DataError
from foveola.data.values import Values, is_dark, to_pixels

MIN_SIDE = 8  # pixels; smaller images are tracking pixels, icons and broken exports
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
STRAY_BYTES = 16  # stray bytes before the end of a JPEG that are no sign of damage
PLAIN = Decoding()
UNRANGED = {"ranges": (), "container": False, "percentiles": None, "deep": False}


class Scratch:
    """Memory for pixels that are used up before the next decode: fresh pages cost 10 % of a JPEG."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)

    def room(self, count: int) -> UInt8[np.ndarray, "count"]:
        """Return at least `count` bytes, the same as last time."""
        if len(self.memory) < count:
            self.memory = np.empty(count, np.uint8)
        return self.memory[:count]


def decode(
    image: StoredFile | bytes | ImageFile | Shaped[np.ndarray, "H W C"], scratch: Scratch | None = None
) -> Shaped[np.ndarray, "H W C"]:
    """Return pixels of an image: a path or where else its bytes lie, the bytes of a file, or pixels (returned
    as they are).

    They are RGB of uint8 unless the `Decoding` of an `ImageFile` says otherwise: `channels`, and uint16 where
    it knows the range of values, whose low end is 0 and whose high end is all of the dtype.
    EXIF orientation is applied; grey, palette and CMYK become RGB; transparent parts are laid on white; of an
    animation the first frame is taken. Raises BadImage, with the reason, for files that are missing, empty,
    damaged, of an unknown kind, of several pages or other channels than are meant, of floating-point values
    without a range, or less than 8 pixels a side.
    """
    reading = PLAIN
    if isinstance(image, ImageFile):
        image, reading = image.data, image.reading
    if isinstance(image, np.ndarray):  # to ask for a `StoredFile` costs 10 % of a small JPEG
        pixels = image
    else:
        try:
            pixels = _decode_file(image, reading, scratch)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise BadImage(f"{pixels.shape[1]}x{pixels.shape[0]} pixels is less than {MIN_SIDE} on a side")
    return pixels


def _decode_file(file: StoredFile | bytes, reading: Decoding, scratch: Scratch | None) -> np.ndarray:
    data, reader = open_file(file, reading)
    if reader is not None:
        return to_pixels(reader.values(data, reading), reading)
    assert isinstance(data, bytes)
    jpeg = jpeg_header(data)
    if jpeg is None or reading.channels is not None or reading.window is not None:
        return _decode_other(data, reading)
    if jpeg.width * jpeg.height > MAX_PIXELS:
        raise BadImage(f"{jpeg.width}x{jpeg.height} pixels are more than memory should be given for")
    room = None if scratch is None else scratch.room(jpeg.width * jpeg.height * 3)
    return _deepened(_decode_jpeg(data, jpeg.orientation, room), reading)


def _deepened(pixels: UInt8[np.ndarray, "H W C"], reading: Decoding) -> Shaped[np.ndarray, "H W C"]:
    return pixels * np.uint16(257) if reading.depth == 16 else pixels


def to_canvas(pixels: Shaped[np.ndarray, "H W C"], size: int) -> Shaped[Tensor, "C h w"]:
    """Return pixels that fit on a canvas of `size` a side: an axis that is longer is shrunk to it, another
    stays.

    So no detail is lost that the canvas has room for. Antialiased bicubic, PIL's BICUBIC within 1 level. The
    result is the memory of `pixels` where nothing is shrunk.
    """
    if not pixels.flags.writeable:  # torch warns about memory that it could write to by mistake
        pixels = pixels.copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    height, width = (min(side, size) for side in image.shape[1:])
    if image.shape[1:] == (height, width):
        return image
    return resize_pixels(image, height, width, "bicubic")


def resize_pixels(
    image: Shaped[Tensor, "C H W"], height: int, width: int, mode: str
) -> Shaped[Tensor, "C {height} {width}"]:
    """Return pixels of uint8 or uint16 in another size, antialiased, rounded to their dtype."""
    if image.dtype == torch.uint8:
        return interpolate(image[None], (height, width), mode=mode, antialias=True)[0]
    top = torch.iinfo(image.dtype).max
    # Each channel alone is what it is in an image of another number of channels, bit for bit.
    planes = image.to(torch.float32, memory_format=torch.contiguous_format)[:, None]
    resized = interpolate(planes, (height, width), mode=mode, antialias=True)[:, 0]
    return resized.round_().clamp_(0, top).to(image.dtype)


def _decode_jpeg(
    data: bytes, orientation: int, buffer: UInt8[np.ndarray, "N"] | None
) -> UInt8[np.ndarray, "H W 3"]:
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
    except ValueError as error:
        if not _is_padded(data, str(error)):
            raise BadImage(str(error)) from error
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer, strict=False)
    return turn(pixels, orientation)


def _is_padded(data: bytes, complaint: str) -> bool:
    """Whether a JPEG is whole, but for bytes between its last pixel and its end.

    That is what cameras and editors leave: a few bytes, or one value again and again. Many different ones
    are pixels that were not read because a damage made earlier ones longer than they are.
    """
    found = EXTRANEOUS.search(complaint)
    if found is None:
        return False
    count = int(found[1])
    end = data.rfind(b"\xff\xd9")
    return count <= STRAY_BYTES or len(set(data[max(end - count, 0) : end])) == 1


def _decode_other(data: bytes, reading: Decoding) -> Shaped[np.ndarray, "H W C"]:
    image = open_image(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; damage to the pixels is an error
            pages = page_indices(image, reading.page)
            if reading.channels is not None or len(pages) > 1 or reading.window is not None:
                return to_pixels(pil_values(data, reading), reading)
            if pages[0]:
                image.seek(pages[0])
            if is_single(image) or (bits_of(image) > 8 and reading.ranged):
                return to_pixels(pil_values(data, reading), reading)
            image.load()
            return _deepened(turn(_to_rgb(image), orientation_of(image)), reading)
    except DAMAGED as error:
        raise BadImage(reason(data, error)) from error


def pixels_of(image: Any, values: str | None = None, usual: Decoding = PLAIN) -> Shaped[np.ndarray, "H W C"]:
    """Return RGB pixels of a path (text, too), the bytes of a file, a PIL image or an array, as `decode` has
    them.

    It may also be the image of a source's sample, whose data string says how it is read. `values` is the
    `range=` of a data string, for images of more than 8 bits; all else, and the range where there is none, is
    as `usual` says. Without a range, those that use half of 16 bits at most are taken with a warning.
    Raises DataError, with the reason, for what is none.
    """
    name = str(image) if isinstance(image, str | Path) else kind_of(image)
    if isinstance(image, ImageFile) and values is not None:
        raise DataError(f"range={values}: the data string of this image says how it is read")
    try:
        reading = usual if values is None else replace(usual, **UNRANGED | Decoding.values(values))
    except ValueError as error:
        raise DataError(f"range={values}: expected {error}") from None
    try:
        if isinstance(image, ImageFile):
            return decode(image)
        if isinstance(image, str | Path):
            image = Path(image).expanduser()
        if isinstance(image, bytes | Path):
            if reading == PLAIN and _is_dark_file(image):
                _warn_of_dark()
            return decode(ImageFile(image, reading))
        if isinstance(image, np.ndarray) and image.ndim == 3:
            return decode(_of_array(image, reading))
        return decode(_of_pil(image, reading))
    except (AttributeError, KeyError, TypeError) as error:  # of PIL, for what is no array or not of an image
        raise DataError(f"{name} is no image: expected a path, bytes, PIL or uint8 [H, W, 3]") from error
    except BadImage as error:
        raise DataError(f"{name}: {error}") from error
    except DAMAGED as error:
        raise DataError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def _of_array(array: np.ndarray, reading: Decoding) -> Shaped[np.ndarray, "H W C"]:
    """Values [H, W, C] in the channels and the range that are meant; of uint8 as it is those are all."""
    if array.dtype == np.uint8 and reading.channels is None and array.shape[2] == RGB:
        return _deepened(array, reading)
    if array.dtype.kind not in "uif" or (array.dtype.kind == "f" and not reading.ranged):
        raise TypeError(array.dtype)
    if array.dtype == np.uint16 and reading.ranges:
        _warn_of_white(array, reading)
    return to_pixels(Values(array), replace(reading, page=None))


def _of_pil(image: Any, reading: Decoding) -> Shaped[np.ndarray, "H W C"]:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    if not is_single(image):
        if reading.ranged and bits_of(image) > 8:
            raise BadImage("of 16-bit colour PIL keeps the upper bytes alone: give the file's path")
        image.load()
        if reading.channels is None:
            return _deepened(turn(_to_rgb(image), orientation_of(image)), reading)
    values = opened_values(image)
    if reading == PLAIN and values.high is None and values.deep and is_dark(values.array):
        _warn_of_dark()
    return turn(to_pixels(values, reading), orientation_of(image))


def _is_dark_file(data: bytes | Path) -> bool:
    if isinstance(data, bytes) and jpeg_header(data) is not None:
        return False
    try:
        values = values_in(data, PLAIN)
    except (BadImage, *DAMAGED):  # `decode` says what it is
        return False
    return values.high is None and values.deep and is_dark(values.array)


def _warn_of_dark() -> None:
    warnings.warn(
        "an image of more than 8 bits uses half of 16 at most and becomes dark: give the range of its "
        'values, such as range="0-4095" (that of the data string of training), or range="container" if it is '
        "meant to be dark",
        stacklevel=4,
    )


def _warn_of_white(array: Shaped[np.ndarray, "H W C"], reading: Decoding) -> None:
    beyond = (array > max(high for _, high in reading.ranges)).mean()
    if beyond > 0.5:
        warnings.warn(
            f"{beyond:.0%} of an array are beyond range={reading.options()['range']}, and become white: "
            "arrays hold values as files do; pixels that were read in a range already are given as tensors",
            stacklevel=5,
        )


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.array(Image.alpha_composite(white, image).convert("RGB"))
    return np.array(image.convert("RGB"))
