"""Did training help? The part of a report that says what was measured, of one or several runs."""

from collections.abc import Sequence

from foveola.drawing import html
from foveola.evaluation.protocol import Metric
from foveola.health import Verdict
from foveola.reports import verdicts
from foveola.reports.adaptation import advise, capital
from foveola.reports.findings import Findings, by_seed, names_of
from foveola.reports.progress import BEST, END, START, UNTRAINED, MeasuredRun


def verdict(found: Sequence[Findings]) -> str:
    parts = [_seeds_verdict(group) for group in by_seed(found)]
    for each in found:
        state, sentence, more = _in_short(each)
        name = html.tag("b", html.escape(each.record.name)) + "<br>" if len(found) > 1 else ""
        bad, look = ([v for v in each.verdicts if v.state == s] for s in ("BAD", "LOOK"))
        notes = [*each.progress.notes] if state == "OPEN" else []
        inner = html.tag("p", name + html.escape(sentence), "lead")
        inner += "".join(html.paragraph(text, "note") for text in (*more, _health_line(each.verdicts)))
        inner += html.items(notes + [f"{v.state}: {v.name} {v.text}" for v in (*bad, *look)])
        parts.append(html.tag("div", html.chip(state) + html.tag("div", inner), "verdict"))
    return "".join(parts)


def _in_short(each: Findings) -> tuple[str, str, list[str]]:
    """The state of a run, the sentence about it, and what is to be known beside it."""
    if each.progress.baseline != START:
        return *verdicts.in_short(verdicts.changes(each.progress)), []
    advice = advise(each.progress, each.control)
    more = [] if advice.main is None else [f"{capital(advice.main.certainty())}."]
    if advice.use == BEST:
        more.append(
            "encoders/best was chosen by measurements in training: where these were of the same test images, "
            "its number here is slightly too good."
        )
    return advice.state, advice.sentence, more


def _seeds_verdict(group: Sequence[Findings]) -> str:
    names = ", ".join(each.record.name for each in group)
    found = verdicts.over_seeds([verdicts.changes(each.progress) for each in group])
    if not found:
        return ""
    text = html.tag(
        "p", html.tag("b", html.escape(names)) + "<br>" + html.escape(found[0].sentence()), "lead"
    )
    return html.tag("div", html.chip(found[0].state) + html.tag("div", text), "verdict")


def _health_line(verdicts: Sequence[Verdict]) -> str:
    counts = {state: sum(v.state == state for v in verdicts) for state in ("OK", "LOOK", "BAD", "NOT KNOWN")}
    words = {"OK": "fine", "LOOK": "worth a look", "BAD": "bad", "NOT KNOWN": "not known"}
    text = ", ".join(f"{count} {words[state]}" for state, count in counts.items() if count)
    return f"Health of the run, {len(verdicts)} questions: {text}."


def helped(found: Sequence[Findings]) -> str:
    adapted = any(each.progress.baseline == START for each in found)
    start = "the starting weights, for " if adapted else ""
    parts = [
        html.paragraph(
            f"The same measurements for {start}the untrained network (same shape, fresh weights), for the "
            "trained one on its way, and at the end. Brackets are 95 % intervals over the test images. "
            "Whether training helped is told from the change on the same test images, whose interval is "
            "narrower."
        ),
        *(html.paragraph(text, "note") for text in dict.fromkeys(_amounts(each.progress) for each in found)),
    ]
    parts += [_seeds(group) for group in by_seed(found)]
    drawn = verdicts.measure_charts([each.record.name for each in found], [each.progress for each in found])
    parts.append(html.charts(drawn, "helped", names_of([each.record for each in found])))
    for each in found:
        if len(found) > 1:
            parts.append(html.tag("h3", html.escape(each.record.name)))
        parts.append(_gained(each))
        parts.append(_answers(each.progress))
        parts += [html.paragraph(note, "note") for note in each.progress.notes]
        parts.append(_results(each.progress))
    return "".join(parts)


