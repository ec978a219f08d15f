"""What a report found out about one run, and which runs differ in their seed alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from foveola.health import Verdict
from foveola.reports.progress import MeasuredRun
from foveola.reports.record import Record
from foveola.reports.request import Data

SEED_KEYS = ("seed", "out", "about", "device")  # may differ between seeds of one run


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that the page says of one run."""

    record: Record
    data: Data
    progress: MeasuredRun
    verdicts: list[Verdict]
    control: MeasuredRun | None = None  # the same networks on the control set, where there is one


def by_seed(found: Sequence[Findings]) -> list[list[Findings]]:
    """Groups of two or more runs of the same settings and length that differ in their seed."""
    groups: dict[str, list[Findings]] = {}
    for each in found:
        rest = {name: value for name, value in each.record.config.items() if name not in SEED_KEYS}
        groups.setdefault(json.dumps([rest, each.record.encoder_step], sort_keys=True), []).append(each)
    return [
        group
        for group in groups.values()
        if len({each.record.get("seed") for each in group}) == len(group) > 1
    ]


def names_of(records: Sequence[Record]) -> list[str]:
    """Return names for a legend that charts share; none for a single run."""
    return [record.name for record in records] if len(records) > 1 else []
