"""The parts of a report, each from what was found out about one or several runs."""

import shlex
from collections.abc import Sequence
from statistics import fmean

from foveola.config import UserError
from foveola.drawing import html
from foveola.evaluation.protocol import Metric
from foveola.files import RunFolder
from foveola.health import Verdict, values, worst
from foveola.models.encoder import Encoder
from foveola.reports import verdicts
from foveola.reports.advice import next_steps
from foveola.reports.curves import curves
from foveola.reports.findings import Findings, by_seed
from foveola.reports.images import sheets
from foveola.reports.progress import END, UNTRAINED, MeasuredRun
from foveola.reports.record import Record
from foveola.reports.request import ReportConfig
from foveola.zoo.load import load


def verdict(found: Sequence[Findings]) -> str:
    parts = [_seeds_verdict(group) for group in by_seed(found)]
    for each in found:
        state, sentence = verdicts.in_short(verdicts.changes(each.progress))
        name = html.tag("b", html.escape(each.record.name)) + "<br>" if len(found) > 1 else ""
        bad, look = ([v for v in each.verdicts if v.state == s] for s in ("BAD", "LOOK"))
        told = [*each.progress.notes] if state == "OPEN" else []
        inner = html.tag("p", name + html.escape(sentence), "lead") + html.paragraph(
            _health_line(each.verdicts), "note"
        )
        inner += html.items(told + [f"{v.state}: {v.name} {v.text}" for v in (*bad, *look)])
        parts.append(html.tag("div", html.chip(state) + html.tag("div", inner), "verdict"))
    return "".join(parts)


def _seeds_verdict(group: Sequence[Findings]) -> str:
    names = ", ".join(each.record.name for each in group)
    found = verdicts.over_seeds([verdicts.changes(each.progress) for each in group])
    if not found:
        return ""
    told = html.tag(
        "p", html.tag("b", html.escape(names)) + "<br>" + html.escape(found[0].sentence()), "lead"
    )
    return html.tag("div", html.chip(found[0].state) + html.tag("div", told), "verdict")


def _health_line(verdicts: Sequence[Verdict]) -> str:
    counts = {state: sum(v.state == state for v in verdicts) for state in ("OK", "LOOK", "BAD", "NOT KNOWN")}
    words = {"OK": "fine", "LOOK": "worth a look", "BAD": "bad", "NOT KNOWN": "not known"}
    told = ", ".join(f"{count} {words[state]}" for state, count in counts.items() if count)
    return f"Health of the run, {len(verdicts)} questions: {told}."


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


def helped(found: Sequence[Findings]) -> str:
    parts = [
        html.paragraph(
            "The same measurements for the untrained network (same shape, fresh weights), for the trained "
            "one on its way, and at the end. Brackets are 95 % intervals over the test images. Whether "
            "training helped is told from the change on the same test images, whose interval is narrower."
        ),
        *(html.paragraph(text, "note") for text in dict.fromkeys(_amounts(each.progress) for each in found)),
    ]
    parts += [_seeds(group) for group in by_seed(found)]
    drawn = verdicts.measure_charts([each.record.name for each in found], [each.progress for each in found])
    parts.append(html.charts(drawn, "helped", _names([each.record for each in found])))
    for each in found:
        if len(found) > 1:
            parts.append(html.tag("h3", html.escape(each.record.name)))
        parts.append(_answers(each.progress))
        parts += [html.paragraph(note, "note") for note in each.progress.notes]
        parts.append(_results(each.progress))
    return "".join(parts)


def _amounts(progress: MeasuredRun) -> str:
    """Why numbers here are not those of a terminal."""
    last = progress.point(END)
    told = []
    for name, result in ({} if last is None else last.results).items():
        train = result.data.get("train")
        rows = train.get("rows", train.get("images")) if isinstance(train, dict) else None
        bank = "" if rows is None else f" with {rows:,} of the training data"
        told.append(f"{verdicts.titled(name)} on {verdicts.number_of_rows(result)}{bank}")
    if not told:
        return ""
    return (
        f"Measured here: {'; '.join(told)}. Numbers on a terminal, of the demo or of foveola evaluate, are "
        "of other amounts (here at most limit= images of each set), so they differ: k-NN rises with the "
        "number of training images, and retrieval falls with the number of objects to choose from."
    )


def _seeds(group: Sequence[Findings]) -> str:
    """A table of what runs of several seeds have in common, with their deviation."""
    found = verdicts.over_seeds([verdicts.changes(each.progress) for each in group])
    if not found:
        return ""

    rows = [
        [
            html.escape(row.name + _unit(row.about)),
            *(row.text(pair) for pair in (row.before, row.after, row.change)),
            _guess(row.chance),
        ]
        for row in found
    ]
    head = [f"{len(group)} seeds", "untrained", "trained", "change", "chance"]
    told = html.paragraph(
        "Mean ± standard deviation over the seeds. Each run is compared with the untrained network of its "
        "own seed.",
        "note",
    )
    return html.table(head, rows) + told


def _unit(metric: Metric) -> str:
    """The unit of a metric behind its name in a table; numbers that cannot be compared say what they are."""
    return f", {metric.unit or 'a plain number'}" * metric.compared


