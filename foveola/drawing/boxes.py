"""Objects on an image: boxes with names, and masks, a colour for each name."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from foveola.drawing.plots import COLORS

DRAWN_SIDE = 320  # pixels of the longer side of what is drawn, at least
BLEND = 0.4  # of a mask's colour


@dataclass(frozen=True, eq=False)
class DrawnObjects:
    """Objects of an image: boxes (x0, y0, x1, y1) in its pixels, names, masks (None: it is a box)."""

    boxes: Float[np.ndarray, "K 4"]
    names: tuple[str, ...]
    masks: Sequence[Bool[np.ndarray, "_ _"] | None] | None = None
    texts: tuple[str, ...] = ()  # drawn in place of names
    apart: bool = False  # a colour for each object, rather than for each name


def color_of(name: str) -> tuple[int, int, int]:
    """Return the colour of a name: always the same."""
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    return _rgb(COLORS[number % len(COLORS)])


def _rgb(text: str) -> tuple[int, int, int]:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def paint_objects(pixels: UInt8[np.ndarray, "H W 3"], objects: DrawnObjects) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Return an image with its objects, small images a whole number of times as large; best ones on top."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = pixels.shape[:2]
    colors = [_rgb(COLORS[k % len(COLORS)]) for k in range(len(objects.names))]
    if not objects.apart:
        colors = [color_of(name) for name in objects.names]
    out = pixels.astype(np.float32)
    for mask, color in reversed(list(zip(objects.masks or (), colors, strict=False))):
        if mask is not None:
            out[mask] = (1 - BLEND) * out[mask] + BLEND * np.array(color)
    times = max(-(-DRAWN_SIDE // max(height, width)), 1)
    drawn = Image.fromarray(np.rint(out).astype(np.uint8)).resize((width * times, height * times), 0)
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(12)
    each = zip(objects.boxes, objects.texts or objects.names, colors, strict=True)
    for box, text, color in reversed(list(each)):
        x0, y0, x1, y1 = (box * times).tolist()
        pen.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=color, width=2)
        edges = pen.textbbox((x0 + 3, max(y0 - 14, 0)), text, font=font)
        pen.rectangle((edges[0] - 2, edges[1] - 1, edges[2] + 2, edges[3] + 1), fill=color)
        pen.text((x0 + 3, max(y0 - 14, 0)), text, fill="white", font=font)
    return np.asarray(drawn)
