"""What heads of fine-tuned encoders predict: numbers on the way, mistakes, the worst and best images."""

from collections.abc import Sequence
from typing import Any

from foveola import distributed
from foveola.config import UserError
from foveola.data.sources import Source, open_source
from foveola.drawing import html
from foveola.drawing.plots import Chart, Line
from foveola.evaluation.result import Result
from foveola.evaluation.stored import results_of
from foveola.figures.answers import answers_sheet
from foveola.figures.choice import image_numbers
from foveola.files import RunFolder
from foveola.reports.findings import Findings
from foveola.reports.record import Record
from foveola.reports.request import ReportConfig
from foveola.zoo.load import load

SEARCHED_FOR_ANSWERS = 200  # images among which the worst and the best are looked for


def is_task(record: Record) -> bool:
    """Return whether a run has fine-tuned an encoder with a head."""
    return RunFolder(record.folder).encoder.head_config.is_file()


def answers_section(found: Sequence[Findings], config: ReportConfig) -> str:
    """Return the sections about the heads of runs; none where no run has a head."""
    parts = []
    for each in found:
        if not is_task(each.record):
            continue
        name = html.tag("h3", html.escape(each.record.name)) if len(found) > 1 else ""
        found_in = _newest(each.record)
        told = _numbers(each.record) + _mistakes(found_in) + _curves(found_in) + _classes(found_in)
        parts.append(name + told + _images(each, config))
    return "".join(parts)


def _numbers(record: Record) -> str:
    """What was measured on test data while it trained: at first, at best, at the end."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in record.lines:
        for name, value in line.items():
            metric = name.removeprefix("test/")
            if metric != name and value is not None and not metric.endswith(("_low", "_high")):
                found.setdefault(metric, []).append((int(line["step"] or 0), value))
    rows = []
    for metric, values in found.items():
        first, last, best = values[0], values[-1], max(values, key=lambda pair: pair[1])
        cells = [f"{value:.2f} (step {step:,})" for step, value in (first, best, last)]
        rows.append([html.escape(metric), *cells])
    if not rows:
        return html.paragraph("Nothing was measured while it trained; finetune test= does that.", "note")
    test = html.paragraph(f"On {record.get('evaluations.test.test')}, by the head of each step.", "note")
    return html.table(["", "first", "highest", "last"], rows) + test


def _newest(record: Record) -> dict[str, Result]:
    """The newest result of each protocol in the folder of a run."""
    found: dict[str, Result] = {}
    for each in results_of(record.folder)[0]:
        found.setdefault(each.result.protocol, each.result)
    return found


def _mistakes(results: dict[str, Result]) -> str:
    """The most frequent confusions of a classifier."""
    result = results.get("classify")
    confusions: list[Any] = [] if result is None else result.data.get("test", {}).get("confusions", [])
    if not confusions:
        return ""
    rows = [[html.escape(right), html.escape(said), str(count)] for right, said, count in confusions[:10]]
    return html.tag("h3", "Most frequent mistakes") + html.table(["class", "said", "images"], rows)


def _curves(results: dict[str, Result]) -> str:
    """The precision of a detector at each recall."""
    if "detect" not in results:
        return ""
    drawn = []
    for kind, curves in results["detect"].grid.get("precision", {}).items():
        lines = [
            Line(level, [step / (len(values) - 1) for step in range(len(values))], values)
            for level, values in curves.items()
        ]
        drawn.append(Chart(f"Precision of {kind}, mean over classes", lines, "recall", "precision"))
    note = "Of all sizes. A line that falls to 0 early says that many objects are not found at any score."
    return html.charts(drawn, "precision") + html.paragraph(note, "note") if drawn else ""


def _classes(results: dict[str, Result]) -> str:
    """How well each class is segmented, the worst first."""
    if "segment" not in results:
        return ""
    numbers = results["segment"].data.get("class_iou", {})
    found = [(value, name) for name, value in numbers.items() if value is not None]
    rows = [[html.escape(name), f"{value:.2f}"] for value, name in sorted(found)]
    return html.tag("h3", "Classes, the worst first") + html.table(["class", "IoU, %"], rows) if rows else ""


def _images(each: Findings, config: ReportConfig) -> str:
    if not config.images:
        return ""
    try:
        source = _source(each, config)
        if source is None:
            return html.paragraph("No images are known on which answers could be shown; give test=.", "note")
        encoder = load(each.record.folder, distributed.find_device(config.device))
        chosen = image_numbers(source, SEARCHED_FOR_ANSWERS)
        return html.sheet(answers_sheet(encoder, source, chosen, config.images, config.images), (), "answers")
    except UserError as error:
        return html.paragraph(f"Answers could not be drawn: {error}", "note")


def _source(each: Findings, config: ReportConfig) -> Source | None:
    """The images asked for, or else those on which the run was measured, or else the test images of its
    data.
    """
    asked = config.test or config.data or each.record.get("evaluations.test.test")
    return open_source(str(asked), "test") if asked else each.data.test
