"""`foveola report`: what a run learned and whether it helped, on one page that opens anywhere."""

import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import foveola
from foveola import files
from foveola.config import UserError, build
from foveola.drawing import html
from foveola.evaluation.protocol import every, find_protocol
from foveola.files import RunFolder
from foveola.health import Facts, health
from foveola.reports import helped, sections
from foveola.reports.answers import answers_section
from foveola.reports.findings import Findings
from foveola.reports.progress import END, UNTRAINED, MeasuredRun, measure_control, measure_run
from foveola.reports.record import Record, read_runs
from foveola.reports.request import ReportConfig, open_data
from foveola.zoo.load import load

GLOBAL_VIEWS = 2  # of an image, where a configuration does not say


def report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Write one self-contained HTML page on one or several runs; returns its path.

    Args:
        runs: run folders, finished or not.
        out: file to write; by default `report.html` in the folder of the first run.
        progress: tell on stderr what is being measured.
        settings: keys of `ReportConfig` (`data`, `train`, `test`, `protocols`, `reference`, `images`, ...);
            others are settings of the protocols (`limit=500`, `knn={"k": (20,)}`).

    Results are kept in RUN/report/<fingerprint of the encoder>/ and used again while encoder, settings, data
    (with sizes and times of files) and version are the same. Raises UserError for what is no run folder,
    unknown keys, bad values, a device, data and reference that were asked for and are not there. What a run
    itself lacks is said on the page.
    """
    records = read_runs([runs] if isinstance(runs, str | Path) else list(runs))
    config, changes = report_configs(settings | ({} if out is None else {"out": str(out)}))
    path = Path(config.out).expanduser() if config.out else RunFolder(records[0].folder).report
    if path.is_dir():
        raise UserError(f"out={path} is a folder; expected a file such as {path / 'report.html'}")
    files.check_writable(path.parent, "give another out= for the report")
    found: list[Findings] = []
    for record in records:

        def say(text: str, name: str = record.name) -> None:
            if progress:
                print(f"report: {datetime.now():%H:%M:%S} {name}: {text}", file=sys.stderr, flush=True)

        say("reading")
        data = open_data(record, config)
        others = [RunFolder(other.record.folder).measured for other in found]
        measured = measure_run(record, data, config, changes, others, say)
        control = measure_control(record, config, changes, others, say)
        say("drawing")
        judged = health(record.lines, facts_of_record(record, measured))
        found.append(Findings(record, data, measured, judged, control))
    text = render(found, config)
    files.write_text(path, text)
    return path


def report_configs(settings: dict[str, Any]) -> tuple[ReportConfig, dict[str, Any]]:
    """Return the report's own settings, and those of protocols. Raises UserError for unknown keys and bad
    values.
    """
    own = set(ReportConfig.__dataclass_fields__)
    others = {key: value for key, value in settings.items() if key not in own}
    mine = {key: value for key, value in settings.items() if key in own}
    if isinstance(mine.get("protocols"), str):
        mine["protocols"] = [name.strip() for name in mine["protocols"].split(",")]
    config = build(ReportConfig, mine)
    protocols = [*every(), *map(find_protocol, config.protocols or ())]
    known = {protocol.name for protocol in protocols}
    known |= {key for protocol in protocols for key in protocol.Config.__dataclass_fields__}
    if stray := {key: value for key, value in others.items() if key not in known}:
        build(ReportConfig, mine | stray)  # says what is wrong
    return config, others


def facts_of_record(record: Record, progress: MeasuredRun) -> Facts:
    """Return what the verdicts need of a run: its configuration, and how much position explains."""
    size, patch = record.get("views.global_size"), record.get("model.patch_size")
    first, last = progress.point(UNTRAINED), progress.point(END)
    fraction = None if last is None else last.position_fraction
    views, processes = record.get("views.global_count", GLOBAL_VIEWS), _processes(record)
    parts = 1 if record.whole_steps else (record.get("accumulate") or 1) * (processes or 1)
    return Facts(
        fixed_targets=record.fixed_targets,
        precision=str(record.get("precision", "fp32")),
        total_steps=record.total_steps,
        prototypes=record.prototypes(),
        features=(record.get("batch_size") or 0) // parts * (views or 1) or None,
        width=_width(record),
        positions=(size // patch) ** 2 if size and patch else None,
        notes=record.notes,
        position_fraction=None
        if fraction is None
        else (fraction, None if first is None else first.position_fraction),
        position_images=None if last is None else last.position_images,
        processes=processes,
        whole_steps=record.whole_steps,
        images=record.image_count,
    )


def _processes(record: Record) -> int | None:
    """Over how many the run's batches were spread, as its log says; None for logs that do not."""
    found = [re.search(r"  foveola .*; (\d+) process(es)? on ", note) for note in record.notes]
    return next((int(match[1]) for match in reversed(found) if match), None)


def _width(record: Record) -> int | None:
    if record.get("model.width"):
        return record.get("model.width")
    if not record.has_encoder:
        return None
    try:
        return load(record.folder).config.model.shape[0]
    except UserError:  # damaged, which the measurements say
        return None


# -- the page ------------------------------------------------------------------------------------------------


def render(found: Sequence[Findings], config: ReportConfig) -> str:
    """Return the whole page as text."""
    names = [each.record.name for each in found]
    title = f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
    made = f"{datetime.now():%Y-%m-%d %H:%M}"
    parts = [
        ("verdict", "In short", helped.verdict(found)),
        ("setup", "What was trained on what", sections.setup(found)),
        ("helped", "Did it help?", helped.helped(found)),
        *([("answers", "What the head answers", told)] if (told := answers_section(found, config)) else []),
        ("health", "Is the run healthy?", sections.health_section(found)),
        ("images", "What it sees", sections.images(found, config)),
        ("curves", "Curves", sections.curve_charts([each.record for each in found])),
        ("config", "Exact configuration", sections.configuration(found)),
        ("next", "What to do next", sections.advice_section(found, config)),
        ("use", "How to use the encoder", sections.usage(found[0])),
    ]
    links = "".join(html.tag("a", heading, href=f"#{name}") for name, heading, _ in parts[1:])
    methods = dict.fromkeys(each.record.method for each in found)
    data = dict.fromkeys(str(each.record.get("data") or "unknown images") for each in found)
    top = (
        html.paragraph("foveola report", "brand")
        + html.tag("h1", html.escape(title))
        + html.paragraph(f"{', '.join(methods)} on {', '.join(data)}", "sub")
        + html.tag("nav", links)
    )
    main = "\n".join(html.section(name, heading, body) for name, heading, body in parts)
    foot = html.paragraph(f"Made {made} by foveola {foveola.__version__}. This file fetches nothing.")
    body = html.tag("header", top) + html.tag("main", main) + html.tag("footer", foot)
    return html.page(f"{title}: foveola report", body, f"foveola {foveola.__version__}")
