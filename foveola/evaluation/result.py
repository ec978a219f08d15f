"""`Result`: what one evaluation found, as it is written to `results/<protocol>.json` and printed."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import foveola
from foveola import files
from foveola.config import UserError, renewed
from foveola.evaluation.protocol import INTERVAL_ENDS, PROTOCOLS, Metric, declared, find_protocol
from foveola.outside import library


def versions() -> dict[str, str]:
    """Return the versions of everything that numbers depend on."""
    return {
        "foveola": foveola.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def documents_of(path: Path) -> Path:
    """Return the folder of what is kept beside a result: `results/detect/` of `results/detect.json`."""
    return path.with_suffix("")


@dataclass(frozen=True)
class Result:
    """What one evaluation found, with everything needed to repeat it. Fractions are in percent."""

    protocol: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    data: dict[str, Any]
    encoder: str
    versions: dict[str, str]
    date: str
    seconds: float
    notes: tuple[str, ...] = field(default=())
    chosen: dict[str, Any] = field(default_factory=dict)  # settings that were chosen from the grid
    grid: dict[str, Any] = field(default_factory=dict)  # every entry of the grid with its numbers
    scores: dict[str, Any] = field(default_factory=dict)  # of a metric that of each row, by `paired.packed`
    described: tuple[Metric, ...] = field(default=())  # what the metrics are, as the protocol declares them
    evaluation: str = ""  # the name of the evaluation of a run, where it was measured while that trained
    beside: dict[str, Any] = field(
        default_factory=dict, compare=False, repr=False
    )  # by file name, as of `Outcome`
    written: str = field(default="", compare=False)  # where to, and what became of an earlier one; not saved
    # Of further test sets that were measured in the same call; not saved, each has a file of its own.
    others: tuple["Result", ...] = field(default=(), compare=False)

    def save(self, folder: str | Path, end: str = "") -> Path:
        """Write `folder/results/<protocol><end>.json`, replaced whole, and return its path.

        What is kept `beside` is written to `folder/results/<protocol><end>/` first.
        """
        path = files.results_in(folder) / f"{self.protocol}{end}.json"
        for name, document in self.beside.items():
            if hasattr(document, "save"):
                document.save(documents_of(path) / name)
            else:
                files.write_text(documents_of(path) / name, json.dumps(document, allow_nan=False) + "\n")
        tree = asdict(replace(self, beside={}, others=()))
        tree = {name: value for name, value in tree.items() if name not in ("written", "beside", "others")}
        return files.write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "Result":
        """Return the result that `save` wrote, without keys that a newer version adds.

        Raises UserError for a file that holds none.
        """
        try:
            tree = renewed(json.loads(Path(path).read_text(encoding="utf-8")))
            known = {each.name: tree[each.name] for each in fields(cls) if each.name in tree}
            own = {each.name for each in fields(Metric)}
            described = tuple(
                Metric(**{name: value for name, value in each.items() if name in own})
                for each in known.get("described", ())
            )
            result = cls(**{**known, "notes": tuple(tree["notes"]), "described": described})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is no result of an evaluation: {error}") from error
        if odd := result._odd():
            raise UserError(f"{path} is no result of an evaluation: a wrong type of {odd}")
        return result

    def _odd(self) -> str:
        """The first part that is of another type than results have, or ""."""
        trees = ("settings", "metrics", "data", "versions", "chosen", "grid")
        found = [name for name in trees if not isinstance(getattr(self, name), dict)]
        found += [
            name for name in ("protocol", "encoder", "date") if not isinstance(getattr(self, name), str)
        ]
        numbers = [self.seconds, *(self.metrics.values() if isinstance(self.metrics, dict) else ())]
        if not all(isinstance(number, int | float) for number in numbers):
            found.append("metrics")
        return found[0] if found else ""

    @property
    def declarations(self) -> tuple[Metric, ...]:
        """What the protocol declares; of a result of a version that did not keep it, what it declares now."""
        known = self.protocol in PROTOCOLS and not self.described
        return find_protocol(self.protocol).metrics if known else self.described

    def metric(self, name: str) -> Metric:
        """Return what the number of this name is."""
        return declared(self.declarations, self.protocol, name)

    def names(self) -> list[str]:
        """Return the names of the numbers, without those that are the ends of intervals."""
        ends = {name + end for name in self.metrics for end in INTERVAL_ENDS}
        return [name for name in self.metrics if name not in ends]

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the 95 % interval of a number, where it has one."""
        low, high = (self.metrics.get(name + end) for end in INTERVAL_ENDS)
        return None if low is None or high is None else (low, high)

    def table(self) -> str:
        """Return aligned plain text: a line for each probe or metric with its interval, then notes."""
        cells = self._cells()
        inside = {name for row in cells.values() for name in row.values()}
        rest = [name for name in self.names() if name not in inside]
        wide = max(map(len, rest), default=0)
        lines = []
        for name in rest:
            digits, interval = self.metric(name).digits, self._interval(name)
            lines.append(
                f"{name:<{wide}}  {self.metrics[name]:8.{digits}f}" + (f"  {interval}" if interval else "")
            )
        head = f"{self.protocol}: {self._data_line()}, {self.seconds:.1f} s"
        notes = [f"note: {note}" for note in self.notes]
        written = [self.written] if self.written else []
        return "\n".join([head, *self._rows(cells), *lines, *self._pass_lines(), *notes, *written])

    def frame(self) -> Any:
        """Return a pandas DataFrame with a line for each number: `protocol`, `metric`, `value`, `low` and
        `high` (its 95 % interval, where it has one), `unit`, `better`. Raises UserError without pandas.
        """
        return library("pandas", "frames", "Result.frame()").DataFrame(self.lines())

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of `frame` as dicts."""
        found = []
        for name in self.names():
            low, high = self.interval(name) or (None, None)
            about = self.metric(name)
            found.append({"protocol": self.protocol, "metric": name, "value": self.metrics[name]})
            found[-1] |= {"low": low, "high": high, "unit": about.unit, "better": about.better}
        return found

    def _interval(self, name: str) -> str:
        ends = self.interval(name)
        digits = self.metric(name).digits
        return "" if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"

    def _cells(self) -> dict[str, dict[str, str]]:
        """The metrics of the table that has rows, by row and then by the heading of their column."""
        cells: dict[str, dict[str, str]] = {}
        for name in self.names():
            metric = self.metric(name)
            if metric.column:
                *before, row = metric.stars(name) or ("",)
                cells.setdefault(row, {})[metric.column.format(*before)] = name
        return cells

    def _rows(self, cells: dict[str, dict[str, str]]) -> list[str]:
        """Lines of that table; where rows are trained probes, with what was chosen for each of them."""
        trained = any("parameters" in self.chosen.get(row, {}) for row in cells)
        order = {metric.name: index for index, metric in enumerate(self.declarations)}
        there = {head: order[self.metric(name).name] for row in cells.values() for head, name in row.items()}
        columns = sorted(there, key=lambda head: there[head])
        if not trained:
            lines = [(self.protocol, *columns)] if cells else []
            for row, names in cells.items():
                texts = [self._cell(names.get(head)) for head in columns]
                own = [self._interval(names[head]) if head in names else "" for head in columns]
                lines.append((row, *(f"{t} {i}".rstrip() for t, i in zip(texts, own, strict=True))))
            return aligned(lines, set(range(1 + len(columns))))
        first, *others = [metric.column for metric in self.declarations if metric.column]
        lines = [("probe", first, "95 % interval", *others, "parameters", "chosen")]
        for row, names in cells.items():
            settings = dict(self.chosen.get(row, {}))
            count = settings.pop("parameters", None)
            about = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items())
            interval = self._interval(names[first]) if first in names else ""
            texts = [self._cell(names.get(head)) for head in others]
            parameters = "-" if count is None else f"{count:,}"
            lines.append((row, self._cell(names.get(first)), interval, *texts, parameters, ", ".join(about)))
        return aligned(lines, {0, len(lines[0]) - 1})

    def _cell(self, name: str | None) -> str:
        return "-" if name is None else f"{self.metrics[name]:.{self.metric(name).digits}f}"

    def _pass_lines(self) -> list[str]:
        """Where the time of the feature passes went."""
        lines = []
        for which, facts in self.data.items():
            seconds = facts.get("pass_seconds") if isinstance(facts, dict) else None
            if seconds and (total := sum(seconds.values())):
                parts = ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in seconds.items())
                lines.append(f"pass over {which}: {facts['computed']} images in {total:.1f} s: {parts}")
        return lines

    def _data_line(self) -> str:
        sets = {
            which: facts for which, facts in self.data.items() if isinstance(facts, dict) and "name" in facts
        }
        return ", ".join(
            f"{which} {facts['name']} ({facts.get('rows', facts.get('objects'))} rows)"
            for which, facts in sets.items()
        )


def aligned(lines: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    """Return cells in columns as wide as their widest one, on the left of these columns, on the right of
    others.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if index in left else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
