"""The images of a report: what the trained encoder makes of the user's own, and what training drew."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import foveola
from foveola import distributed, files
from foveola.config import UserError
from foveola.data.decode import decode
from foveola.data.sample import BadImage
from foveola.data.shown import showing, shown_channels
from foveola.drawing import html
from foveola.drawing.sheet import Sheet
from foveola.evaluation.features.table import ExtractConfig
from foveola.figures.gallery import attention_sheet, pca_sheet
from foveola.figures.nearest import neighbour_sheet
from foveola.figures.positions import position_sheet
from foveola.models.encoder import Encoder
from foveola.reports import saved
from foveola.reports.changed import changed_sheet
from foveola.reports.progress import LIMIT, START, UNTRAINED, MeasuredRun
from foveola.reports.record import Record
from foveola.reports.request import Data, ReportConfig, choose_samples
from foveola.zoo.load import load

FOUND = 5  # neighbours of an image
ABOUT = {  # what to make of a sheet
    "pca": (
        "Patches of one colour are alike to the network: borders that follow things rather than the grid are "
        "a good sign."
    ),
    "attention": (
        "Of the last block. Alone it is no proof of anything: good encoders may read the background, too."
    ),
    "neighbours": "Same things should find each other.",
    "changed": "Better neighbours at the end are a gain, worse ones a loss.",
    "positions": "What the network learned of positions; neighbouring positions should be alike.",
}
FRAMES = "Green: the label of the query. Red: another one."
LEARNED = ("learned", "field")  # kinds of positions that training changes


def sheets(record: Record, data: Data, progress: MeasuredRun, config: ReportConfig) -> str:
    """Return HTML of the images of one run; those of its encoder are kept beside its results and used
    again.
    """
    return _encoder(record, data, progress, config) + _drawn(record)


def _encoder(record: Record, data: Data, progress: MeasuredRun, config: ReportConfig) -> str:
    if not config.images:
        return html.paragraph("No images were asked for (images=0).", "note")
    if data.test is None or data.train is None:
        return html.paragraph("There are no images to draw; data= says where some are.", "note")
    if not record.has_encoder:
        return html.paragraph("The run has no encoder yet.", "note")
    device = distributed.find_device(config.device)
    try:
        trained = load(record.folder, device)
    except UserError as error:
        return html.paragraph(f"No images of the encoder: {error}", "note")
    rows = _rows(progress, config)
    about = {
        "foveola": foveola.__version__,
        "data": [saved.identity(data.train), saved.identity(data.test)],
        "images": config.images,
        "rows": rows,
        "shown": repr(shown_channels(data.test)),
    }
    before = f"{UNTRAINED}:{record.folder}" if record.start is None else str(record.start)
    if record.start is not None:
        about["before"] = load(before, device).fingerprint()
    path = saved.home(record.folder) / trained.fingerprint() / f"images-{saved.key_of(about)}.html"
    text = saved.read(path)
    if text is None:
        both = {progress.baseline: load(before, device), "trained": trained}
        with showing(shown_channels(data.test)):
            drawn = list(_each(both, data, rows, config.images))
        text = "".join(html for html, _ in drawn)
        if all(whole for _, whole in drawn):
            files.write_text(path, text)
    return html.tag("div", text, "sheets")


def _rows(progress: MeasuredRun, config: ReportConfig) -> dict[str, Any]:
    """Which rows k-NN reads, and so the neighbours: images or objects."""
    known = ExtractConfig.__dataclass_fields__
    settings = {k: v for k, v in progress.settings.get("knn", {}).items() if k in known}
    return {"limit": config.limit or LIMIT} | settings


def _each(
    both: dict[str, Encoder], data: Data, rows: dict[str, Any], count: int
) -> Iterator[tuple[str, bool]]:
    """Each sheet as HTML and True, or a line that says why it could not be drawn, and False."""
    assert data.train is not None
    assert data.test is not None
    chosen = choose_samples(data.test, count)
    samples, names = [sample for _, sample in chosen], [sample.name for _, sample in chosen]
    if not samples:
        yield html.paragraph(f"None of the images of {data.test.name} can be read.", "note"), False
        return
    trained, indices = both["trained"], [index for index, _ in chosen]
    settings = ExtractConfig(**rows)
    reference, queries = data.train, data.test
    drawers = {
        "pca": lambda: pca_sheet(both, samples),
        "attention": lambda: attention_sheet(trained, samples),
        "neighbours": lambda: neighbour_sheet(
            trained, reference, queries, indices, FOUND, masks=settings.rows == "objects", config=settings
        ),
        "changed": lambda: changed_sheet(both[START], trained, reference, queries, count, settings),
        "positions": lambda: position_sheet(both),
    }
    if START not in both:
        del drawers["changed"]
    if trained.config.model.positions not in LEARNED:
        del drawers["positions"]
    for kind, drawer in drawers.items():
        try:
            yield html.sheet(_with_note(drawer(), ABOUT[kind]), names, kind), True
        except UserError as error:
            yield html.paragraph(f"{kind} could not be drawn: {error}", "note"), False


def _with_note(sheet: Sheet, about: str) -> Sheet:
    framed = any(right is not None for row in sheet.rows for right in row.right)
    words = (sheet.note, FRAMES if framed else "", about)
    return dataclasses.replace(sheet, note=" ".join(filter(None, words)))


def _drawn(record: Record) -> str:
    """The newest image of each kind that training drew."""
    figures, notes = [], []
    for name, path in record.figures().items():
        caption = f"{name.replace('_', ' ')} at step {int(path.stem.rpartition('-')[2]):,}"
        try:
            pixels = decode(path.read_bytes())
        except (OSError, BadImage) as error:
            notes.append(f"{path.name} cannot be read: {error}")
            continue
        image = html.image(pixels, f"{caption}, drawn in training")
        figures.append(
            html.tag(
                "figure", html.tag("figcaption", html.escape(caption)) + html.scroll(image, caption), "drawn"
            )
        )
    if not figures and not notes:
        return ""
    drawings = html.tag("div", "".join(figures), "drawings") if figures else ""
    return html.tag("h3", "Drawn while training") + drawings + html.items(notes, "note")
