"""Values of files that PIL reads, of more than 8 bits too: it has no colour of 16 bits."""

import warnings
from typing import Any

import numpy as np
from PIL import Image

from foveola.data.decoding import Decoding
from foveola.data.formats import (
    ALPHA,
    BYTE_ORDERS,
    bits_of,
    channel_names,
    gives_all_bits,
    is_single,
    open_image,
    orientation_of,
    page_indices,
    raw_mode,
    turn,
)
from foveola.data.sample import BadImage
from foveola.data.values import CONTAINER, Values


def pil_values(data: bytes, reading: Decoding) -> Values:
    """Return what a file that PIL reads holds, of the part and pages that are meant.

    Raises BadImage, and what PIL raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata; damage to the pixels is an error
        image = open_image(data)
        numbers = page_indices(image, reading.page)
        pages = [_page(data, number) for number in numbers]
        orientation = 1 if image.format == "TIFF" else orientation_of(image)  # which PIL turns
    first = pages[0]
    if any(each.array.shape[:2] != first.array.shape[:2] for each in pages):
        raise BadImage("pages of several sizes, which cannot be channels of one image")
    array = first.array if len(pages) == 1 else np.concatenate([each.array for each in pages], axis=2)
    array = turn(array, orientation)
    if reading.window is not None:
        x0, y0, x1, y1 = reading.window
        array = array[y0:y1, x0:x1]
    return Values(array, first.low, first.high, first.names if len(pages) == 1 else ())


def _page(data: bytes, number: int) -> Values:
    image = open_image(data)
    if number:
        image.seek(number)
    if bits_of(image) > 8 and not is_single(image):
        return Values(_colours(image, data, number), names=channel_names(image))
    return opened_values(image)


def opened_values(image: Image.Image) -> Values:
    """Return what an image holds that PIL has opened, but for colours of 16 bits. Raises as PIL does."""
    names = channel_names(image)
    if not is_single(image):
        array = np.array(image.convert("".join(names).replace(ALPHA, "A")))
        return Values(array.reshape(*array.shape[:2], len(names)), names=names)
    tiles = list(getattr(image, "tile", ()))
    values = np.asarray(image)[:, :, None]
    if tiles and tiles[0].codec_name == "ppm":  # PIL scales from the range that the file states
        high = float(tiles[0].args[-1] if isinstance(tiles[0].args, tuple) else tiles[0].args)
        values = np.rint(values * (high / CONTAINER)).astype(np.int32)
        return Values(values, None if high == CONTAINER else 0.0, None if high == CONTAINER else high)
    return Values(values)


def _colours(image: Image.Image, data: bytes, number: int) -> np.ndarray:
    """Colours of 16 bits. PIL keeps the upper bytes; the lower ones are those that it keeps when told that
    the bytes of a value come in the other order.
    """
    if not gives_all_bits(image):
        raise BadImage("16-bit colour that is stored in a way of which no range can be taken")
    raw = [raw_mode(tile) for tile in getattr(image, "tile", ())]
    upper = np.asarray(image).astype(np.uint16)
    twin = open_image(data)
    if number:
        twin.seek(number)
    twin.tile = [  # type: ignore[attr-defined]
        tile._replace(args=_with(tile.args, name[:-4] + BYTE_ORDERS[name[-4:]]))
        for tile, name in zip(twin.tile, raw, strict=True)  # type: ignore[attr-defined]
    ]
    array = upper << 8 | np.asarray(twin)
    return array.reshape(*array.shape[:2], -1)


def _with(arguments: Any, raw: str) -> Any:
    return (raw, *arguments[1:]) if isinstance(arguments, tuple) else raw
