"""Results of several encoders side by side, only where they were measured alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from foveola.config import UserError, nearest, path_hint
from foveola.evaluation.paired import difference
from foveola.evaluation.protocol import INTERVAL_ENDS
from foveola.evaluation.result import Result
from foveola.evaluation.stored import Stored, differences, results_of
from foveola.model_names import home_of, run_model, with_home
from foveola.outside import library


@dataclass(frozen=True)
class Comparison:
    """Results of one protocol for several encoders, measured on the same data with the same settings."""

    protocol: str
    names: tuple[str, ...]
    results: tuple[Result, ...]
    notes: tuple[str, ...] = ()  # which of several results these are
    test: str = ""  # the name of the test set, where the protocol was measured alike on several

    def table(self) -> str:
        """Return a line for each metric, a column for each encoder, then how each differs from the first.

        The best is marked `*` where its paired interval over every other encoder lies above 0; all intervals
        stand in brackets.
        """
        every = {name for result in self.results for name in result.metrics}
        ends = {name + end for name in every for end in INTERVAL_ENDS}
        metrics = dict.fromkeys(name for result in self.results for name in result.metrics)
        shown = [name for name in metrics if name not in ends]
        first, *others = self.names
        heads = ["second - first"] if len(others) == 1 else [f"{name} - {first}" for name in others]
        title = f"{self.protocol}, {self.test}" if self.test else self.protocol
        rows, alike = [(title, *self.names, *heads)], False
        for metric in shown:
            best = self._best(metric)
            cells = [_cell(result, metric, i == best) for i, result in enumerate(self.results)]
            changes = [difference(self.results[0], other, metric) for other in self.results[1:]]
            alike = alike or any(change is not None and change.alike for change in changes)
            digits = self.results[0].metric(metric).digits
            rows.append((metric, *cells, *("" if c is None else c.text(digits) for c in changes)))
        rows.append(("seconds", *(f"{result.seconds:.1f}" for result in self.results)))
        widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
        lines = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)).rstrip() for row in rows]
        notes = [
            f"note: {name}: {note}"
            for name, result in zip(self.names, self.results, strict=True)
            for note in result.notes
        ]
        remarks = [*self._marks(lines), *self._same(alike), *self._versions(), *self.notes]
        return "\n".join([*lines, *remarks, *dict.fromkeys(notes)])

    def frame(self) -> Any:
        """Return a pandas DataFrame with a line for each encoder and number. Raises UserError without pandas.

        Columns are `encoder`, those of `Result.frame`, and `difference`, `difference_low`, `difference_high`:
        how much higher it is than that of the first encoder, with the paired 95 % interval, where known.
        """
        found = []
        for name, result in zip(self.names, self.results, strict=True):
            for line in result.lines():
                first = result is self.results[0]
                change = None if first else difference(self.results[0], result, line["metric"])
                ends = (None,) * 3 if change is None else (change.value, change.low, change.high)
                columns = ("difference", "difference_low", "difference_high")
                found.append({"encoder": name, **line, **dict(zip(columns, ends, strict=True))})
        return library("pandas", "frames", "Comparison.frame()").DataFrame(found)

    def _best(self, metric: str) -> int | None:
        """The encoder that is the best beyond doubt, if there is one."""
        values = [result.metrics.get(metric) for result in self.results]
        known = [value for value in values if value is not None]
        about = self.results[0].metric(metric)
        if not about.compared or len(known) < 2:
            return None
        if any(result.metric(metric).better != about.better for result in self.results):
            return None
        best = values.index(max(known) if about.better == "higher" else min(known))
        over = [
            difference(result, self.results[best], metric)
            for i, result in enumerate(self.results)
            if i != best and values[i] is not None
        ]
        clear = (d is not None and (d.low > 0 if about.better == "higher" else d.high < 0) for d in over)
        return best if all(clear) else None

    def _marks(self, lines: Sequence[str]) -> list[str]:
        """What the marks say, or why there are none."""
        if any("*" in line for line in lines[1:]):
            lower = any(r.metric(name).better == "lower" for r in self.results for name in r.names())
            word = "better than" if lower else "above"
            return [f"note: * is {word} each other one by the paired 95 % interval over the same test images"]
        if any(not result.scores for result in self.results):
            return [
                "note: none is marked as the best: a result of an earlier version has no score of each "
                "image, nor has one of a protocol that gives none; without it no difference has an interval"
            ]
        return []

    def _same(self, alike: bool) -> list[str]:
        """What stands behind differences that are 0 in every row, and which encoders are one."""
        note = (
            "note: 0 [alike]: both have the same score in every row of the test data, from which no interval "
            "of their difference on other data follows"
        )
        prints = [result.encoder for result in self.results]
        twins = [
            f"note: {name} and {self.names[prints.index(one)]} are the same encoder ({one})"
            for name, one in zip(self.names, prints, strict=True)
            if self.names[prints.index(one)] != name
        ]
        return [*twins, *([note] if alike else [])]

    def _versions(self) -> list[str]:
        first = self.results[0].versions
        other = {key for result in self.results for key in first if result.versions.get(key) != first[key]}
        return [f"note: measured with different versions of {', '.join(sorted(other))}"] if other else []


def _cell(result: Result, metric: str, best: bool) -> str:
    value = result.metrics.get(metric)
    if value is None:
        return "-"
    interval, ends, digits = "", result.interval(metric), result.metric(metric).digits
    if ends is not None:
        low, high = ends
        wide = digits == 2 and (high - low >= 0.5 or high == low)  # more digits would say nothing
        interval = f" [{low:.{1 if wide else digits}f}, {high:.{1 if wide else digits}f}]"
    return f"{value:.{digits}f}{'*' if best else ''}{interval}"


def compare(runs: Sequence[str | Path], protocol: str | None = None) -> list[Comparison]:
    """Return comparisons of the protocols that all of `runs` share, of results that were measured alike.

    Each of `runs` is a run folder, an `out=` folder, a result file, `untrained:RUN` for what was measured of
    the untrained network of a run, or another of its networks: `RUN?step=400`, `RUN?which=student`.
    Where there are several results of a protocol, the newest that all have with the same settings and data
    are taken, and the notes say what else there is. Raises UserError for a run without results, no
    protocol in common (or not the one asked for), and a protocol of which no results were measured alike.
    """
    if len(runs) < 2:
        raise UserError("compare needs two or more runs, or folders that hold results/")
    runs = [with_home(run) for run in runs]
    every_file = [_results(run) for run in runs]
    names = _names(runs)
    found = [_by_protocol(stored) for stored, _ in every_file]
    shared = [name for name in found[0] if all(name in each for each in found[1:])]
    if protocol is not None:
        every = {name for each in found for name in each}
        if protocol not in every:
            near = nearest(protocol, every)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(sorted(every))}"
            raise UserError(f"no results of {protocol!r}; {hint}")
        shared = [name for name in shared if name == protocol]
    damaged = "".join(f"; {line}" for _, lines in every_file for line in lines)
    if not shared:
        lists = "; ".join(f"{n}: {', '.join(sorted(each))}" for n, each in zip(names, found, strict=True))
        raise UserError(f"no protocol was measured for all of them ({lists}){damaged}")
    broken = tuple(f"note: {line}" for _, lines in every_file for line in lines)
    comparisons = []
    for name in sorted(shared):
        alike = _by_test([each[name] for each in found], names)
        for results, notes in alike:
            test = _test_of(results[0])[1] if len(alike) > 1 else ""
            comparisons.append(Comparison(name, tuple(names), results, (*notes, *broken), test))
    return comparisons


def _by_test(
    lists: Sequence[Sequence[Stored]], names: Sequence[str]
) -> list[tuple[tuple[Result, ...], list[str]]]:
    """The results of each test set on which all runs were measured alike, the newest first.

    Raises UserError where there is none.
    """
    found = []
    for test in dict.fromkeys(_test_of(stored.result)[0] for stored in lists[0]):
        here = [[s for s in each if _test_of(s.result)[0] == test] for each in lists]
        if all(here) and _matches(here):
            found.append(_alike(here, names))
    return found or [_alike(lists, names)]


def _test_of(result: Result) -> tuple[str, str]:
    """What tells a test set from others, and its name."""
    test = result.data.get("test")
    test = test if isinstance(test, dict) else {}
    return str(test.get("fingerprint")), str(test.get("name"))


def _matches(lists: Sequence[Sequence[Stored]]) -> list[tuple[Stored, ...]]:
    """Results, one of each run, that were measured alike."""
    matches = []
    for first in lists[0]:
        others = [[s for s in each if not differences(first.result, s.result)] for each in lists[1:]]
        if all(others):
            matches.append((first, *(each[0] for each in others)))
    return matches


def _results(run: str | Path) -> tuple[list[Stored], list[str]]:
    """All results of a run, and what of it could not be read."""
    found, broken = results_of(run)
    path = Path(str(run).removeprefix("untrained:"))
    if not path.exists() and not run_model(path):
        raise UserError(f"no run, folder or result file {path}{path_hint(path)}")
    if not found:
        why = f" ({broken[0]})" if broken else ""
        model, out = (f"model={run}", "") if home_of(run) else ("model=...", f" out={run}")
        raise UserError(
            f"{run} holds no results/<protocol>.json{why}: run foveola evaluate PROTOCOL {model}{out} first"
        )
    return found, broken


def _alike(lists: Sequence[Sequence[Stored]], names: Sequence[str]) -> tuple[tuple[Result, ...], list[str]]:
    """One result of each run, all measured alike, and what to say where there was a choice.

    `lists` holds the results of one protocol for each run, newest first. Raises UserError where no choice
    is alike.
    """
    protocol, matches = lists[0][0].result.protocol, _matches(lists)
    if not matches:
        for other, label in zip(lists[1:], names[1:], strict=True):
            found = [differences(first.result, s.result) for first in lists[0] for s in other]
            if all(found):
                raise UserError(
                    f"{protocol}: {names[0]} and {label} were not measured alike: {min(found, key=len)[0]}"
                )
        raise UserError(f"{protocol}: no result was measured alike for {', '.join(names)}")
    chosen, notes = matches[0], []
    for other in matches[1:]:
        differs = differences(chosen[0].result, other[0].result)[0]
        notes.append(
            f"note: all have a second result of {protocol}, of {other[0].result.date[:10]} ({differs}); "
            f"to see it, name the files, such as {other[0].path}"
        )
    for name, picked, each in zip(names, chosen, lists, strict=True):
        if picked is not each[0]:
            differs = differences(picked.result, each[0].result)[0]
            notes.append(f"note: {name} has a newer result that others lack ({differs}): {each[0].path}")
    return tuple(stored.result for stored in chosen), notes


def _by_protocol(stored: Sequence[Stored]) -> dict[str, list[Stored]]:
    found: dict[str, list[Stored]] = {}
    for each in stored:
        found.setdefault(each.result.protocol, []).append(each)
    return found


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; `untrained:` stays in front."""
    heads = ["untrained:" * str(run).startswith("untrained:") for run in runs]
    paths = [Path(str(run).removeprefix(head)).resolve().parts for run, head in zip(runs, heads, strict=True)]
    for depth in range(1, 1 + max(map(len, paths))):
        names = [f"{head}{'/'.join(path[-depth:])}" for path, head in zip(paths, heads, strict=True)]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{runs[0]} is given twice")
