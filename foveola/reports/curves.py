"""The metrics of one or several runs as charts, in groups; every metric that was logged is in one of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from foveola.drawing.plots import Chart, Line
from foveola.health import FLAT_FROM, SHARP, USED, WAIT, as_percent
from foveola.reports.record import Record

MOST_POINTS = 240  # of a curve; more are drawn as means of neighbours in the band of their extremes
HIDDEN = {"step", "epoch", "seconds"}  # axes, not curves
TITLES = {
    "loss": "Loss (sum of its terms)",
    "lr": "Learning rate",
    "weight_decay": "Weight decay",
    "momentum": "Momentum of the teacher",
    "feature_spread": "Feature spread",
    "effective_rank": "Effective rank",
    "clustering/position_information": "What position tells of clusters (nats)",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images a second",
    "data_wait": "Time spent waiting for data",
    "bad_images": "Unreadable images",
    "objects/first_try": "Object-aware crops found at once",
    "position/found": "Positions found again",
    "position/distance": "Distance to the true position",
}


@dataclass(frozen=True, eq=False)
class Group:
    """Charts under one heading; `about` is a sentence on how to read them."""

    title: str
    about: str
    charts: list[Chart]
    folded: bool = False


def curves(records: Sequence[Record]) -> list[Group]:
    """Return all charts of the runs, one line a run where there are several; groups without a chart are left
    out.
    """
    names = sorted({name for record in records for line in record.lines for name in line} - HIDDEN)
    taken: set[str] = set()

    def pick(*wanted: str) -> list[Chart]:
        """Charts of the metrics with these names or, with a slash at either end, endings and beginnings."""
        found = [name for want in wanted for name in names if _matches(name, want) and name not in taken]
        taken.update(found)
        return [_chart(records, name) for name in dict.fromkeys(found)]

    losses = pick("loss")
    terms = pick("loss/")
    if len(records) == 1 and len(terms) > 1:  # one run: its terms share their axes
        lines = [Line(chart.title.removeprefix("loss/"), *_xy(chart)) for chart in terms]
        terms = [Chart("Terms of the loss", lines, terms[0].x)]
    several = len(records) > 1
    groups = [
        Group(
            "Loss",
            "Losses of different methods, or with different numbers of prototypes, are not comparable."
            if several
            else "With moving targets a lower loss is no proof of better features.",
            losses + terms,
        ),
        Group(
            "Targets",
            "Entropy as a fraction of the most possible, log K: 1 says nothing, 0 is one-hot. "
            "Dotted: where LOOK begins.",
            [*_entropies(records, taken), *_usage(records, taken)],
        ),
        Group(
            "Features of a batch",
            "Spread: 1 is in all directions, 0 is one point. Effective rank: how many directions are in use.",
            pick(
                "feature_spread", "effective_rank", "clustering/position_information", "targets/", "position/"
            ),
        ),
        Group("Evaluation during training", "As set in the recipe.", pick("knn/", *_evaluations(records))),
        Group("Schedules", "What the recipe asked for at each step.", pick("lr", "weight_decay", "momentum")),
        Group(
            "Machine",
            "Throughput counts everything between two logged steps. Dotted: where LOOK begins.",
            pick("images_per_second", "data_wait", "grad_norm"),
        ),
    ]
    rest = Group("Everything else that was logged", "As the methods name it.", pick(*names), folded=True)
    return [group for group in (*groups, rest) if group.charts]


def _evaluations(records: Sequence[Record]) -> list[str]:
    """How the names of the numbers begin that further evaluations of these runs gave."""
    found = (record.get("evaluations", {}) for record in records)
    return [f"{name}/" for each in found if isinstance(each, dict) for name in each]


def _matches(name: str, want: str) -> bool:
    return name.startswith(want) if want.endswith("/") else name == want


def _chart(records: Sequence[Record], name: str) -> Chart:
    levels = {"LOOK": WAIT[0]} if name == "data_wait" else {}
    return Chart(TITLES.get(name, name), _lines(records, name), _axis(records), levels=levels)


def _lines(
    records: Sequence[Record], name: str, change: Callable[[Record, float], float] = lambda _, y: y
) -> list[Line]:
    lines = []
    for record in records:
        points = [
            (float(line["step"] or 0), change(record, y) if (y := line[name]) is not None else math.nan)
            for line in record.lines
            if name in line
        ]
        # A run without the metric keeps its place, and so its colour.
        lines.append(_thin(record.name, points, _scale(record, records)))
    return lines


def _thin(name: str, points: list[tuple[float, float]], scale: float) -> Line:
    """A curve of at most `MOST_POINTS`; a parcel with a value that is not finite leaves a gap."""
    size = max(-(-len(points) // MOST_POINTS), 1)
    parcels = [points[i : i + size] for i in range(0, len(points), size)]
    x = [scale * fmean(x for x, _ in parcel) for parcel in parcels]
    y = [fmean(y for _, y in parcel) for parcel in parcels]
    if size == 1:
        return Line(name, x, y)
    low = [min(y for _, y in parcel) for parcel in parcels]
    return Line(name, x, y, low, [max(y for _, y in parcel) for parcel in parcels])


def _axis(records: Sequence[Record]) -> str:
    return "step" if _same_batch(records) else "images seen"


def _same_batch(records: Sequence[Record]) -> bool:
    return len({record.get("batch_size") for record in records}) == 1


def _scale(record: Record, records: Sequence[Record]) -> float:
    return 1.0 if _same_batch(records) else float(record.get("batch_size") or 1)


def _xy(chart: Chart) -> tuple[Sequence[float], Sequence[float]]:
    return chart.lines[0].x, chart.lines[0].y


def _kinds(records: Sequence[Record], ending: str) -> list[str]:
    every = {name for record in records for line in record.lines for name in line}
    return sorted(name.removesuffix(ending) for name in every if name.endswith(ending))


def _entropies(records: Sequence[Record], taken: set[str]) -> list[Chart]:
    """Entropies as fractions of log K, of runs that say K; of the others in nats, with other metrics."""
    charts, lines = [], []
    levels = {f"flat: {as_percent(FLAT_FROM[0])}": FLAT_FROM[0], f"one-hot: {as_percent(SHARP)}": SHARP}
    for kind in _kinds(records, "/target_entropy"):
        if not any(record.prototypes().get(kind, 0) > 1 for record in records):
            continue

        def fraction(record: Record, y: float, kind: str = kind) -> float:
            count = record.prototypes().get(kind, 0)
            return y / math.log(count) if count > 1 else math.nan

        found = _lines(records, f"{kind}/target_entropy", fraction)
        taken.add(f"{kind}/target_entropy")
        if len(records) > 1:
            charts.append(Chart(f"Target entropy, {kind}", found, _axis(records), "of log K", levels))
        else:
            lines += [Line(kind, line.x, line.y, line.low, line.high) for line in found]
    return charts or ([Chart("Target entropy", lines, _axis(records), "of log K", levels)] if lines else [])


def _usage(records: Sequence[Record], taken: set[str]) -> list[Chart]:
    charts, lines = [], []
    levels = {"LOOK": USED[0]}
    for kind in _kinds(records, "/prototypes_used"):
        found = _lines(records, f"{kind}/prototypes_used")
        taken.add(f"{kind}/prototypes_used")
        if len(records) > 1:
            charts.append(Chart(f"Prototypes in use, {kind}", found, _axis(records), levels=levels))
        else:
            lines += [Line(kind, line.x, line.y) for line in found]
    return charts or ([Chart("Prototypes in use", lines, _axis(records), levels=levels)] if lines else [])
