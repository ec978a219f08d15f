"""`foveola check`: what the images of a data set are, in a table, as JSON, and on a page."""

import json
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

import foveola
from foveola import progress as bars
from foveola.data.formats import DAMAGED
from foveola.data.sample import DataError
from foveola.data.shown import shown_image
from foveola.data.sources import Source, as_source
from foveola.data.survey import Survey, survey
from foveola.drawing import html
from foveola.drawing.sheet import Row, Sheet, shrunk
from foveola.failures import explained
from foveola.files import check_writable, write_text

SHOWN, WIDE = 24, 6  # images of the page, and of a row
LISTED = 50  # lines of a list of names


def check_data(
    data: str | Source, out: str | Path | None = None, *, images: int = 512, progress: bool = True
) -> Survey:
    """Look at the images of a data set and say what they are, and what to do about it.

    Args:
        data: a data string, or a source.
        out: folder for check.json and check.html; None: nothing is written.
        images: how many are read and decoded, evenly spread.
        progress: whether to show how far it is.

    Returns sizes, formats, channels, depth and range of values, copies, images that look the same, damaged
    files, classes and objects, and advice. Raises UserError for data that cannot be opened.
    """
    source = as_source(data, "train", "data")
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        check_writable(folder, "give another out=")

    def show(items: Iterable[Any], total: int) -> Iterator[Any]:
        return bars.show(items, total, f"images of {source.name}", progress)

    found = survey(source, images, show)
    if folder is not None:
        with explained(f"{folder} cannot be written"):
            text = json.dumps(found.tree(), indent=1, allow_nan=False)
            write_text(folder / "check.json", text + "\n")
            write_text(folder / "check.html", data_page(found, source))
    return found


def data_page(found: Survey, source: Source) -> str:
    """Return a self-contained page about what was found, with examples of the images."""
    advice = html.items(found.advice) or html.paragraph("Nothing to do: the images are what they seem to be.")
    parts = [
        html.tag("h1", escape(f"Images of {found.name}")),
        html.section("advice", "What to do", advice),
        html.section("facts", "What was found", html.facts(found.rows())),
        html.section("images", "Some of them", html.sheet(_sheet(source))),
    ]
    for name, title, groups in (
        ("copies", "Copies, byte for byte", found.copies),
        ("alike", "Images that look the same", found.alike),
    ):
        if groups:
            parts.append(html.section(name, title, _list(", ".join(group) for group in groups)))
    if found.unreadable:
        lines = (f"{name}: {why}" for name, why in found.unreadable)
        parts.append(html.section("unreadable", "Images that cannot be read", _list(lines)))
    return html.page(f"Images of {found.name}", "\n".join(parts), f"foveola {foveola.__version__}")


def _list(lines: Iterable[str]) -> str:
    lines = list(lines)
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return html.items([*lines[:LISTED], *more])


def _sheet(source: Source) -> Sheet:
    """Images, evenly spread over the data set, those that can be read."""
    tiles, names = [], []
    for index in np.unique(np.linspace(0, len(source) - 1, SHOWN).astype(np.int64)).tolist():
        try:
            sample = source[index]
            pixels = shown_image(sample.image)
        except (DataError, *DAMAGED):
            continue
        tiles.append(shrunk(pixels, html.LARGEST_TILE))  # photos as a whole would fill the memory
        names.append(f"{sample.name} ({pixels.shape[1]} x {pixels.shape[0]})")
    rows = [Row("", tiles[i : i + WIDE], names[i : i + WIDE]) for i in range(0, len(tiles), WIDE)]
    return Sheet("Evenly spread over the data set", [""] * min(WIDE, len(tiles)), rows)
