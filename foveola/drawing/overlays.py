"""Maps and masks laid over images."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from foveola.drawing.sheet import Bar

BORDER = 160  # a border has one pixel for so many of an image
DARK, BRIGHT = 0.25, 16.0  # multiples of uniform attention at both ends of the scale of `heat`
HEAD_COLORS = ((230, 75, 60), (70, 140, 235), (60, 180, 90), (250, 190, 40), (170, 90, 210), (60, 200, 210))


def heat(pixels: UInt8[np.ndarray, "H W 3"], weights: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image in gray with `weights` as warm light over it, on a scale that is the same for all
    images.

    See `brightness`: equal weights give an even, weak light.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    strength = brightness(weights)
    plane = Image.fromarray(strength.astype(np.float32)).resize((width, height), Image.Resampling.NEAREST)
    fraction = np.asarray(plane)[:, :, None]
    warm = np.stack([np.ones_like(fraction), 0.85 * fraction**1.5, 0.1 * fraction**3], axis=2)[..., 0]
    gray = pixels.mean(axis=2, keepdims=True) / 255 * 0.55
    return np.rint(255 * (gray * (1 - 0.8 * fraction) + 0.8 * fraction * warm)).clip(0, 255).astype(np.uint8)


def brightness(weights: Float[np.ndarray, "*S"]) -> Float[np.ndarray, "*S"]:
    """Return the attention in [0, 1] by its multiple of uniform attention, which is the mean of what is read
    at all.

    0 up to DARK times uniform, 1 from BRIGHT times on, by the logarithm between; uniform itself is 1/3.
    """
    read = weights[weights > 0]
    if not read.size:
        return np.zeros_like(weights)
    times = np.maximum(weights / read.mean(), 1e-12)
    return (np.log(times / DARK) / np.log(BRIGHT / DARK)).clip(0, 1)


def heat_bar() -> Bar:
    """Return the colours of `heat`, with multiples of uniform attention."""
    fraction = np.linspace(0, 1, 121)[None, :, None]
    warm = np.concatenate((np.ones_like(fraction), 0.85 * fraction**1.5, 0.1 * fraction**3), axis=2)
    colors = 255 * (0.275 * (1 - 0.8 * fraction) + 0.8 * fraction * warm)
    marks = ((0.0, f"{DARK:g}x"), (1 / 3, "1x: uniform"), (2 / 3, "4x"), (1.0, f"{BRIGHT:g}x"))
    return Bar(np.rint(colors).clip(0, 255).astype(np.uint8), marks)


def cosine_bar() -> Bar:
    """Return the colours of `cool_to_warm` from the lowest cosine of a tile to 1."""
    return Bar(
        cool_to_warm(np.linspace(0, 1, 121)[None], 0.0, 1.0), ((0.0, "lowest of the tile"), (1.0, "1"))
    )


def outline(
    pixels: UInt8[np.ndarray, "H W 3"],
    mask: Bool[np.ndarray, "h w"],
    color: tuple[int, int, int] = (255, 220, 0),
) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image with everything outside `mask` darkened and the border of the mask drawn, inside it."""
    height, width = pixels.shape[:2]
    rows, columns = np.arange(height) * mask.shape[0] // height, np.arange(width) * mask.shape[1] // width
    full = mask[rows][:, columns]
    out = np.where(full[:, :, None], pixels, pixels * 0.45).astype(np.uint8)
    inner = full
    for _ in range(max(max(pixels.shape) // BORDER, 1)):
        inner = _eroded(inner)
    out[full & ~inner] = color
    return out


def _eroded(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """A mask without the pixels that touch, by a side, one outside it or the border of the image."""
    wide = np.pad(mask, 1)
    return mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def box_outlines(
    pixels: UInt8[np.ndarray, "H W 3"], boxes: Sequence[tuple[Float[np.ndarray, "4"], tuple[int, int, int]]]
) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image with boxes (x0, y0, x1, y1) of the unit square, each in its colour, but for empty
    ones.
    """
    from PIL import Image, ImageDraw

    image = Image.fromarray(pixels)
    pen, (height, width) = ImageDraw.Draw(image), pixels.shape[:2]
    thick = max(2 * max(pixels.shape) // BORDER, 2)
    for (x0, y0, x1, y1), color in boxes:
        if x1 > x0 and y1 > y0:
            corners = (x0 * width, y0 * height, x1 * width - 1, y1 * height - 1)
            pen.rectangle(corners, outline=color, width=thick)
    return np.asarray(image)


def lit(
    pixels: UInt8[np.ndarray, "H W 3"], fractions: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image as bright as a map of values in [0, 1] says: dark at 0, as it is at 1."""
    level = magnify(np.rint(255 * fractions).astype(np.uint8), *pixels.shape[:2])[:, :, None] / 255
    return np.rint(pixels * (0.15 + 0.85 * level)).astype(np.uint8)


def magnify(
    plane: UInt8[np.ndarray, "h w *C"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} *C"]:
    """Return nearest interpolation: every patch stays one square of one colour."""
    rows, columns = np.arange(height) * plane.shape[0] // height, np.arange(width) * plane.shape[1] // width
    return plane[rows][:, columns]


def paint_heads(
    pixels: UInt8[np.ndarray, "H W 3"],
    weights: Float[np.ndarray, "heads h w"],
    selected: Bool[np.ndarray, "heads h w"],
) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image in gray with a colour for each head over the patches that this head keeps (iBOT's
    figures).

    A patch kept by several heads has the colour of the one with the largest fraction of its own attention
    there. Six colours go round.
    """
    fractions = weights / np.maximum(weights.sum(axis=(1, 2), keepdims=True), 1e-12)
    winner = np.where(selected, fractions, -1.0).argmax(axis=0)
    height, width = pixels.shape[:2]
    palette = np.array(HEAD_COLORS, dtype=np.uint8)[winner % len(HEAD_COLORS)]
    color = magnify(palette, height, width)
    any_head = magnify(np.asarray(selected.any(axis=0), dtype=np.uint8), height, width)[:, :, None]
    gray = pixels.mean(axis=2, keepdims=True)
    mixed = np.where(any_head, 0.35 * gray + 0.65 * color * (0.4 + 0.6 * gray / 255), 0.4 * gray)
    return np.rint(np.broadcast_to(mixed, pixels.shape)).clip(0, 255).astype(np.uint8)


def cool_to_warm(
    values: Float[np.ndarray, "h w"], low: float = -1.0, high: float = 1.0
) -> UInt8[np.ndarray, "h w 3"]:
    """Return values as matplotlib's coolwarm: blue at `low`, gray between, red at `high`."""
    import matplotlib

    fraction = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    return np.rint(255 * matplotlib.colormaps["coolwarm"](fraction)[:, :, :3]).astype(np.uint8)


def mark(
    pixels: UInt8[np.ndarray, "H W 3"],
    point: tuple[float, float],
    color: tuple[int, int, int] = (255, 30, 30),
) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image with a dot at (x, y) of the unit square, with a white rim."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(pixels)
    radius = max(max(pixels.shape[:2]) / 45, 2)
    x, y = point[0] * pixels.shape[1], point[1] * pixels.shape[0]
    pen = ImageDraw.Draw(image)
    for extra, fill in ((radius * 0.4, (255, 255, 255)), (0.0, color)):
        r = radius + extra
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    return np.asarray(image)


def link(
    left: UInt8[np.ndarray, "H W 3"],
    right: UInt8[np.ndarray, "H2 W2 3"],
    starts: Float[np.ndarray, "n 2"],
    ends: Float[np.ndarray, "n 2"],
) -> UInt8[np.ndarray, "H3 W3 3"]:
    """Return two images side by side with a line from each start, (x, y) of the left unit square, to
    its end.
    """
    import matplotlib
    from PIL import Image, ImageDraw

    gap = max(left.shape[1] // 20, 4)
    size = (left.shape[1] + gap + right.shape[1], max(left.shape[0], right.shape[0]))
    image = Image.new("RGB", size, "white")
    image.paste(Image.fromarray(left), (0, 0))
    image.paste(Image.fromarray(right), (left.shape[1] + gap, 0))
    pen = ImageDraw.Draw(image)
    width = max(round(size[1] / 110), 1)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        shade = matplotlib.colormaps["turbo"]((number + 0.5) / len(starts))
        color = tuple(round(255 * part) for part in shade[:3])
        a = (start[0] * left.shape[1], start[1] * left.shape[0])
        b = (left.shape[1] + gap + end[0] * right.shape[1], end[1] * right.shape[0])
        pen.line((*a, *b), fill=color, width=width)
        for x, y in (a, b):
            pen.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill=color)
    return np.asarray(image)
