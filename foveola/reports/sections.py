"""The parts of a report, each from what was found out about one or several runs."""

import shlex
from collections.abc import Sequence
from statistics import fmean

from foveola.config import UserError
from foveola.drawing import html
from foveola.files import RunFolder
from foveola.health import values, worst
from foveola.models.encoder import Encoder
from foveola.reports.adaptation import advise, model_of
from foveola.reports.advice import next_steps
from foveola.reports.curves import curves
from foveola.reports.findings import Findings, by_seed, names_of
from foveola.reports.images import sheets
from foveola.reports.progress import START
from foveola.reports.record import Record
from foveola.reports.request import ReportConfig
from foveola.zoo.load import load


def setup(found: Sequence[Findings]) -> str:
    columns = [_about(each) for each in found]
    if len(found) == 1:
        return html.facts(columns[0].items())
    rows = dict.fromkeys(name for column in columns for name in column)
    head = ["", *(html.escape(each.record.name) for each in found)]
    lines = [[html.escape(row), *(html.escape(column.get(row, "-")) for column in columns)] for row in rows]
    return html.table(head, lines, "wrap")


def _about(each: Findings) -> dict[str, str]:
    record = each.record
    total, batch = record.total_steps, record.get("batch_size")
    steps = f"{record.step:,} of {total:,}" if total else f"{record.step:,}"
    last = record.lines[-1] if record.lines else {}
    seconds, speeds = values(record.lines, "seconds"), values(record.lines, "images_per_second")
    made = [note.partition("  ")[2] for note in record.notes if "  foveola " in note]
    measured = next((r.versions for point in each.progress.points for r in point.results.values()), None)
    about = {
        "Method": record.method,
        "Recipe": str(record.get("recipe") or "-"),
        "Network": _network(record),
        "Trained on": str(record.get("data") or "-"),
        "Images in it": _images(record),
        "Steps": f"{steps}, {batch} images each" if batch else steps,
        "Images seen": f"{record.step * batch:,} ({last.get('epoch') or 0:.1f} epochs)" if batch else "-",
        "Time": _duration(max(seconds)) if seconds else "-",
        "Speed": f"{fmean(speeds):,.0f} images a second" if speeds else "-",
        "Seed": str(record.get("seed", "-")),
        "Measured on": each.data.test.name if each.data.test else "-",
        "Trained with": made[-1] if made else "not noted by the run",
        "Measured with": ", ".join(f"{k} {v}" for k, v in measured.items()) if measured else "-",
        "Folder": str(record.folder),
    }
    return {name: value for name, value in about.items() if value != "-"}


def _images(record: Record) -> str:
    low, high = record.images
    if low is None or high is None:
        return "-"
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _network(record: Record) -> str:
    encoder, why = _loaded(record)
    if encoder is None:
        width, depth = record.get("model.width"), record.get("model.depth")
        size = (
            f"width {width}, {depth} blocks"
            if width and depth
            else str(record.get("model.size", "not known"))
        )
        return f"ViT, {size}, patches of {record.get('model.patch_size', '?')}; {why}"
    width, depth, heads = encoder.config.model.shape
    count = sum(parameter.numel() for parameter in encoder.parameters())
    return (
        f"ViT, width {width}, {depth} blocks, {heads} heads, patches of {encoder.patch_size} on "
        f"{encoder.config.transform.crop} pixels, {count / 1e6:.2f} M parameters"
    )


def _loaded(record: Record) -> tuple[Encoder | None, str]:
    """The encoder at the end of the run, or None and why there is none."""
    if not record.has_encoder:
        return None, "no encoder written yet"
    try:
        return load(record.folder), ""
    except UserError as error:
        return None, str(error)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def health_section(found: Sequence[Findings]) -> str:
    parts = [
        html.paragraph(
            "Each answer names its number and the threshold it was held to. They are rules of thumb: LOOK "
            "asks for a look, BAD says that something is broken."
        )
    ]
    for each in found:
        if len(found) > 1:
            parts.append(html.tag("h3", f"{html.escape(each.record.name)} {html.chip(worst(each.verdicts))}"))
        rows = [
            html.tag("div", html.chip(verdict.state))
            + html.tag(
                "div",
                html.tag("b", html.escape(verdict.name))
                + html.tag("span", html.escape(verdict.text), "text"),
            )
            for verdict in each.verdicts
        ]
        parts.append(html.tag("div", "".join(rows), "health"))
    return "".join(parts)


