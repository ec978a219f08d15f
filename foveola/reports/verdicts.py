"""From results to answers: what changed by training, whether the intervals say so, and charts over steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from foveola.drawing.plots import Chart, Line
from foveola.evaluation.paired import Difference, difference
from foveola.evaluation.protocol import PROTOCOLS, Metric, find_protocol
from foveola.evaluation.result import Result
from foveola.reports.progress import BEST, END, START, UNTRAINED, MeasuredRun, MeasuredStep

Direction = Literal["better", "worse", "open"]
WHEN = {  # of a network, in a sentence
    UNTRAINED: "untrained",
    START: "at the start",
    BEST: "at the best step",
    END: "after training",
}


@dataclass(frozen=True)
class Number:
    """A metric with its 95 % interval, where it has one."""

    value: float
    low: float | None
    high: float | None

    whole: bool = False  # a count

    def __str__(self) -> str:
        return f"{self.value:.0f}" if self.whole else number_text(self.value)


@dataclass(frozen=True)
class MetricChange:
    """One metric before and after training; `about` is what its protocol declares."""

    protocol: str
    metric: str
    about: Metric
    before: Number
    after: Number
    name: str
    difference: Difference | None = None  # on the same test rows
    chance: float | None = None
    rows: str = "test images"  # what it was measured on, such as "200 test images"
    networks: tuple[str, str] = (UNTRAINED, END)  # labels of the two

    @property
    def outcome(self) -> Direction:
        """Better, worse or open: by the paired interval; without one, by intervals that do not overlap."""
        lower = self.about.better == "lower"
        if self.difference is None:
            return compared(self.before, self.after, lower)
        if not self.difference.clear:
            return "open"
        return "better" if (self.difference.value < 0) == lower else "worse"

    @property
    def unmoved(self) -> bool:
        """Whether training changed the score of no row."""
        return self.difference is not None and self.difference.low == self.difference.high == 0

    def numbers(self) -> str:
        """Return text, as in: from 27.5 % untrained to 21.0 % after training (chance 10.0 %)."""
        unit = f" {self.about.unit}" * bool(self.about.unit)
        guess = "" if self.chance is None else f" (chance {number_text(self.chance)}{unit})"
        first, last = (WHEN[label] for label in self.networks)
        return f"from {self.before}{unit} {first} to {self.after}{unit} {last}{guess}"

    def certainty(self) -> str:
        """Return how sure the change is, as a part of a sentence."""
        if self.difference is None:
            if self.outcome == "open":
                return "the intervals overlap, and these results hold no scores of images to tell more"
            return "the intervals do not overlap"
        if self.unmoved:
            return f"not one of the same {self.rows} is scored differently"
        numbers = self.difference.value, self.difference.low, self.difference.high
        digits, points = digits_of(self.about, *numbers), unit_suffix(self.about)
        value, low, high = (f"{x:+.{digits}f}" for x in numbers)
        change = f"the change on the same {self.rows} is {value}{points}, 95 % interval {low} to {high}"
        if self.outcome != "open":
            return change
        width = (self.difference.high - self.difference.low) / 2
        return f"{change}: too few to tell changes below about {width:.{digits}f}{points}"

    def sentence(self) -> str:
        ends = {"better": ": training helped", "worse": ": training made it worse", "open": ""}
        return f"{self.name} went {self.numbers()}; {self.certainty()}{ends[self.outcome]}."


def unit_suffix(metric: Metric) -> str:
    """Return the unit of a difference, behind its number."""
    return " points" if metric.unit == "%" else f" {metric.unit}" * bool(metric.unit)


def digits_of(metric: Metric, *numbers: float) -> int:
    """Return how many digits after the point differences and deviations of a metric have, those of one line
    alike.

    One in percent; of other units so many that the largest of the `numbers` has two digits of its own.
    """
    largest = max(map(abs, numbers), default=0.0)
    if metric.unit == "%" or not largest:
        return 1
    return min(max(1, 1 - math.floor(math.log10(largest))), 9)


def compared(before: Number, after: Number, lower: bool = False) -> Direction:
    """Return whether `after` is better (higher, or `lower`) or worse; open where intervals overlap or
    lack.
    """
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return "open"
    if lower:
        before, after = after, before
    return "better" if after.low > before.high else "worse" if after.high < before.low else "open"  # type: ignore[operator]


def number_text(value: float) -> str:
    """Return a number with as many digits as it deserves."""
    size = abs(value)
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 or value == 0 else f"{value:.2g}"


def label(result: Result, metric: str, masks: bool = True) -> str:
    """Return a metric in words: "k-NN top-1 (object masks)"; without `masks` nobody asks whether masks were
    used.
    """
    return result.metric(metric).title(metric, masks)


def titled(protocol: str) -> str:
    """Return a protocol in words, where it is one of foveola's."""
    return find_protocol(protocol).title if protocol in PROTOCOLS else protocol


