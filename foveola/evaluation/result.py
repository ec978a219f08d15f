"""`Result`: what one evaluation found, as it is written to `results/<protocol>.json` and printed."""

import json
import platform
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

import foveola
from foveola import files
from foveola.config import UserError

ENDS = ("_low", "_high")  # of an interval
GROUPED = {"localisation": "maxboxacc_v2_"}  # printed with a line for each X of a metric of this name and X


def versions() -> dict[str, str]:
    """Of what numbers depend on."""
    return {
        "foveola": foveola.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Result:
    """What one evaluation found, with everything needed to repeat it. Shares are in percent."""

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
    written: str = field(default="", compare=False)  # where to, and what became of an earlier one; not saved

    def save(self, folder: str | Path) -> Path:
        """Write `folder/results/<protocol>.json`, replaced whole, and return its path."""
        path = Path(folder) / "results" / f"{self.protocol}.json"
        tree = {name: value for name, value in asdict(self).items() if name != "written"}
        return files.write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "Result":
        """The result that `save` wrote, without keys that a newer version adds.

        Raises UserError for a file that holds none.
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            known = {each.name: tree[each.name] for each in fields(cls) if each.name in tree}
            result = cls(**{**known, "notes": tuple(tree["notes"])})
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path} is no result of an evaluation: {error}") from error
        if odd := result._odd():
            raise UserError(f"{path} is no result of an evaluation: its {odd} is not what it should be")
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

    def table(self) -> str:
        """Aligned plain text: a line for each probe or metric with its interval, then notes."""
        grouped = self._probes()
        inside = {name for group in grouped for name in self.metrics if _belongs(name, group)}
        groups, columns = self._groups()
        inside |= {f"{column}_{group}{end}" for column in columns for group in groups for end in ("", *ENDS)}
        rest = {name: value for name, value in self.metrics.items() if name not in inside}
        shown = [n for n in rest if not (n.endswith(ENDS) and n.rpartition("_")[0] in rest)]
        wide = max(map(len, shown), default=0)
        lines = []
        for name in shown:
            interval = self._interval(name)
            digits = 0 if name.startswith("best_k") else 2
            lines.append(f"{name:<{wide}}  {rest[name]:8.{digits}f}" + (f"  {interval}" if interval else ""))
        head = f"{self.protocol}: {self._data_line()}, {self.seconds:.1f} s"
        notes = [f"note: {note}" for note in self.notes]
        tables = [*self._probe_lines(grouped), *self._group_lines(groups, columns)]
        written = [self.written] if self.written else []
        return "\n".join([head, *tables, *lines, *self._pass_lines(), *notes, *written])

    def _interval(self, name: str) -> str:
        low, high = (self.metrics.get(name + end) for end in ENDS)
        return "" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"

    def _groups(self) -> tuple[list[str], list[str]]:
        """What has a line of its own (the maps of localisation), and the metrics that each of them has."""
        first = GROUPED.get(self.protocol, "")
        whole = [name for name in self.metrics if not name.endswith(ENDS)] if first else []
        groups = [name.removeprefix(first) for name in whole if name.startswith(first)]
        end = f"_{groups[0]}" if groups else ""
        columns = [name.removesuffix(end) for name in whole if groups and name.endswith(end)]
        return groups, [c for c in columns if all(f"{c}_{group}" in self.metrics for group in groups)]

    def _group_lines(self, groups: list[str], columns: list[str]) -> list[str]:
        rows = [(self.protocol, *columns)] if groups else []
        for group in groups:
            names = [f"{column}_{group}" for column in columns]
            rows.append((group, *(f"{self.metrics[n]:.2f} {self._interval(n)}".rstrip() for n in names)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]

    def _probes(self) -> list[str]:
        """Names of the probes whose settings were chosen; and k-NN, where it stands among them."""
        if not self.chosen:
            return []
        names = [name.removeprefix("top1_")[: -len("_low")] for name in self.metrics if name.endswith("_low")]
        return [name for name in names if f"top1_{name}" in self.metrics]

    def _probe_lines(self, probes: list[str]) -> list[str]:
        rows = [
            ("probe", "top1", "95 % interval", "top5", "hold-out", "best on test", "parameters", "chosen")
        ]
        for name in probes if probes else ():
            cells = [
                "-" if value is None else f"{value:.2f}"
                for value in (
                    self.metrics.get(metric)
                    for metric in (
                        f"top1_{name}",
                        f"top5_{name}",
                        f"holdout_{name}",
                        f"top1_{name}_best_on_test",
                    )
                )
            ]
            settings = dict(self.chosen.get(name, {}))
            parameters = settings.pop("parameters", None)
            about = ", ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in settings.items()
            )
            count = "-" if parameters is None else f"{parameters:,}"
            top1, top5, held, best = cells
            rows.append((name, top1, self._interval(f"top1_{name}"), top5, held, best, count, about))
        if len(rows) == 1:
            return []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(
                f"{cell:<{w}}" if i in (0, 7) else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]

    def _pass_lines(self) -> list[str]:
        """Where the time of the feature passes went."""
        lines = []
        for which, facts in self.data.items():
            seconds = facts.get("pass_seconds") if isinstance(facts, dict) else None
            if seconds and (total := sum(seconds.values())):
                parts = ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in seconds.items())
                lines.append(f"pass over {which}: {facts['computed']} pictures in {total:.1f} s: {parts}")
        return lines

    def _data_line(self) -> str:
        sets = {
            which: facts for which, facts in self.data.items() if isinstance(facts, dict) and "name" in facts
        }
        return ", ".join(
            f"{which} {facts['name']} ({facts.get('rows', facts.get('objects'))} rows)"
            for which, facts in sets.items()
        )


def _belongs(metric: str, probe: str) -> bool:
    """Whether a metric stands in the line of a probe."""
    own = f"top1_{probe}"
    return metric in (
        own,
        f"{own}_low",
        f"{own}_high",
        f"{own}_best_on_test",
        f"top5_{probe}",
        f"holdout_{probe}",
    )
