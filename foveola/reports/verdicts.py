"""From results to answers: what changed by training, whether the intervals say so, and charts over steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from foveola.drawing.plots import Chart, Line
from foveola.evaluation.compare import BETTER_HIGH
from foveola.evaluation.paired import Difference, difference
from foveola.evaluation.result import Result
from foveola.reports.progress import END, UNTRAINED, Point, Progress

Outcome = Literal["better", "worse", "open"]
# Protocols in the order in which they count: the first that was measured is the main one. Labels of people
# come before what needs none, and what is not trained before what is.
ORDER = (
    "knn",
    "logistic",
    "linear",
    "attentive",
    "abmilp",
    "probes",
    "knn_segmentation",
    "logistic_segmentation",
    "linear_segmentation",
    "dense_retrieval",
    "localisation",
    "retrieval",
    "label_free",
)
PROTOCOL = {
    "knn": "k-NN",
    "retrieval": "same-object retrieval",
    "label_free": "label-free",
    "linear": "linear probe",
    "logistic": "logistic regression",
    "attentive": "attentive probe",
    "knn_segmentation": "k-NN segmentation",
}
WORDS = {"top1": "top-1", "top5": "top-5", "rank1": "rank-1", "miou": "mIoU"}
KINDS = {"masks": "object masks", "plain": "whole picture"}
LABEL_FREE = {
    "rank1_views": "picture found again in another crop and colours",
    "rank1_objects_plain": "object found again in another crop (whole picture)",
    "rank1_objects_masks": "object found again in another crop (object masks)",
    "rankme_picture": "Effective rank of pictures (RankMe)",
    "rankme_average": "Effective rank of mean patches (RankMe)",
    "rankme_patches": "Effective rank of all patches (RankMe)",
    "rankme_within": "Effective rank of the patches of one picture (RankMe)",
    "first_component_picture": "Variance of pictures in one direction, %",
    "first_component_patches": "Variance of patches in one direction, %",
    "spread": "Spread of pictures: 0 one point, 1 all directions",
    "mean_cosine": "Mean cosine of the encoder's features of two test images",
    "duplicates": "Pictures that another one equals, %",
    "alignment": "Distance of two views of a picture (alignment)",
    "uniformity": "Uniformity: lower is more even",
}


@dataclass(frozen=True)
class Number:
    """A metric with its 95 % interval, where it has one."""

    value: float
    low: float | None
    high: float | None

    whole: bool = False  # a count

    def __str__(self) -> str:
        return f"{self.value:.0f}" if self.whole else shown(self.value)


@dataclass(frozen=True)
class Change:
    """One metric before and after training."""

    protocol: str
    metric: str
    before: Number
    after: Number
    name: str
    difference: Difference | None = None  # on the same test rows
    chance: float | None = None
    rows: str = "test images"  # what it was measured on, such as "200 test images"

    @property
    def outcome(self) -> Outcome:
        """By the paired interval; without one, better or worse only where the intervals do not overlap."""
        if self.difference is None:
            return compared(self.before, self.after)
        return "open" if not self.difference.clear else "better" if self.difference.value > 0 else "worse"

    def numbers(self) -> str:
        """As in: from 27.5 % untrained to 21.0 % after training (chance 10.0 %)."""
        guess = "" if self.chance is None else f" (chance {shown(self.chance)} %)"
        return f"from {self.before} % untrained to {self.after} % after training{guess}"

    def told(self) -> str:
        """How sure the change is, as a part of a sentence."""
        if self.difference is None:
            if self.outcome == "open":
                return "the intervals overlap, and these results hold no scores of images to tell more"
            return "the intervals do not overlap"
        value, low, high = (
            f"{x:+.1f}" for x in (self.difference.value, self.difference.low, self.difference.high)
        )
        change = f"the change on the same {self.rows} is {value} points, 95 % interval {low} to {high}"
        if self.outcome != "open":
            return change
        width = (self.difference.high - self.difference.low) / 2
        return f"{change}: too few to tell changes below about {width:.1f} points"

    def sentence(self) -> str:
        ends = {"better": ": training helped", "worse": ": training made it worse", "open": ""}
        return f"{self.name} went {self.numbers()}; {self.told()}{ends[self.outcome]}."


def compared(before: Number, after: Number) -> Outcome:
    """Whether `after` is better (higher) or worse; open where the intervals overlap or there are none."""
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return "open"
    return "better" if after.low > before.high else "worse" if after.high < before.low else "open"


def shown(value: float) -> str:
    """A number with as many digits as it deserves."""
    size = abs(value)
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 or value == 0 else f"{value:.2g}"


def label(protocol: str, metric: str, masks: bool = True) -> str:
    """A metric in words: "k-NN top-1 (object masks)"; without `masks` nobody asks whether masks were used."""
    metric = metric if masks else metric.removesuffix("_plain").replace("_plain_", "_")
    if protocol == "label_free" and metric in LABEL_FREE:
        return LABEL_FREE[metric]
    first, *rest = [KINDS.get(word, WORDS.get(word, word)) for word in metric.split("_")]
    if first.startswith("recall") and first != "recall":
        first = f"recall@{first.removeprefix('recall')}"
    name = PROTOCOL.get(protocol, protocol.replace("_", " "))
    if metric.startswith(BETTER_HIGH):
        return f"{name} {first}" + (f" ({' '.join(rest)})" if rest else "")
    return f"{name}: {' '.join([first, *rest])}"


def numbers(result: Result) -> dict[str, Number]:
    """The metrics of a result with their intervals, in its order; the ends of intervals are no metrics."""
    found = {}
    for name, value in result.metrics.items():
        if name.endswith(("_low", "_high")) and name.rpartition("_")[0] in result.metrics:
            continue
        ends = result.metrics.get(f"{name}_low"), result.metrics.get(f"{name}_high")
        found[name] = Number(value, *ends, whole=name.startswith("best_k"))
    return found


def main_metrics(progress: Progress) -> list[tuple[str, str]]:
    """(protocol, metric) of what has an interval and is better when higher; the main one first.

    By ORDER; of one protocol, object masks come first where its rows are objects.
    """
    pairs = [
        (protocol, name)
        for point in progress.points
        for protocol, result in point.results.items()
        for name, number in numbers(result).items()
        if number.low is not None and name.startswith(BETTER_HIGH)
    ]

    def place(pair: tuple[str, str]) -> tuple[int, bool]:
        protocol, metric = pair
        objects = progress.settings.get(protocol, {}).get("rows") == "objects"
        return ORDER.index(protocol) if protocol in ORDER else len(ORDER), objects and "_masks" not in metric

    return sorted(dict.fromkeys(pairs), key=place)


def has_masks(progress: Progress) -> bool:
    """Whether anything was measured with object masks, so that numbers without them must say so."""
    return any("masks" in name for p in progress.points for r in p.results.values() for name in r.metrics)


def chance(result: Result, metric: str, classes: int | None) -> float | None:
    """What guessing gives, in percent: noted by the protocol, or k of the classes for a top-k accuracy."""
    word = metric.partition("_")[0]
    for name in (f"chance_{metric}", f"chance_{word}"):
        if name in result.metrics:
            return result.metrics[name]
    return min(100.0, 100.0 * int(word[3:]) / classes) if word in ("top1", "top5") and classes else None


def rows_of(result: Result) -> str:
    """On what a result was measured: "200 test images", "412 test objects"."""
    facts = result.data.get("test")
    facts = facts if isinstance(facts, dict) else {}
    objects = result.settings.get("rows") == "objects" or result.protocol == "retrieval"
    what = "test objects" if objects else "test images"
    counts = [facts[name] for name in ("rows", "objects", "pictures") if isinstance(facts.get(name), int)]
    return f"{counts[0]:,} {what}" if counts else what


def descriptions(progress: Progress) -> list[tuple[str, str]]:
    """(protocol, metric) of the label-free numbers of which neither direction is better as such."""
    found = [name for point in progress.points if "label_free" in point.results
             for name in numbers(point.results["label_free"])]  # fmt: skip
    return [
        ("label_free", n) for n in dict.fromkeys(found) if n in LABEL_FREE and not n.startswith(BETTER_HIGH)
    ]


def number(point: Point, protocol: str, metric: str) -> Number | None:
    result = point.results.get(protocol)
    return None if result is None else numbers(result).get(metric)


def changes(progress: Progress) -> list[Change]:
    """The main metrics of the untrained and the last encoder, the main one first."""
    first, last = progress.point(UNTRAINED), progress.point(END)
    if first is None or last is None:
        return []
    found, masks = [], has_masks(progress)
    for protocol, metric in main_metrics(progress):
        before, after = number(first, protocol, metric), number(last, protocol, metric)
        if before is not None and after is not None:
            a, b = first.results[protocol], last.results[protocol]
            more = difference(a, b, metric), chance(b, metric, progress.classes), rows_of(b)
            found.append(Change(protocol, metric, before, after, label(protocol, metric, masks), *more))
    return found


def summary(found: Sequence[Change]) -> tuple[str, str]:
    """(state, sentence) for the changes of a run: HELPED, WORSE or OPEN, as the first, the main one, is."""
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
    return state, f"{start}: {main.name} went {main.numbers()}; {main.told()}.{_others(rest)}"


def _others(rest: Sequence[Change]) -> str:
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
    before: tuple[float, float]
    after: tuple[float, float]
    change: tuple[float, float]
    chance: float | None
    outcomes: tuple[Outcome, ...]  # of each run

    def sentence(self) -> str:
        before, after, change = (
            f"{mean:.1f} ± {sd:.1f}" for mean, sd in (self.before, self.after, self.change)
        )
        guess = "" if self.chance is None else f" (chance {shown(self.chance)} %)"
        return (
            f"Over {len(self.outcomes)} seeds {self.name} went from {before} % to {after} %{guess}, a change "
            f"of {change} points: mean ± standard deviation over the seeds."
        )

    @property
    def state(self) -> str:
        """HELPED or WORSE where every seed says so."""
        if set(self.outcomes) == {"better"}:
            return "HELPED"
        return "WORSE" if set(self.outcomes) == {"worse"} else "OPEN"


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return fmean(values), stdev(values)


def over_seeds(runs: Sequence[Sequence[Change]]) -> list[OverSeeds]:
    """What all of several runs measured, in the order of the first; at least two runs."""
    tables = [{(change.protocol, change.metric): change for change in run} for run in runs]
    found = []
    for pair, first in tables[0].items() if len(tables) > 1 else ():
        if not all(pair in table for table in tables):
            continue
        each = [table[pair] for table in tables]
        before, after = [change.before.value for change in each], [change.after.value for change in each]
        gains = [b - a for a, b in zip(before, after, strict=True)]
        outcomes: tuple[Outcome, ...] = tuple(change.outcome for change in each)
        found.append(
            OverSeeds(
                name=first.name,
                before=_spread(before),
                after=_spread(after),
                change=_spread(gains),
                chance=first.chance,
                outcomes=outcomes,
            )
        )
    return found


def charts(names: Sequence[str], progresses: Sequence[Progress]) -> list[Chart]:
    """Each main metric over the steps of every run, with its interval; other encoders as levels."""
    drawn, masks = [], any(map(has_masks, progresses))
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
        drawn.append(Chart(label(protocol, metric, masks), lines, "step", "%", levels))
    return drawn
