"""The contact sheet: some images with what was found in them, and numbers of all, for a person to judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

import foveola
from foveola import files
from foveola.data.instances import AGNOSTIC
from foveola.data.sample import BadImage, Objects, full_mask
from foveola.data.shown import shown_image
from foveola.data.sources import with_objects
from foveola.drawing import html
from foveola.drawing.boxes import DRAWN_SIDE, DrawnObjects, paint_objects
from foveola.drawing.plots import Chart, Line
from foveola.drawing.sheet import Row, Sheet, save_png
from foveola.proposals.written import Summary
from foveola.trees import flat, shown

COLUMNS, TILE = 6, 200  # of images; pixels
BINS = 20  # of the charts


def save_sheets(
    source: Any, file: Path, summary: Summary, count: int, work: dict[str, Any]
) -> tuple[Path, Path]:
    """Write `count` images of a source with the objects of `file` beside it, as PNG and as one web page.

    Images are spread evenly over the data, so that the same data show the same ones. `work` is what
    `read_about` gives.
    """
    found = with_objects(source, file)
    classes = None if work["classes"] == list(AGNOSTIC) else found.classes
    tiles, captions = [], []
    for index in np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)).tolist():
        try:
            sample = found[index]
            tiles.append(_tile(shown_image(sample.image), sample.objects, classes))
        except (BadImage, OSError):
            continue
        captions.append(f"{_count(sample.objects)}: {sample.name}")
    rows = [Row("", tiles[k : k + COLUMNS], captions[k : k + COLUMNS]) for k in range(0, len(tiles), COLUMNS)]
    facts = numbers_of(summary)
    note = ". ".join(f"{name}: {value}" for name, value in facts)
    drawn = Sheet(f"Objects found in {source.name}", (), rows, note)
    title = (
        f"{len(tiles)} of {len(found):,}, spread evenly over the data; before each name the number of objects"
    )
    page = _page(Sheet(title, (), rows), facts, summary, work)
    return (
        save_png(drawn.draw(TILE), file.with_suffix(".png")),
        files.write_text(file.with_suffix(".html"), page),
    )


def numbers_of(summary: Summary) -> list[tuple[str, str]]:
    """Return the numbers of a summary, in words."""
    images, found, without = len(summary.counts), sum(summary.counts), summary.counts.count(0)
    facts = [
        ("Images", f"{images:,}"),
        ("Objects", f"{found:,}, {found / max(images, 1):.2f} in each image"),
        ("Images without any", f"{without:,} ({100 * without / max(images, 1):.1f} %)"),
    ]
    if summary.areas:
        low, middle, high = (
            f"{100 * fraction:.1f} %" for fraction in np.percentile(summary.areas, (25, 50, 75))
        )
        facts.append(("An object covers", f"{middle} of its image; half of them {low} to {high}"))
    if summary.unreadable:
        facts.append(("Unreadable images", f"{len(summary.unreadable):,}"))
    return facts


def _page(drawn: Sheet, facts: list[tuple[str, str]], summary: Summary, work: dict[str, Any]) -> str:
    made = [(name, value if isinstance(value, str) else shown(value)) for name, value in flat(work).items()]
    unreadable = [f"{name}: {reason}" for name, reason in summary.unreadable]
    parts = [
        html.section("numbers", "Numbers", html.facts(facts), html.charts(_charts(summary), "masks")),
        html.section("images", "Images", html.sheet(drawn, kind="large")),
        html.section("work", "How they were found", html.facts(made)),
    ]
    if unreadable:
        parts.append(html.section("unreadable", "Unreadable images", html.items(unreadable)))
    top = html.tag("h1", "Objects that were found") + html.paragraph(work["data"], "sub")
    body = html.tag("header", top) + html.tag("main", "\n".join(parts))
    return html.page("Objects that were found", body, f"foveola {foveola.__version__}")


def _charts(summary: Summary) -> list[Chart]:
    largest = max(summary.counts, default=0)
    counts = np.bincount(summary.counts, minlength=largest + 1)
    charts = [_chart("Objects of an image", range(largest + 1), counts, "objects", "images")]
    for title, values, x in (
        ("Size of objects", summary.areas, "fraction of the image"),
        ("Scores", summary.scores, "score"),
    ):
        if values:
            span = (0.0, 1.0) if min(values) >= 0 and max(values) <= 1 else None
            heights, edges = np.histogram(values, BINS, span)
            charts.append(_chart(title, ((edges[1:] + edges[:-1]) / 2).tolist(), heights, x, "objects"))
    return charts


def _chart(title: str, x: Sequence[float], heights: np.ndarray, x_name: str, y_name: str) -> Chart:
    return Chart(title, [Line(y_name, list(x), heights.tolist(), marker="o")], x_name, y_name)


def _count(objects: Objects | None) -> str:
    return "none" if objects is None else f"{len(objects)}"


def _tile(
    pixels: UInt8[np.ndarray, "H W 3"], objects: Objects | None, classes: tuple[str, ...] | None
) -> UInt8[np.ndarray, "_ _ 3"]:
    """An image with its objects, each with its index among them, its class if it has one, and its score."""
    scale = min(DRAWN_SIDE / max(pixels.shape[:2]), 1.0)
    height, width = (max(round(side * scale), 1) for side in pixels.shape[:2])
    small = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    if objects is None:
        return small
    rows = np.arange(height) * pixels.shape[0] // height
    columns = np.arange(width) * pixels.shape[1] // width
    masks = [
        None if mask is None else _fitted(full_mask(mask), pixels)[rows][:, columns]
        for mask in objects.masks or ()
    ]
    texts = []
    for k in range(len(objects)):
        label = -1 if objects.labels is None else int(objects.labels[k])
        name = classes[label] if classes and label >= 0 else f"{k + 1}"
        texts.append(name + ("" if objects.scores is None else f" {objects.scores[k]:.2f}"))
    boxes = objects.boxes.astype(np.float64) * (width, height, width, height)
    drawn = DrawnObjects(boxes, tuple(texts), masks or None, apart=True)
    return paint_objects(small, drawn)


def _fitted(mask: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """A mask at the size of its image, of whose shape it is."""
    height, width = pixels.shape[:2]
    if mask.shape == (height, width):
        return mask
    rows, columns = np.arange(height) * mask.shape[0] // height, np.arange(width) * mask.shape[1] // width
    return mask[rows][:, columns]
