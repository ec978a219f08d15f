"""Results of several encoders side by side, only where they were measured alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foveola.config import UserError, nearest
from foveola.evaluation.result import ENDS, Result

SPEED = {"batch_size", "workers"}  # settings that change how long it takes, not what comes out
# Only shares that are better when higher are marked: not chosen settings, chances, entropies, ranks of
# features (rankme_...), alignment or uniformity, of which one is bought with the other.
BETTER_HIGH = ("top1", "top5", "rank1", "recall", "miou", "holdout", "maxboxacc", "boxacc")


@dataclass(frozen=True)
class Comparison:
    """Results of one protocol for several encoders, measured on the same data with the same settings."""

    protocol: str
    names: tuple[str, ...]
    results: tuple[Result, ...]

    def table(self) -> str:
        """A line for each metric, a column for each encoder; intervals in brackets, the best marked `*`."""
        metrics = dict.fromkeys(name for result in self.results for name in result.metrics)
        shown = [m for m in metrics if not (m.endswith(ENDS) and m.rpartition("_")[0] in metrics)]
        rows = [(f"{self.protocol}", *self.names)]
        for metric in shown:
            values = [result.metrics.get(metric) for result in self.results]
            ranked = metric.startswith(BETTER_HIGH)
            best = max((v for v in values if v is not None), default=None) if ranked else None
            cells = [
                _cell(result, metric, value is not None and value == best and len(set(values)) > 1)
                for result, value in zip(self.results, values, strict=True)
            ]
            rows.append((metric, *cells))
        rows.append(("seconds", *(f"{result.seconds:.1f}" for result in self.results)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        notes = [
            f"note: {name}: {note}"
            for name, result in zip(self.names, self.results, strict=True)
            for note in result.notes
        ]
        return "\n".join([*lines, *self._versions(), *dict.fromkeys(notes)])

    def _versions(self) -> list[str]:
        first = self.results[0].versions
        other = {key for result in self.results for key in first if result.versions.get(key) != first[key]}
        return [f"note: measured with different versions of {', '.join(sorted(other))}"] if other else []


def _cell(result: Result, metric: str, best: bool) -> str:
    value = result.metrics.get(metric)
    if value is None:
        return "-"
    low, high = (result.metrics.get(metric + end) for end in ENDS)
    interval = ""
    if low is not None and high is not None:
        digits = 1 if high - low >= 0.5 or high == low else 2
        interval = f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.2f}{'*' if best else ''}{interval}"


def compare(places: Sequence[str | Path], protocol: str | None = None) -> list[Comparison]:
    """Comparisons of the protocols that all of `places` (run folders, `out=` folders, result files) share.

    Raises UserError for a place without results, no protocol in common (or not the one asked for), and for
    results of one protocol whose settings or data differ.
    """
    if len(places) < 2:
        raise UserError("compare needs two or more runs, or folders that hold results/")
    found = [_results(Path(place)) for place in places]
    names = _names([Path(place) for place in places])
    shared = [name for name in found[0] if all(name in each for each in found[1:])]
    if protocol is not None:
        every = {name for each in found for name in each}
        if protocol not in every:
            near = nearest(protocol, every)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(sorted(every))}"
            raise UserError(f"no results of {protocol!r}; {hint}")
        shared = [name for name in shared if name == protocol]
    if not shared:
        lists = "; ".join(f"{n}: {', '.join(sorted(each))}" for n, each in zip(names, found, strict=True))
        raise UserError(f"no protocol was measured for all of them ({lists})")
    comparisons = []
    for name in sorted(shared):
        results = tuple(each[name] for each in found)
        for other, label in zip(results[1:], names[1:], strict=True):
            if difference := differences(results[0], other):
                raise UserError(f"{name}: {names[0]} and {label} were not measured alike: {difference[0]}")
        comparisons.append(Comparison(name, tuple(names), results))
    return comparisons


def differences(a: Result, b: Result) -> list[str]:
    """What was not the same in two measurements, apart from the encoder; one line each."""
    found = []
    for key in sorted((a.settings.keys() | b.settings.keys()) - SPEED):
        left, right = a.settings.get(key, "absent"), b.settings.get(key, "absent")
        if left != right:
            found.append(f"{key} = {left} and {right}")
    for which in ("train", "test"):
        left, right = a.data.get(which), b.data.get(which)
        if not isinstance(left, dict) or not isinstance(right, dict):
            if left is not right and left != right:
                found.append(f"only one has {which} data")
            continue
        for key in ("fingerprint", "pictures", "rows", "objects", "unreadable"):
            if left.get(key) != right.get(key):
                named = f"{left.get('name')} and {right.get('name')}, " if key == "fingerprint" else ""
                found.append(f"{which} {key}: {named}{left.get(key)} and {right.get(key)}")
    return found


def _results(place: Path) -> dict[str, Result]:
    """All results of a folder by protocol, or the one of a file."""
    if place.is_file():
        result = Result.read(place)
        return {result.protocol: result}
    files = sorted((place / "results").glob("*.json")) or sorted(place.glob("*.json"))
    if place.name != "results" and not (place / "results").is_dir():
        files = []
    if not files:
        raise UserError(
            f"{place} holds no results/<protocol>.json: run foveola evaluate with out={place} first"
        )
    results = [Result.read(file) for file in files]
    return {result.protocol: result for result in results}


def _names(places: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for depth in range(1, 1 + max(len(place.resolve().parts) for place in places)):
        names = ["/".join(place.resolve().parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{places[0]} is given twice")