def numbers(result: Result) -> dict[str, Number]:
    """Return the metrics of a result with their intervals, in its order; the ends of intervals are no
    metrics.
    """
    found = {}
    for name in result.names():
        ends = result.interval(name) or (None, None)
        found[name] = Number(result.metrics[name], *ends, whole=result.metric(name).digits == 0)
    return found


def measured(progress: MeasuredRun) -> dict[tuple[str, str], Result]:
    """Return a result with each (protocol, metric) that any point has."""
    return {
        (protocol, name): result
        for point in progress.points
        for protocol, result in point.results.items()
        for name in result.names()
    }


def main_metrics(progress: MeasuredRun) -> list[tuple[str, str]]:
    """Return (protocol, metric) of what has an interval and a better direction; the main one first.

    In the order of `PROTOCOLS`; of one protocol, what it declares as its main metrics comes first, and of
    these object masks where its rows are objects.
    """
    pairs = {
        (protocol, name): result.metric(name)
        for point in progress.points
        for protocol, result in point.results.items()
        for name in result.names()
        if result.interval(name) is not None and result.metric(name).compared
    }
    order = {name: rank for rank, name in enumerate(PROTOCOLS)}

    def rank(pair: tuple[str, str]) -> tuple[int, bool, bool]:
        protocol, metric = pair
        objects = progress.settings.get(protocol, {}).get("rows") == "objects"
        return order.get(protocol, len(order)), not pairs[pair].main, objects and "_masks" not in metric

    return sorted(pairs, key=rank)


def has_masks(progress: MeasuredRun) -> bool:
    """Return whether anything was measured with object masks, so that numbers without them must say so."""
    return any("masks" in name for p in progress.points for r in p.results.values() for name in r.metrics)


def chance(result: Result, metric: str, classes: int | None) -> float | None:
    """Return what guessing gives, in the metric's unit: noted by the protocol, or so many guesses of the
    classes.
    """
    about = result.metric(metric)
    if isinstance(about.chance, int):
        return min(100.0, 100.0 * about.chance / classes) if classes else None
    named = None if about.chance is None else about.chance.format(*(about.stars(metric) or ()))
    return None if named is None else result.metrics.get(named)


def number_of_rows(result: Result) -> str:
    """Say on what a result was measured: "200 test images", "412 test objects"."""
    facts = result.data.get("test")
    facts = facts if isinstance(facts, dict) else {}
    objects = result.settings.get("rows") == "objects" or ("objects" in facts and "rows" not in facts)
    what = "test objects" if objects else "test images"
    counts = [facts[name] for name in ("rows", "objects", "images") if isinstance(facts.get(name), int)]
    return f"{counts[0]:,} {what}" if counts else what


def descriptions(progress: MeasuredRun) -> list[tuple[str, str]]:
    """Return (protocol, metric) of the numbers that describe features, of which neither direction is
    better.
    """
    return [pair for pair, result in measured(progress).items() if result.metric(pair[1]).better == "neither"]


def number(point: MeasuredStep, protocol: str, metric: str) -> Number | None:
    result = point.results.get(protocol)
    return None if result is None else numbers(result).get(metric)


def changes(progress: MeasuredRun, after: str = END) -> list[MetricChange]:
    """Return the main metrics of what training began with and of the last encoder, or that with the label
    `after`; the main one first.
    """
    networks = progress.baseline, after
    first, last = map(progress.point, networks)
    if first is None or last is None:
        return []
    found, masks = [], has_masks(progress)
    for protocol, metric in main_metrics(progress):
        old, new = number(first, protocol, metric), number(last, protocol, metric)
        if old is not None and new is not None:
            a, b = first.results[protocol], last.results[protocol]
            more = difference(a, b, metric), chance(b, metric, progress.classes), number_of_rows(b)
            name = label(b, metric, masks)
            found.append(
                MetricChange(protocol, metric, b.metric(metric), old, new, name, *more, networks=networks)
            )
    return found


