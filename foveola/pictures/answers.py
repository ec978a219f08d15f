"""From results to answers: what changed by training, whether the intervals say so, and charts over steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foveola.evaluation.compare import BETTER_HIGH
from foveola.evaluation.result import Result
from foveola.pictures.plots import Chart, Line
from foveola.pictures.progress import END, UNTRAINED, Point, Progress

Outcome = Literal["better", "worse", "open"]
FIRST = ("knn", "retrieval")  # protocols that are shown before others
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
    "mean_cosine": "Mean cosine of two pictures",
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

    def __str__(self) -> str:
        return shown(self.value)

    def with_interval(self) -> str:
        if self.low is None or self.high is None:
            return shown(self.value)
        return f"{shown(self.value)} [{shown(self.low)}, {shown(self.high)}]"


@dataclass(frozen=True)
class Change:
    """One metric before and after training."""

    protocol: str
    metric: str
    before: Number
    after: Number

    @property
    def name(self) -> str:
        return label(self.protocol, self.metric)

    @property
    def outcome(self) -> Outcome:
        """Better or worse only where the intervals do not overlap."""
        return compared(self.before, self.after)

    def sentence(self) -> str:
        before, after = self.before.with_interval(), self.after.with_interval()
        text = f"{self.name}: {before} % untrained, {after} % after training."
        ends = {
            "better": "The intervals do not overlap: training helped.",
            "worse": "The intervals do not overlap: training made it worse.",
            "open": "The intervals overlap: this measurement cannot tell them apart.",
        }
        return f"{text} {ends[self.outcome]}"


def compared(before: Number, after: Number) -> Outcome:
    """Whether `after` is better (higher) or worse; open where the intervals overlap or there are none."""
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return "open"
    return "better" if after.low > before.high else "worse" if after.high < before.low else "open"


def shown(value: float) -> str:
    """A number with as many digits as it deserves."""
    size = abs(value)
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 or value == 0 else f"{value:.2g}"


def label(protocol: str, metric: str) -> str:
    """A metric in words: "k-NN top-1 (object masks)"."""
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
        found[name] = Number(value, result.metrics.get(f"{name}_low"), result.metrics.get(f"{name}_high"))
    return found


def main_metrics(progress: Progress) -> list[tuple[str, str]]:
    """(protocol, metric) of what has an interval and is better when higher, k-NN first."""
    pairs = [
        (protocol, name)
        for point in progress.points
        for protocol, result in point.results.items()
        for name, number in numbers(result).items()
        if number.low is not None and name.startswith(BETTER_HIGH)
    ]
    order = {name: place for place, name in enumerate(FIRST)}
    return sorted(dict.fromkeys(pairs), key=lambda pair: order.get(pair[0], len(order)))


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
    """The main metrics of the untrained and the last encoder."""
    first, last = progress.point(UNTRAINED), progress.point(END)
    if first is None or last is None:
        return []
    found = []
    for protocol, metric in main_metrics(progress):
        before, after = number(first, protocol, metric), number(last, protocol, metric)
        if before is not None and after is not None:
            found.append(Change(protocol, metric, before, after))
    return found


def summary(found: Sequence[Change]) -> tuple[str, str]:
    """(state, sentence) for all changes of a run: HELPED, WORSE, MIXED or OPEN."""
    if not found:
        return "OPEN", "Whether training helped was not measured."
    better = [change for change in found if change.outcome == "better"]
    worse = [change for change in found if change.outcome == "worse"]
    if not better and not worse:
        what = found[0]
        rest = "" if len(found) == 1 else f", as in all {len(found)} measurements"
        return "OPEN", (
            f"Training made no difference that could be measured: {_from_to(what)}, and the intervals "
            f"overlap{rest}."
        )
    if worse and better:
        return "MIXED", (
            f"Training helped in {len(better)} of {len(found)} measurements ({_from_to(better[0])}) and hurt "
            f"in {len(worse)} ({_from_to(worse[0])})."
        )
    count = f"in {len(better or worse)} of {len(found)} measurements" if len(found) > 1 else ""
    if worse:
        return "WORSE", f"Training made it worse{' ' * bool(count)}{count}: {_from_to(worse[0])}."
    return "HELPED", f"Training helped{' ' * bool(count)}{count}: {_from_to(better[0])}."


def _from_to(change: Change) -> str:
    verb = "rose" if change.after.value > change.before.value else "went"
    return f"{change.name} {verb} from {change.before} % to {change.after} %"


def charts(names: Sequence[str], progresses: Sequence[Progress]) -> list[Chart]:
    """Each main metric over the steps of every run, with its interval; other encoders as levels."""
    drawn = []
    for protocol, metric in dict.fromkeys(pair for p in progresses for pair in main_metrics(p)):
        lines, levels = [], {}
        for name, progress in zip(names, progresses, strict=True):
            found = [(point, number(point, protocol, metric)) for point in progress.points]
            known = [(point.step, n) for point, n in found if n is not None and point.step is not None]
            levels |= {point.label: n.value for point, n in found if n is not None and point.step is None}
            steps, values = [float(step) for step, _ in known], [n.value for _, n in known]
            low = [n.value if n.low is None else n.low for _, n in known]
            high = [n.value if n.high is None else n.high for _, n in known]
            lines.append(Line(name, steps, values, low, high, marker="o"))
        drawn.append(Chart(label(protocol, metric), lines, "step", "%", levels))
    return drawn
