"""Values of images of more than 8 bits, and how a range of them becomes 8 bits."""

import sys
from typing import Any

import numpy as np
from PIL import Image

from foveola.data.formats import open_image
from foveola.data.sample import BadImage, Decoding

CONTAINER = 65535  # the largest value of 16 bits
BYTE_ORDERS = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}


def is_deep(image: Image.Image) -> bool:
    """Return whether an image, its pixels not yet loaded, has more than 8 bits a channel."""
    return (
        image.mode.startswith("I")
        or image.mode == "F"
        or any(_raw(t)[-4:] in BYTE_ORDERS for t in _tiles(image))
    )


def values_of(data: bytes) -> np.ndarray | None:
    """Return the values of a file as they are stored, [H, W] or [H, W, channels]; None for 8 bits a channel.

    PIL has no colour of 16 bits: it keeps the upper bytes. The lower ones are those that it keeps when told
    that the bytes of a value come in the other order. Raises BadImage, and what PIL raises.
    """
    image = open_image(data)
    if not is_deep(image):
        return None
    tiles = _tiles(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if tiles and tiles[0].codec_name == "ppm":  # PIL scales from the range that the file states
            return np.rint(values * (float(_arguments(tiles[0])[-1]) / CONTAINER)).astype(np.int32)
        return values
    names = [_raw(tile) for tile in tiles]
    if any(name[:-4] != image.mode or name[-4:] not in BYTE_ORDERS for name in names):
        raise BadImage("16-bit colour that is stored in a way of which no range can be taken")
    upper = np.asarray(image).astype(np.uint16)
    twin = open_image(data)
    changed = [
        tile._replace(args=_with(tile.args, name[:-4] + BYTE_ORDERS[name[-4:]]))
        for tile, name in zip(_tiles(twin), names, strict=True)
    ]
    twin.tile = changed  # type: ignore[attr-defined]
    return upper << 8 | np.asarray(twin)


def states_range(image: Image.Image) -> bool:
    """Return whether a file, its pixels not yet loaded, says which value is white (PGM), and it is not 16
    bits'.
    """
    return any(t.codec_name == "ppm" and float(_arguments(t)[-1]) < CONTAINER for t in _tiles(image))


def is_dark(values: np.ndarray) -> bool:
    """Return whether whole numbers, taken to fill 16 bits, use no more than half of them."""
    return bool(values.dtype.kind != "f" and values.size and values.max() <= CONTAINER // 2)


def to_bytes(values: np.ndarray, reading: Decoding) -> np.ndarray:
    """Return uint8: the range's low end becomes 0, its high end 255; beyond, it is cut off. Raises
    BadImage.
    """
    if reading.low is not None and reading.high is not None:
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise BadImage("floating-point values that are not finite")
        scaled = (values.astype(np.float64) - reading.low) * (255 / (reading.high - reading.low))
        return np.rint(scaled.clip(0, 255)).astype(np.uint8)
    if values.dtype.kind == "f":
        raise BadImage("floating-point values have no known range; give one, such as range=0-1")
    levels = values.astype(np.int64)
    if levels.min(initial=0) < 0 or levels.max(initial=0) > CONTAINER:
        raise BadImage("values beyond 16 bits; give their range, such as range=0-100000")
    return ((levels + 128) // 257).astype(np.uint8)


def _tiles(image: Image.Image) -> list:
    """The parts of a file that PIL will read, and how."""
    return list(getattr(image, "tile", []))


def _arguments(tile: Any) -> tuple:
    return tile.args if isinstance(tile.args, tuple) else (tile.args,)


def _raw(tile: Any) -> str:
    """How PIL is told to unpack a tile, such as RGB;16B."""
    return str(_arguments(tile)[0])


def _with(arguments: Any, raw: str) -> Any:
    return (raw, *arguments[1:]) if isinstance(arguments, tuple) else raw
