"""Any image file to RGB pixels the right way up, and pixels to the canvas.

Ordinary JPEGs go through simplejpeg (libjpeg-turbo, strict: a damaged file is an error, not a grey area), the
rest through PIL; the file's header decides which, so that nothing is tried twice.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from foveola.config import kind_of
from foveola.data.depth import CONTAINER, is_dark, is_deep, states_range, to_bytes, values_of
from foveola.data.formats import DAMAGED, check_pages, jpeg_header, open_image, orientation_of, reason, turn
from foveola.data.sample import BadImage, DataError, Decoding, ImageFile

MIN_SIDE = 8  # pixels; smaller images are tracking pixels, icons and broken exports
MAX_PIXELS = 178_956_970  # PIL's limit, for all kinds: damaged headers ask for anything
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
STRAY_BYTES = 16  # stray bytes before the end of a JPEG that are no sign of damage
PLAIN = Decoding()


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
    image: Path | bytes | ImageFile | UInt8[np.ndarray, "H W 3"], scratch: Scratch | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Return RGB pixels of an image: a path, the bytes of a file, or pixels (returned as they are).

    EXIF orientation is applied; grey, palette and CMYK become RGB; 16 bits are scaled to 8, from the range
    of an `ImageFile` or from all of them; transparent parts are laid on white; of an animation the first
    frame is taken. Raises BadImage, with the reason, for files that are missing, empty, damaged, of an
    unknown kind, of several pages, of floating-point values without a range, or less than 8 pixels a side.
    """
    reading = PLAIN
    if isinstance(image, ImageFile):
        image, reading = image.data, image.reading
    if isinstance(image, Path):
        try:
            image = image.read_bytes()
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error
    if isinstance(image, bytes):
        jpeg = jpeg_header(image)
        if jpeg is None:
            pixels = _decode_other(image, reading)
        else:
            if jpeg.width * jpeg.height > MAX_PIXELS:
                raise BadImage(f"{jpeg.width}x{jpeg.height} pixels are more than memory should be given for")
            room = None if scratch is None else scratch.room(jpeg.width * jpeg.height * 3)
            pixels = _decode_jpeg(image, jpeg.orientation, room)
    else:
        pixels = image
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise BadImage(f"{pixels.shape[1]}x{pixels.shape[0]} pixels is less than {MIN_SIDE} on a side")
    return pixels


def to_canvas(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[Tensor, "3 h w"]:
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
    return torch.nn.functional.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


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


def _decode_other(data: bytes, reading: Decoding) -> UInt8[np.ndarray, "H W 3"]:
    image = open_image(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; damage to the pixels is an error
            check_pages(image, reading.first_page)
            if is_deep(image) and (reading.low is not None or image.mode == "F"):
                values = values_of(data)
                image.load()
                return turn(_scaled(values, reading), orientation_of(image))
            return _upright(image, reading)
    except DAMAGED as error:
        raise BadImage(reason(data, error)) from error


def pixels_of(image: Any, values: str | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Return RGB pixels of a path (text, too), the bytes of a file, a PIL image or an array, as `decode` has
    them.

    It may also be the image of a source's sample, whose data string says how it is read. `values` is the
    `range=` of a data string, for images of more than 8 bits. Without one, those that use half of 16 bits at
    most are taken with a warning. Raises DataError, with the reason, for what is none.
    """
    name = str(image) if isinstance(image, str | Path) else kind_of(image)
    if isinstance(image, ImageFile) and values is not None:
        raise DataError(f"range={values}: the data string of this image says how it is read")
    try:
        reading = PLAIN if values is None else Decoding(**Decoding.values(values))
    except ValueError as error:
        raise DataError(f"range={values}: expected {error}") from None
    try:
        if isinstance(image, ImageFile):
            return decode(image)
        if isinstance(image, str | Path):
            image = Path(image).expanduser().read_bytes()
        if isinstance(image, bytes):
            if reading == PLAIN and jpeg_header(image) is None and _is_dark_file(image):
                _warn_of_dark()
            return decode(ImageFile(image, reading))
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
            return decode(image)
        return decode(_of_pil(image, reading))
    except (AttributeError, KeyError, TypeError) as error:  # of PIL, for what is no array or not of an image
        raise DataError(f"{name} is no image: expected a path, bytes, PIL or uint8 [H, W, 3]") from error
    except BadImage as error:
        raise DataError(f"{name}: {error}") from error
    except DAMAGED as error:
        raise DataError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def _of_pil(image: Any, reading: Decoding) -> UInt8[np.ndarray, "H W 3"]:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    grey = image.mode.startswith("I") or image.mode == "F"
    if reading.low is not None and not grey and is_deep(image):
        raise BadImage("of 16-bit colour PIL keeps the upper bytes alone: give the file's path")
    if reading == PLAIN and grey and not states_range(image) and is_dark(np.asarray(image)):
        _warn_of_dark()
    return _upright(image, reading)


def _is_dark_file(data: bytes) -> bool:
    try:
        values = None if states_range(open_image(data)) else values_of(data)
    except (BadImage, *DAMAGED):  # `decode` says what it is
        return False
    return values is not None and is_dark(values)


def _warn_of_dark() -> None:
    warnings.warn(
        "an image of more than 8 bits uses half of 16 at most and becomes dark: give the range of its "
        'values, such as range="0-4095" (that of the data string of training), or range="container" if it is '
        "meant to be dark",
        stacklevel=4,
    )


def _upright(image: Image.Image, reading: Decoding) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of an image that PIL has opened. Raises as PIL does."""
    image.load()
    return turn(_to_rgb(image, reading), orientation_of(image))


def _scaled(values: np.ndarray | None, reading: Decoding) -> UInt8[np.ndarray, "H W 3"]:
    assert values is not None
    pixels = to_bytes(values[:, :, :3] if values.ndim == 3 else values, reading)
    if values.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    if values.shape[2] == 4:  # alpha has the whole of its 16 bits
        share = values[:, :, 3:] / np.float32(CONTAINER)
        return np.rint(pixels * share + 255 * (1 - share)).astype(np.uint8)
    return pixels


def _to_rgb(image: Image.Image, reading: Decoding) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip to 255 rather than scale
        return np.repeat(to_bytes(np.asarray(image), reading)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.array(Image.alpha_composite(white, image).convert("RGB"))
    return np.array(image.convert("RGB"))
