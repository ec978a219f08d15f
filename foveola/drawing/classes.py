"""Classes of pixels as colours over an image."""

import colorsys

import numpy as np
from jaxtyping import UInt8


def palette(count: int) -> UInt8[np.ndarray, "{count} 3"]:
    """Return colours that are far apart: hues by the golden ratio, in three degrees of light."""
    hues = [(i * 0.61803398875) % 1 for i in range(count)]
    made = [colorsys.hsv_to_rgb(hue, 0.75, (1.0, 0.8, 0.6)[i % 3]) for i, hue in enumerate(hues)]
    return np.rint(255 * np.array(made).reshape(count, 3)).astype(np.uint8)


def paint_classes(
    pixels: UInt8[np.ndarray, "H W 3"], classes: UInt8[np.ndarray, "H W"], colors: UInt8[np.ndarray, "C 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Return the classes of pixels as colours, over the brightness of the image; others than C are black."""
    table = np.zeros((256, 3), np.float32)
    table[: len(colors)] = colors
    light = pixels.mean(axis=2, keepdims=True) / 255
    return np.rint(table[classes] * (0.55 + 0.45 * light)).astype(np.uint8)