def images(found: Sequence[Findings], config: ReportConfig) -> str:
    """Show the figures; of several runs all but the first are folded."""
    parts = []
    for number, each in enumerate(found):
        inner = sheets(each.record, each.data, each.progress, config)
        parts.append(html.folded(each.record.name, inner) if number else inner)
    return "".join(parts)


def curve_charts(records: Sequence[Record]) -> str:
    groups = curves(records)
    if not groups:
        return html.paragraph("No step was logged, so there is nothing to draw.")
    parts = []
    for number, group in enumerate(groups):
        inner = html.paragraph(group.about, "note") + html.charts(
            group.charts, f"curve{number}-", names_of(records)
        )
        folded = html.folded(group.title, inner)
        parts.append(folded if group.folded else html.tag("h3", html.escape(group.title)) + inner)
    return "".join(parts)


def configuration(found: Sequence[Findings]) -> str:
    parts = [html.paragraph("The command repeats the run in a new folder; the file is everything it needs.")]
    for each in found:
        text = shlex.quote(str(RunFolder(each.record.folder).config))
        parts.append(html.code(f"foveola pretrain {text} out=NEW_FOLDER"))
        text = (RunFolder(each.record.folder).config).read_text(encoding="utf-8")
        parts.append(html.folded(f"{each.record.name}/config.yaml", html.code(text)))
    return "".join(parts)


def advice_section(found: Sequence[Findings], config: ReportConfig) -> str:
    """Return what to do next, with commands; of several runs for the first."""
    each, parts = found[0], []
    if len(found) > 1:
        parts.append(
            html.paragraph(f"This is for {each.record.name}, and much the same for the others.", "note")
        )
    for text, command in next_steps(each, config.reference, bool(by_seed(found))):
        parts.append(html.paragraph(text) + (html.code(command) if command else ""))
    return "".join(parts)


def usage(each: Findings) -> str:
    folder = str(each.record.folder)
    if each.progress.baseline == START:
        folder = model_of(folder, advise(each.progress, each.control).use)
    lines = [
        "import foveola",
        "from PIL import Image",
        f"encoder = foveola.load({folder!r})",
        'features = encoder(encoder.transform(Image.open("image.jpg"))[None])',
        "print(features.objects.shape, features.patches.shape)  # one token and all patches of the image",
    ]
    run = shlex.quote(folder)
    commands = [_evaluation(each, run)]
    rest = html.paragraph("Other libraries have no such network: export cannot write it.", "note")
    if _expressed(each.record):
        commands.append(f"foveola export {run} out=encoder-for-timm format=timm")
        rest = ""
    return "".join(
        [
            html.tag("h3", "In Python"),
            html.code("\n".join(lines)),
            html.tag("h3", "Measure it, or take it to another library"),
            html.code("\n".join(commands)),
            rest,
        ]
    )


def _evaluation(each: Findings, run: str) -> str:
    """A command that measures the run on its images: what can be measured without labels, or k-NN."""
    train, test = each.data.train, each.data.test
    if train is None or test is None or each.data.labels is None:
        text = test.name if test else str(each.record.get("data") or "folder:/my/images")
        return f"foveola evaluate label_free model={run} test={shlex.quote(text)}"
    words = f"foveola evaluate knn model={run} train={shlex.quote(train.name)} test={shlex.quote(test.name)}"
    words += " rows=objects view=object" if each.data.labels == "objects" else ""
    return words + (" exclude_self=true" if each.data.overlap() else "")


def _expressed(record: Record) -> bool:
    """Whether other libraries have networks of this kind, so that it can be exported."""
    encoder, _ = _loaded(record)
    if encoder is None:
        return record.get("model.positions") != "rope"
    model = encoder.config.model
    plain = model.norm == "layer" and model.final_norm_affine and model.bias and not model.relative_bias
    plain = plain and model.final_norm == "tokens" and not model.patch_norm
    return plain and model.positions not in ("rope", "none") and encoder.config.pool != "predictor"
