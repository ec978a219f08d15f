"""What a run folder holds, read without the training code: also of old, unfinished and resumed runs."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foveola.config import ConfigError, UserError, path_hint, read_yaml, renewed
from foveola.files import FIXED_TARGETS, STEP, WHOLE_STEPS, RunFolder
from foveola.schedules import steps_of

LoggedStep = dict[str, float | None]  # the metrics of one step by name; None: was not finite
FIGURE = re.compile(r"(?P<name>.+)-(?P<step>\d+)\.png", re.ASCII)
IMAGES = re.compile(r": \d+ steps of \d+ images, out of (\d+)$")  # as a run notes it at its start
TARGETS = re.compile(r" prototypes of targets: (.+)$")  # as a run notes it at its start
TERM_NAMES = (
    "token",
    "image",
    "patch",
    "position",
)  # of a distillation method, whose older logs do not say it


@dataclass(frozen=True, eq=False)
class Record:
    """One run: `config` is the tree of config.yaml, `lines` its metrics by rising step, `notes` log.txt."""

    folder: Path
    name: str  # tells it apart from the other runs of a report
    config: dict[str, Any]
    lines: list[LoggedStep]
    notes: list[str]

    def get(self, path: str, default: Any = None) -> Any:
        """Return a setting by its dotted path; `default` where this run has none."""
        return setting(self.config, path, default)

    @cached_property
    def step(self) -> int:
        """Steps done, as far as they were logged."""
        return int(self.lines[-1]["step"] or 0) if self.lines else 0

    @cached_property
    def encoder_step(self) -> int:
        """Steps behind `encoder/`: those of the newest checkpoint; as far as logged where there is none."""
        found = (STEP.fullmatch(path.name) for path in RunFolder(self.folder).checkpoints.glob("step-*"))
        return max((int(match[1]) for match in found if match), default=self.step)

    @cached_property
    def steps_per_epoch(self) -> int | None:
        pairs = [(line["step"], line.get("epoch")) for line in self.lines]
        return next((round(step / epoch) for step, epoch in reversed(pairs) if step and epoch), None)

    @cached_property
    def images(self) -> tuple[int | None, int | None]:
        """The fewest and the most images that the run may have been trained on; both None where not known.

        The log names the number. In older logs it follows from the steps of an epoch, which leaves out what
        fills no batch.
        """
        found = [IMAGES.search(note) for note in self.notes]
        named = next((int(match[1]) for match in reversed(found) if match), None)
        if named is not None:
            return named, named
        batch = self.get("batch_size")
        if not self.steps_per_epoch or not isinstance(batch, int):
            return None, None
        return self.steps_per_epoch * batch, (self.steps_per_epoch + 1) * batch - 1

    @property
    def image_count(self) -> int | None:
        """How many images the run was trained on, where that is known exactly."""
        low, high = self.images
        return low if low == high else None

    @cached_property
    def total_steps(self) -> int | None:
        """The length of the run; None where it is in epochs and no step was logged."""
        try:
            return steps_of(
                self.get("duration", ""),
                total_steps=None,
                steps_per_epoch=self.steps_per_epoch or 0,
                batch_size=int(self.get("batch_size", 0)) or 1,
            ) or None  # fmt: skip
        except ConfigError:
            return None

    @property
    def method(self) -> str:
        """The name of the method, as the recipe has it."""
        return str(self.get("about.method") or self.get("method.name") or "unknown method")

    @property
    def fixed_targets(self) -> bool:
        """Whether what the method predicts never moves: the log says so, and for MAE older logs do not."""
        return self.get("method.name") == "mae" or any(note.endswith(FIXED_TARGETS) for note in self.notes)

    @property
    def whole_steps(self) -> bool:
        """Whether what was logged is of all images of a step, as the log says; older ones do not."""
        return any(note.endswith(WHOLE_STEPS) for note in self.notes)

    @property
    def has_encoder(self) -> bool:
        return RunFolder(self.folder).encoder.is_whole()

    @property
    def start(self) -> Path | None:
        """The folder of the encoder with the starting weights; None for a run from scratch."""
        kept = RunFolder(self.folder).saved_encoder(0)
        return kept.path if kept.is_whole() else None

    @property
    def best(self) -> tuple[int, Path] | None:
        """The step and the folder of the encoder that was measured as the best, where the run kept one."""
        kept = RunFolder(self.folder).best
        return None if kept.step is None else (kept.step, kept.path)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, folder) of the encoders that were kept after steps on the way, by rising step."""
        kept = RunFolder(self.folder).saved_encoders()
        return [(step, folder.path) for step, folder in kept if step]

    def figures(self) -> dict[str, Path]:
        """Return the newest of the figures that training drew, by name."""
        drawn = RunFolder(self.folder).figures.glob("*-*.png")
        found = [(FIGURE.fullmatch(path.name), path) for path in drawn]
        numbered = [(match["name"], int(match["step"]), path) for match, path in found if match]
        return {name: path for name, _, path in sorted(numbered)}

    def prototypes(self) -> dict[str, int]:
        """Return prototypes of each kind of targets, by its name in the metrics ("token", "clustering").

        The log names them, of any method. In older logs they follow from the configuration.
        """
        for match in filter(None, map(TARGETS.search, reversed(self.notes))):
            pairs = (text.rpartition(" ") for text in match[1].split(", "))
            return {name: int(count) for name, _, count in pairs if count.isdecimal()}
        counts = {}
        for term in TERM_NAMES:
            head = self.get(f"method.{term}.head")
            count = None if head is None else self.get(f"method.heads.{head}.prototypes")
            if isinstance(count, int):
                counts[term] = count
        clusters = self.get("method.clustering.prototypes")
        return counts | ({"clustering": clusters} if isinstance(clusters, int) else {})


def setting(tree: Any, path: str, default: Any = None) -> Any:
    """Return a value in a tree of dicts by its dotted path."""
    for part in path.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree


def read_runs(folders: Sequence[str | Path]) -> list[Record]:
    """Return records of run folders. Raises UserError for what is none, damaged files, and one given
    twice.
    """
    if not folders:
        raise UserError("report needs a run folder, such as runs/demo/seed-0")
    paths = [Path(folder).expanduser() for folder in folders]
    for path in paths:
        if not RunFolder(path).is_run():
            what = "lacks config.yaml" if path.is_dir() else f"does not exist{path_hint(path)}"
            raise UserError(f"{path} is no run folder: it {what}")
    return [
        Record(path, name, renewed(read_yaml(RunFolder(path).config)), _lines(path), _notes(path))
        for path, name in zip(paths, _names(paths), strict=True)
    ]


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, 1 + max(map(len, parts))):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{next(p for p in paths if parts.count(p.resolve().parts) > 1)} is given twice")


def _lines(folder: Path) -> list[LoggedStep]:
    """The numbers among the metrics, by rising step."""
    run = RunFolder(folder)

    def say(number: int) -> None:
        print(f"report: {run.metrics}, line {number}: no metrics, left out", file=sys.stderr, flush=True)

    return [
        {name: value for name, value in line.items() if value is None or _is_number(value)}
        for line in run.read_metrics(say)
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _notes(folder: Path) -> list[str]:
    path = RunFolder(folder).log
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