def in_short(found: Sequence[MetricChange]) -> tuple[str, str]:
    """Return (state, sentence) for the changes of a run: HELPED, WORSE or OPEN, as the first, the main one,
    is.
    """
    if not found:
        return "OPEN", "Whether training helped was not measured."
    main, *rest = found
    starts = {
        "better": ("HELPED", "Training helped"),
        "worse": ("WORSE", "Training made it worse"),
        "open": ("OPEN", "Too few images to tell whether training helped"),
    }
    state, start = starts[main.outcome]
    if main.difference is None and main.outcome == "open":
        start = "It cannot be told whether training helped"
    if main.unmoved:
        start = "Training changed nothing here"
    return state, f"{start}: {main.name} went {main.numbers()}; {main.certainty()}.{_others(rest)}"


def _others(rest: Sequence[MetricChange]) -> str:
    """What became of the other measurements, in a sentence."""
    if not rest:
        return ""
    words = {"better": "better", "worse": "worse", "open": "not clearly different"}
    told = [
        f"{sum(change.outcome == outcome for change in rest)} {word}"
        for outcome, word in words.items()
        if any(change.outcome == outcome for change in rest)
    ]
    return f" Of {len(rest)} other measurement{'s' * (len(rest) > 1)}: {', '.join(told)}."


@dataclass(frozen=True)
class OverSeeds:
    """One metric over runs that differ in their seed alone: mean and standard deviation of each number."""

    name: str
    about: Metric
    before: tuple[float, float]
    after: tuple[float, float]
    change: tuple[float, float]
    chance: float | None
    outcomes: tuple[Direction, ...]  # of each run

    def text(self, pair: tuple[float, float]) -> str:
        """Return a mean and its standard deviation."""
        digits = digits_of(self.about, *pair)
        return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"

    def sentence(self) -> str:
        before, after, change = (self.text(pair) for pair in (self.before, self.after, self.change))
        unit = f" {self.about.unit}" * bool(self.about.unit)
        guess = "" if self.chance is None else f" (chance {number_text(self.chance)}{unit})"
        return (
            f"Over {len(self.outcomes)} seeds {self.name} went from {before}{unit} to {after}{unit}{guess}, "
            f"a change of {change}{unit_suffix(self.about)}: mean ± standard deviation over the seeds."
        )

    @property
    def state(self) -> str:
        """HELPED or WORSE where every seed says so."""
        if set(self.outcomes) == {"better"}:
            return "HELPED"
        return "WORSE" if set(self.outcomes) == {"worse"} else "OPEN"


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return fmean(values), stdev(values)


def over_seeds(runs: Sequence[Sequence[MetricChange]]) -> list[OverSeeds]:
    """Return what all of several runs measured, in the order of the first; at least two runs."""
    tables = [{(change.protocol, change.metric): change for change in run} for run in runs]
    found = []
    for pair, first in tables[0].items() if len(tables) > 1 else ():
        if not all(pair in table for table in tables):
            continue
        each = [table[pair] for table in tables]
        before, after = [change.before.value for change in each], [change.after.value for change in each]
        gains = [b - a for a, b in zip(before, after, strict=True)]
        outcomes: tuple[Direction, ...] = tuple(change.outcome for change in each)
        found.append(
            OverSeeds(
                name=first.name,
                about=first.about,
                before=_spread(before),
                after=_spread(after),
                change=_spread(gains),
                chance=first.chance,
                outcomes=outcomes,
            )
        )
    return found


def measure_charts(names: Sequence[str], progresses: Sequence[MeasuredRun]) -> list[Chart]:
    """Return each main metric over the steps of every run, with its interval; other encoders as levels."""
    drawn, masks = [], any(map(has_masks, progresses))
    results = {pair: result for p in progresses for pair, result in measured(p).items()}
    for protocol, metric in dict.fromkeys(pair for p in progresses for pair in main_metrics(p)):
        lines, levels = [], {}
        for name, progress in zip(names, progresses, strict=True):
            found = [(point, number(point, protocol, metric)) for point in progress.points]
            known = [(point.step, n) for point, n in found if n is not None and point.step is not None]
            levels |= {point.label: n.value for point, n in found if n is not None and point.step is None}
            last = [point for point, n in found if n is not None][-1:]
            guess = chance(last[0].results[protocol], metric, progress.classes) if last else None
            levels |= {} if guess is None else {"chance": guess}
            steps, values = [float(step) for step, _ in known], [n.value for _, n in known]
            low = [n.value if n.low is None else n.low for _, n in known]
            high = [n.value if n.high is None else n.high for _, n in known]
            lines.append(Line(name, steps, values, low, high, marker="o"))
        result = results[protocol, metric]
        unit = result.metric(metric).unit
        drawn.append(Chart(label(result, metric, masks), lines, "step", unit, levels))
    return drawn
