"""Whether annotations fit the image that is decoded, and whether they turn with it.

EXIF turns an image when it is decoded. What was drawn on it may have been drawn on the pixels as they are
stored, or on the image the right way up; the size that an annotation states tells which, but for images
turned by 180 degrees, mirrored or square. There the rest of the data set decides (`raw`).
"""

import numpy as np
from jaxtyping import UInt8

from foveola.data.decoding import StoredFile
from foveola.data.formats import Header, turn
from foveola.data.readers import read_header
from foveola.data.sample import BadImage

Size = tuple[int, int]  # width, height


def views_of(size: Size, header: Header) -> tuple[bool, bool]:
    """Return whether an annotation of this size fits the pixels as stored, and the image the right way up.

    Exactly, or where it fits neither exactly, at another resolution: sides that are as one to the other, each
    rounded to whole pixels.
    """
    both = header.stored, header.upright
    exactly = tuple(size == image for image in both)
    return exactly if any(exactly) else tuple(_is_scaled(size, image) for image in both)  # type: ignore[return-value]


def _is_scaled(size: Size, image: Size) -> bool:
    (w, h), (width, height) = size, image
    return abs(w * height - h * width) <= max(w + h, width + height)


def turn_of(size: Size, header: Header, raw: bool, file: str) -> int:
    """Return the EXIF orientation by which an annotation of `size` is to be turned: that of the image, or 1.

    `raw`: where sizes do not tell, it was drawn on the pixels as they are stored. Raises BadImage for a size
    that fits the image in neither way.
    """
    stored, upright = views_of(size, header)
    if not stored and not upright:
        shown = "{}x{}".format(*header.upright)
        raise BadImage(f"{file}: is {shown} pixels, its annotation {size[0]}x{size[1]}")
    drawn_as_stored = stored and (raw or not upright)
    return header.orientation if drawn_as_stored else 1


def upright_map(
    labels: UInt8[np.ndarray, "H W"], image: StoredFile | bytes, raw: bool, file: str
) -> UInt8[np.ndarray, "h w"]:
    """Return a label map turned as its image is. One of another size stays as it is: whoever needs both
    compares.
    """
    try:
        header = read_header(image)
    except (OSError, BadImage):
        return labels  # whoever decodes it will say why
    size = labels.shape[1], labels.shape[0]
    if header.orientation == 1 or size not in (header.stored, header.upright):
        return labels
    return turn(labels, turn_of(size, header, raw, file))