def _guess(chance: float | None) -> str:
    return "-" if chance is None else verdicts.number_text(chance)


def _answers(progress: MeasuredRun) -> str:
    """A sentence for each main metric, with a word of what came out."""
    words = {"better": "HELPED", "worse": "WORSE", "open": "OPEN"}
    rows = [
        html.tag("div", html.chip(words[change.outcome])) + html.tag("div", html.escape(change.sentence()))
        for change in verdicts.changes(progress)
    ]
    return html.tag("div", "".join(rows), "health") if rows else ""


def _results(progress: MeasuredRun) -> str:
    """A table of the main metrics, and a folded one of all numbers."""
    points = [point for point in progress.points if point.results]
    if not points:
        return ""
    main = verdicts.main_metrics(progress)
    every = dict.fromkeys(
        (name, metric)
        for p in points
        for name, result in p.results.items()
        for metric in verdicts.numbers(result)
    )
    labels = [html.escape(point.label) for point in points]
    masks, results = verdicts.has_masks(progress), verdicts.measured(progress)

    def lines(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
        rows = []
        for protocol, metric in pairs:
            cells = [verdicts.number(point, protocol, metric) for point in points]
            label = verdicts.label(results[protocol, metric], metric, masks)
            label += _unit(results[protocol, metric].metric(metric))
            rows.append([html.escape(label), *map(_cell, cells)])
        return rows

    about = verdicts.descriptions(progress)
    rest = [pair for pair in every if pair not in main and pair not in about]
    notes = dict.fromkeys(
        f"{name}: {note}" for p in points for name, r in p.results.items() for note in r.notes
    )
    told = [row + more for row, more in zip(lines(main), _more(progress, main), strict=True)]
    head = ["[95 % interval]", *labels, f"change {UNTRAINED} to {END}", "chance"]
    shown = html.table(head, told) if main else ""
    if about:
        shown += html.tag("h3", "How features fill their space")
        shown += html.paragraph("Without labels, and without a better direction: see what changed.", "note")
        shown += html.table(["", *labels], lines(about))
    folded = html.folded(
        "All other numbers", html.table(["", *labels], lines(rest)) + html.items(notes, "note")
    )
    return shown + folded


def _more(progress: MeasuredRun, pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """The change by training and the chance level of each metric, as cells."""
    known = {(change.protocol, change.metric): change for change in verdicts.changes(progress)}
    rows = []
    for pair in pairs:
        change = known.get(pair)
        cell, paired = "-", None if change is None else change.difference
        if change is not None:
            moved = change.after.value - change.before.value
            ends = () if paired is None else (paired.low, paired.high)
            digits = verdicts.digits_of(change.about, moved, *ends)
            cell = f"{moved:+.{digits}f}"
            if ends:
                cell += html.tag("small", f"[{', '.join(f'{end:+.{digits}f}' for end in ends)}]")
        rows.append([cell, _guess(None if change is None else change.chance)])
    return rows


def _cell(number: verdicts.Number | None) -> str:
    if number is None:
        return "-"
    if number.low is None or number.high is None:
        return html.escape(str(number))
    interval = f"[{verdicts.number_text(number.low)}, {verdicts.number_text(number.high)}]"
    return html.escape(str(number)) + html.tag("small", html.escape(interval))


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


def _names(records: Sequence[Record]) -> list[str]:
    """Names for a legend that charts share; none for a single run."""
    return [record.name for record in records] if len(records) > 1 else []


def curve_charts(records: Sequence[Record]) -> str:
    groups = curves(records)
    if not groups:
        return html.paragraph("No step was logged, so there is nothing to draw.")
    parts = []
    for number, group in enumerate(groups):
        inner = html.paragraph(group.about, "note") + html.charts(
            group.charts, f"curve{number}-", _names(records)
        )
        folded = html.folded(group.title, inner)
        parts.append(folded if group.folded else html.tag("h3", html.escape(group.title)) + inner)
    return "".join(parts)


def configuration(found: Sequence[Findings]) -> str:
    parts = [html.paragraph("The command repeats the run in a new folder; the file is everything it needs.")]
    for each in found:
        place = shlex.quote(str(RunFolder(each.record.folder).config))
        parts.append(html.code(f"foveola pretrain {place} out=NEW_FOLDER"))
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
        place = test.name if test else str(each.record.get("data") or "folder:/my/images")
        return f"foveola evaluate label_free model={run} test={shlex.quote(place)}"
    words = f"foveola evaluate knn model={run} train={shlex.quote(train.name)} test={shlex.quote(test.name)}"
    words += " rows=objects view=object" if each.data.labels == "objects" else ""
    return words + (" exclude_self=true" if each.data.shares() else "")


def _expressed(record: Record) -> bool:
    """Whether other libraries have networks of this kind, so that it can be exported."""
    encoder, _ = _loaded(record)
    if encoder is None:
        return record.get("model.positions") != "rope"
    model = encoder.config.model
    plain = model.norm == "layer" and model.final_norm_affine and model.bias
    return plain and model.positions != "rope" and encoder.config.pool != "predictor"
