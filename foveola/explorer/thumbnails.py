"""Small JPEGs of images and objects, made when they are first asked for, and held in memory."""

from collections import OrderedDict
from io import BytesIO
from threading import Lock

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from foveola.data.shown import ShownAs, rgb_of, shown_channels
from foveola.data.sources import Source
from foveola.drawing.sheet import Pixels, shrunk
from foveola.explorer.questions import sample_at

THUMBNAIL, LARGE = 224, 1024  # pixels of the longer side
HELD_BYTES = 2**28  # of thumbnails in memory: about 30,000
MARGIN = 0.15  # of the longer side of an object's box, shown around it


class Thumbnails:
    """JPEGs by image and object, the latest ones in memory. Threads may share it."""

    def __init__(self, source: Source, held_bytes: int = HELD_BYTES) -> None:
        self.source, self.held_bytes, self.bytes = source, held_bytes, 0
        self.held: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self.lock = Lock()

    def get(self, image: int, number: int = -1) -> bytes:
        """Return an image, or the box of an object with a margin, as a JPEG of 224 pixels at most.

        Raises UserError for one that cannot be read, and an object that there is not.
        """
        with self.lock:
            if (image, number) in self.held:
                self.held.move_to_end((image, number))
                return self.held[image, number]
        made = jpeg(self._pixels(image, number), THUMBNAIL)
        with self.lock:
            if (image, number) not in self.held:
                self.bytes += len(made)
            self.held[image, number] = made
            while self.bytes > self.held_bytes and len(self.held) > 1:
                self.bytes -= len(self.held.popitem(last=False)[1])
        return made

    def _pixels(self, image: int, number: int) -> Pixels:
        """An image, or a part of it in the colours that the whole has."""
        sample, read = sample_at(self.source, image)
        pixels = rgb_of(read, shown_channels(self.source))
        if number < 0:
            return pixels
        if sample.objects is None or number >= len(sample.objects):
            raise LookupError(f"image {image} has no object {number}")
        height, width = pixels.shape[:2]
        x0, y0, x1, y1 = (sample.objects.boxes[number] * [width, height, width, height]).tolist()
        rim = MARGIN * max(x1 - x0, y1 - y0)
        left, top = max(int(x0 - rim), 0), max(int(y0 - rim), 0)
        return pixels[top : max(int(y1 + rim + 1), top + 1), left : max(int(x1 + rim + 1), left + 1)]


def jpeg(pixels: Shaped[np.ndarray, "H W C"], side: int, choice: ShownAs | None = None) -> bytes:
    """Return an image of any channels and depth as a JPEG whose longer side has `side` pixels at most."""
    out = BytesIO()
    image = shrunk(np.ascontiguousarray(rgb_of(pixels, choice)), side)
    Image.fromarray(image).save(out, "JPEG", quality=88, subsampling=0)
    return out.getvalue()


def png(pixels: Pixels) -> bytes:
    """Return an image as a PNG, every pixel as it is."""
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
