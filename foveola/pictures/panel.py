"""A picture that shows what objects became: both crops with the mask, attention, and nearest neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

TILE, GAP, LEFT, TOP = 112, 8, 150, 64
Picture = UInt8[np.ndarray, "_ _ 3"]  # of any size each


@dataclass(frozen=True, eq=False)
class Row:
    """One line: a title, its tiles, and for each tile a caption and whether it is right (None: no frame)."""

    title: str
    tiles: Sequence[Picture]
    captions: Sequence[str]
    right: Sequence[bool | None]


def panel(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Picture:
    """Tiles in rows under column heads; green frames are right, red ones wrong."""
    width = LEFT + len(columns) * (TILE + GAP) + GAP
    height = TOP + len(rows) * (TILE + 22) + GAP
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(16), ImageFont.load_default(12)
    pen.text((GAP, GAP), title, fill="black", font=large)
    for number, head in enumerate(columns):
        pen.text((LEFT + number * (TILE + GAP), TOP - 20), head, fill="#444", font=small)
    for line, row in enumerate(rows):
        top = TOP + line * (TILE + 22)
        pen.multiline_text((GAP, top + TILE // 3), row.title, fill="black", font=small)
        for number, (tile, caption, right) in enumerate(zip(row.tiles, row.captions, row.right, strict=True)):
            left = LEFT + number * (TILE + GAP)
            image.paste(Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.BICUBIC), (left, top))
            if right is not None:
                frame = (left - 2, top - 2, left + TILE + 1, top + TILE + 1)
                pen.rectangle(frame, outline="#1a9641" if right else "#d7191c", width=3)
            pen.text((left, top + TILE + 3), caption, fill="#444", font=small)
    return np.asarray(image)


def save(picture: Picture, path: Path) -> Path:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, optimize=True)
    return path