def _amounts(progress: MeasuredRun) -> str:
    """Why numbers here are not those of a terminal."""
    last = progress.point(END)
    amounts = []
    for name, result in ({} if last is None else last.results).items():
        train = result.data.get("train")
        rows = train.get("rows", train.get("images")) if isinstance(train, dict) else None
        used = "" if rows is None else f" with {rows:,} of the training data"
        amounts.append(f"{verdicts.titled(name)} on {verdicts.number_of_rows(result)}{used}")
    if not amounts:
        return ""
    return (
        f"Measured here: {'; '.join(amounts)}. Numbers on a terminal, of the demo or of foveola evaluate, "
        "are of other amounts (here at most limit= images of each set), so they differ: k-NN rises with the "
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
    baseline = group[0].progress.baseline
    head = [f"{len(group)} seeds", baseline, "trained", "change", "chance"]
    own = "" if baseline == START else " Each run is compared with the untrained network of its own seed."
    note = html.paragraph(f"Mean ± standard deviation over the seeds.{own}", "note")
    return html.table(head, rows) + note


def _unit(metric: Metric) -> str:
    """The unit of a metric behind its name in a table; numbers that cannot be compared say what they are."""
    return f", {metric.unit or 'a plain number'}" * metric.compared


def _guess(chance: float | None) -> str:
    return "-" if chance is None else verdicts.number_text(chance)


def _gained(each: Findings) -> str:
    """A table of the networks of an adaptation, on the user's images and on the control set."""
    if each.progress.baseline != START:
        return ""
    labels = [label for label in (UNTRAINED, START, BEST, END) if each.progress.point(label) is not None]
    steps = [label for label in labels if label in (BEST, END)]
    rows = [
        line
        for progress, where in ((each.progress, "your images"), (each.control, "control set"))
        if progress is not None
        for line in _lines(progress, where, labels, steps)
    ]
    titles = [html.escape(point.title) for point in map(each.progress.point, labels) if point is not None]
    head = ["[95 % interval]", "on", *titles, *(f"change {START} to {label}" for label in steps)]
    name = "" if each.control is None else f"The control set, {each.control.test}, has other images. "
    caption = f"{name}Changes are those on the same test images, with paired intervals."
    notes = [] if each.control is None else each.control.notes
    return (
        html.tag("h3", "What was gained, what was forgotten")
        + html.table(head, rows)
        + html.paragraph(caption, "note")
        + "".join(html.paragraph(f"Control set: {note}", "note") for note in notes)
    )


def _lines(progress: MeasuredRun, where: str, labels: Sequence[str], steps: Sequence[str]) -> list[list[str]]:
    """Cells of the first main number of each protocol for each network, with the changes since the start."""
    results, masks = verdicts.measured(progress), verdicts.has_masks(progress)
    moved = {
        step: {(each.protocol, each.metric): each for each in verdicts.changes(progress, step)}
        for step in steps
    }
    pairs = {pair[0]: pair for pair in reversed(verdicts.main_metrics(progress))}
    lines = []
    for pair in reversed(pairs.values()):
        name = f"{verdicts.label(results[pair], pair[1], masks)}{_unit(results[pair].metric(pair[1]))}"
        points = [progress.point(label) for label in labels]
        cells = [_cell(None if point is None else verdicts.number(point, *pair)) for point in points]
        changed = [_change(moved[step].get(pair)) for step in steps]
        lines.append([html.escape(name), where, *cells, *changed])
    return lines


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
    labels = [html.escape(point.title) for point in points]
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
    head = ["[95 % interval]", *labels, f"change {progress.baseline} to {END}", "chance"]
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
    guesses = {pair: known[pair].chance if pair in known else None for pair in pairs}
    return [[_change(known.get(pair)), _guess(guesses[pair])] for pair in pairs]


def _change(change: verdicts.MetricChange | None) -> str:
    """A cell with the change of a metric and its paired interval."""
    if change is None:
        return "-"
    moved, paired = change.after.value - change.before.value, change.difference
    ends = () if paired is None else (paired.low, paired.high)
    digits = verdicts.digits_of(change.about, moved, *ends)
    interval = f"[{', '.join(f'{end:+.{digits}f}' for end in ends)}]"
    return f"{moved:+.{digits}f}" + (html.tag("small", interval) if ends else "")


def _cell(number: verdicts.Number | None) -> str:
    if number is None:
        return "-"
    if number.low is None or number.high is None:
        return html.escape(str(number))
    interval = f"[{verdicts.number_text(number.low)}, {verdicts.number_text(number.high)}]"
    return html.escape(str(number)) + html.tag("small", html.escape(interval))
