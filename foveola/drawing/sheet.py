"""Sheets of images: rows of tiles under column heads, with titles, captions, and frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from foveola import files

BAR = 40  # pixels of the height of a bar with its marks
GAP, LEFT, TILE = 8, 150, 112  # pixels: between tiles, widest row title, side of a tile
RIGHT, WRONG = "#1a9641", "#d7191c"
Pixels = UInt8[np.ndarray, "_ _ 3"]  # of any size each


@dataclass(frozen=True, eq=False)
class Row:
    """One line: a title, its tiles, and for each tile a caption and whether it is right (None: no frame)."""

    title: str
    tiles: Sequence[Pixels]
    captions: Sequence[str] = ()
    right: Sequence[bool | None] = ()


@dataclass(frozen=True, eq=False)
class Bar:
    """What colours mean: a strip [1, n, 3], and (fraction of the way along it, text) of its marks, rising."""

    colors: Pixels
    marks: Sequence[tuple[float, str]]


@dataclass(frozen=True, eq=False)
class Sheet:
    """Rows of tiles with a title, a head for each column, and a note below that says how to read it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    bar: Bar | None = None  # where colours are numbers

    def draw(self, tile: int = TILE) -> Pixels:
        """Return the sheet as pixels; tiles are scaled to fit squares of `tile` pixels, their shape kept."""
        return panel(self.title, self.columns, self.rows, tile, self.note, self.bar)


def shrunk(pixels: Pixels, side: int) -> Pixels:
    """Return an image whose longer side has `side` pixels at most, its shape kept."""
    scale = side / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def panel(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    tile: int = TILE,
    note: str = "",
    bar: Bar | None = None,
) -> Pixels:
    """Draw tiles in rows under column heads; green frames are right, red ones wrong."""
    large, small = ImageFont.load_default(16), ImageFont.load_default(12)
    titles = [_wrap(row.title, small, LEFT - 2 * GAP) for row in rows]
    left = GAP + max((_length(line, small) + 2 * GAP for lines in titles for line in lines), default=0)
    wide = max((len(row.tiles) for row in rows), default=1)
    width = left + max(wide, len(columns)) * (tile + GAP)
    width = max(width, 3 * TILE)
    heads = [_wrap(head, small, tile) for head in columns]
    top_lines, notes = _wrap(title, large, width - 2 * GAP), _wrap(note, small, width - 2 * GAP)
    top = GAP + 20 * len(top_lines) + GAP + 15 * max(map(len, heads), default=0) + 4
    tiles = [[_scaled(pixels, tile) for pixels in row.tiles] for row in rows]
    heights = [
        max((pixels.height for pixels in line), default=0) + (22 if any(row.captions) else GAP)
        for row, line in zip(rows, tiles, strict=True)
    ]
    below = top + sum(heights) + GAP
    end = below + 15 * len(notes) + GAP * bool(notes)
    image = Image.new("RGB", (width, end + (BAR if bar else 0)), "white")
    pen = ImageDraw.Draw(image)
    pen.multiline_text((GAP, GAP), "\n".join(top_lines), fill="black", font=large, spacing=4)
    for number, head in enumerate(heads):
        corner = (left + number * (tile + GAP), top - 4 - 15 * len(head))
        pen.multiline_text(corner, "\n".join(head), fill="#444", font=small, spacing=3)
    for row, line, lines, height in zip(rows, tiles, titles, heights, strict=True):
        middle = top + (max((pixels.height for pixels in line), default=0) - 15 * len(lines)) // 2
        pen.multiline_text((GAP, max(middle, top)), "\n".join(lines), fill="black", font=small, spacing=3)
        _draw_tiles(image, pen, row, line, (left, top, tile))
        top += height
    pen.multiline_text((GAP, top + GAP), "\n".join(notes), fill="#444", font=small, spacing=3)
    if bar is not None:
        _draw_bar(image, pen, bar, (GAP, end))
    return np.asarray(image)


def _draw_bar(image: Image.Image, pen: ImageDraw.ImageDraw, bar: Bar, corner: tuple[int, int]) -> None:
    small, width = ImageFont.load_default(12), min(3 * TILE - 4 * GAP, image.width - 4 * GAP)
    image.paste(Image.fromarray(bar.colors).resize((width, 12), Image.Resampling.BILINEAR), corner)
    for fraction, text in bar.marks:
        x, long = corner[0] + round(fraction * (width - 1)), _length(text, small)
        pen.line((x, corner[1] + 12, x, corner[1] + 15), fill="#444")
        pen.text((x - round(fraction * long), corner[1] + 17), text, fill="#444", font=small)


def _draw_tiles(
    image: Image.Image,
    pen: ImageDraw.ImageDraw,
    row: Row,
    tiles: list[Image.Image],
    corner: tuple[int, int, int],
) -> None:
    left, top, tile = corner
    small = ImageFont.load_default(12)
    for number, pixels in enumerate(tiles):
        x = left + number * (tile + GAP)
        image.paste(pixels, (x, top))
        right = row.right[number] if row.right else None
        if right is not None:
            frame = (x - 2, top - 2, x + pixels.width + 1, top + pixels.height + 1)
            pen.rectangle(frame, outline=RIGHT if right else WRONG, width=3)
        caption = row.captions[number] if row.captions else ""
        if caption:
            pen.text((x, top + pixels.height + 3), _cut(caption, small, tile), fill="#444", font=small)


def _scaled(pixels: Pixels, tile: int) -> Image.Image:
    scale = tile / max(pixels.shape[:2])
    size = tuple(max(round(side * scale), 1) for side in (pixels.shape[1], pixels.shape[0]))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def _length(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return -int(-font.getlength(text) // 1)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces; a longer word behind - / or _, or anywhere."""
    lines: list[str] = []
    for paragraph in text.split("\n") if text else ():
        line = ""
        for word in paragraph.split():
            while _length(word, font) > width and len(word) > 1:
                part = _fitting(word, font, width)
                lines += [line, word[:part]] if line else [word[:part]]
                line, word = "", word[part:]
            longer = f"{line} {word}".strip()
            if line and _length(longer, font) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def _fitting(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> int:
    """How many letters of a word go on a line; at least one."""
    fit = next((n for n in range(len(word) - 1, 1, -1) if _length(word[:n], font) <= width), 1)
    return max((n for n in range(1, fit + 1) if word[n - 1] in "-/_"), default=fit)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Text shortened to one line of `width` pixels."""
    if _length(text, font) <= width:
        return text
    while text and _length(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def save_png(pixels: Pixels, path: Path) -> Path:
    """Write a PNG."""
    with files.whole(path) as part:
        Image.fromarray(pixels).save(part, "PNG")
    return path
