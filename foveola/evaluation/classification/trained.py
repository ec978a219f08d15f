"""Protocols of trained probes: a grid is trained, one is chosen on the hold-out and scored on test."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from operator import or_
from statistics import fmean, stdev
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveola.config import ConfigError, build, key, to_dict
from foveola.evaluation.classification.saved import PROBE, SavedProbe
from foveola.evaluation.classification.task import Exam, ProbeConfig, Task, open_exam, open_task
from foveola.evaluation.classification.training import (
    ChosenProbes,
    Columns,
    ProbeGrid,
    ProbePlan,
    probes_of,
    train_plans,
)
from foveola.evaluation.features.need import Need
from foveola.evaluation.metrics import SCORING, GroundTruth, Judged, interval, judged, percent
from foveola.evaluation.paired import packed
from foveola.evaluation.protocol import INTERVAL_ENDS, At, Metric, Needs, Outcome, Protocol, Reading
from foveola.models.encoder import Encoder

# Settings that may be given with a probe that is trained already: how the test images are read.
FREE_WITH_PROBE = ("probe", "batch_size", "workers", "limit", "precision", "store")


@dataclass(frozen=True)
class TrainedConfig(ProbeConfig):
    """Settings of protocols whose probes can be kept."""

    probe: str | None = key(
        None, "a file that an earlier evaluation wrote: score its probes, without training and without train="
    )
    seeds: int = key(
        1,
        "trainings on the same images, of seed, seed + 1, ...: numbers are their means, _std their "
        "standard deviation",
        at_least=1,
    )
    block: int = key(-1, "block whose tokens are read, through the final norm; negative counts from the last")


@dataclass
class Prepared:
    """A grid of probes, and once it is trained what was chosen."""

    protocol: "TrainedProbe"
    config: Any
    seed: int  # of the split, of the start of the probes, and of the order of the batches
    wanted: Need
    task: Task
    plan: ProbePlan
    choice: ChosenProbes | None = None
    first: Any = None  # the test set of `task`

    def outcome(self, at: At) -> Outcome:
        """Return what the chosen probes score on the test set of `at`."""
        task, config, grids = self.task, self.config, self.plan.grids
        if self.choice is None:
            self.choice = choose(grids, task, self.wanted)
            largest = max(len(probes_of(grids, group)) for group in self.choice.probes)
            task.notes.extend(notes_of_choice(task, largest))
            self.first = at.test
        exam = task.exam if at.test is self.first else open_exam(at, config, self.wanted, task.known)
        outcome = self.protocol.score(grids, self.choice, exam, self.wanted, self.seed)
        return replace(outcome, data=task.facts(exam), notes=(*task.notes, *exam.notes))


class TrainedProbe(Protocol):
    """A protocol that trains a grid of probes, chooses among them on the hold-out, and scores on `test`.

    What a protocol says of its own is which features it reads (`wanted`), how many probes there are to choose
    among (`candidates`), and how they are made and trained (`plan`).
    """

    train = "needed"
    grids: ClassVar[tuple[Any, ...]]  # the classes of its grids

    @abstractmethod
    def wanted(self, config: Any, encoder: Encoder) -> Need:
        """Return what of an image its probes read."""

    @abstractmethod
    def candidates(self, config: Any, encoder: Encoder) -> int:
        """Return the number of probes in each group, among which the hold-out chooses."""

    @abstractmethod
    def plan(self, config: Any, encoder: Encoder, task: Task) -> ProbePlan:
        """Return the probes and how they are trained; the task gets notes on it."""

    def needs(self, config: Any, encoder: Encoder) -> Needs:
        """Return the needs of trained probes; of those that are trained already, what of test images."""
        if config.probe:
            own, _ = self._loaded(config, encoder)
            return Needs((), (Reading(self.read(own, encoder)),))
        return probe_needs(self.read(config, encoder), config)

    def read(self, config: Any, encoder: Encoder) -> Need:
        """Return `wanted` of images of the size, and of the block, that are asked for."""
        return self.wanted(config, encoder).at(encoder, config.image_size, config.block)

    def train_for(self, config: Any) -> Literal["needed", "optional", "unused"]:
        """Return that training data are needed, unless the probes are trained already."""
        return "unused" if config.probe else "needed"

    def measure(self, at: At, config: Any) -> Outcome:
        """Train all probes of the grid on the same batches, choose on the hold-out, score on `test`."""
        return self.measure_all([at], config)[0]

    def measure_all(self, every: Sequence[At], config: Any) -> list[Outcome]:
        """Return the same for several test sets; the probes are trained once."""
        if config.probe:
            return [self._scored_again(at, config) for at in every]
        first, saved = every[0], None
        runs: list[list[Outcome]] = []
        for seed in range(config.seed, config.seed + config.seeds):
            prepared = self.prepare(first, config, seed)
            train_together([prepared], first.progress)
            runs.append([prepared.outcome(at) for at in every])
            saved = saved or self._saved(prepared, runs[0][0], first.encoder)
        outcomes = [means_over_seeds(of_test, config.seed) for of_test in zip(*runs, strict=True)]
        return [replace(outcomes[0], beside={PROBE: saved}), *outcomes[1:]]

    def prepare(self, at: At, config: Any, seed: int | None = None) -> Prepared:
        """Return the grid, untrained; `seed` is that of the training, in place of that of the settings."""
        used: int = config.seed if seed is None else seed
        wanted = self.read(config, at.encoder)
        task = open_task(at, config, wanted, self.candidates(config, at.encoder), used)
        plan = self.plan(replace(config, seed=used), at.encoder, task)
        return Prepared(self, config, used, wanted, task, plan)

    def _saved(self, prepared: Prepared, outcome: Outcome, encoder: Encoder) -> SavedProbe:
        """The chosen probes of one training, to be kept."""
        task, choice = prepared.task, prepared.choice
        assert choice is not None
        about = {
            "protocol": self.name,
            "settings": to_dict(replace(prepared.config, seeds=1)),
            "encoder": encoder.fingerprint(),
            "known": asdict(task.known),
            "data": {name: facts for name, facts in outcome.data.items() if name != "test"},
            "notes": task.notes,
        }
        return SavedProbe.of(prepared.plan.grids, choice, outcome, about)

    def _loaded(self, config: Any, encoder: Encoder) -> tuple[Any, SavedProbe]:
        """The settings with which the probes of a file were trained, and the file's contents."""
        usual = type(config)()
        for each in fields(config):
            if each.name not in FREE_WITH_PROBE and getattr(config, each.name) != getattr(usual, each.name):
                raise ConfigError(
                    f"{each.name}: probe={config.probe} is trained already, so it has no effect; leave it out"
                )
        saved = SavedProbe.load(config.probe)
        saved.fits(encoder, self.name, config.probe)
        given = {name: getattr(config, name) for name in FREE_WITH_PROBE if name != "probe"}
        return build(type(config), saved.about["settings"] | given), saved

    def _scored_again(self, at: At, config: Any) -> Outcome:
        """What the probes of a file score: the result is that of the evaluation which trained them."""
        own, saved = self._loaded(config, at.encoder)
        wanted = self.read(own, at.encoder)
        exam = open_exam(at, own, wanted, saved.known)
        grids, choice = saved.grids(self.grids, at.encoder.device)
        outcome = saved.completed(self.score(grids, choice, exam, wanted, own.seed))
        data = {**saved.about["data"], "test": exam.test.facts}
        data["split"] = {**data["split"], "scored": len(exam.score)}
        notes = (*saved.about["notes"], *exam.notes)
        return replace(outcome, data=data, notes=notes, settings=to_dict(own), grid={})

    def score(
        self, grids: Sequence[ProbeGrid], choice: ChosenProbes, exam: Exam, wanted: Need, seed: int
    ) -> Outcome:
        """Return the numbers of chosen probes on a test set."""
        return score_chosen(grids, choice, exam, wanted, seed)


def probe_needs(wanted: Need, config: ProbeConfig) -> Needs:
    """Return the needs of probes, which read features of training images in some views many times, and those
    of test images; of training images none where crops are streamed.
    """
    stored = () if config.views == "stream" else (Reading(wanted, config.views),)
    return Needs(stored, (Reading(wanted),))


def train_together(every: Sequence[Prepared], progress: bool) -> None:
    """Train grids; those that learn from the same rows in batches of one size see the same batches, read
    once.
    """
    groups: dict[Any, list[Prepared]] = {}
    for each in every:
        crops = each.wanted.crops if each.config.views else None
        same = each.plan.batch, each.plan.steps, each.task.fit.numpy().tobytes(), crops
        groups.setdefault(same, []).append(each)
    for (batch, steps, *_), members in groups.items():
        wanted, first = reduce(or_, (each.wanted for each in members)), members[0]
        for each in members:
            each.task.train = first.task.train  # all learn from what this one says that it read
        drawn = first.task.drawn(wanted, first.config.views, batch, steps, first.seed)
        train_plans([each.plan for each in members], drawn, progress)


# -- the choice, and what is chosen --------------------------------------------------------------------------


def choose(grids: Sequence[ProbeGrid], task: Task, wanted: Need) -> ChosenProbes:
    """Choose in each group the probe that is best on the hold-out.

    Of those with equally many right, the one of the lowest loss on the hold-out: on small sets ties are the
    rule, and the first of a grid is often one that hardly learned. Without hold-out the test set chooses, as
    in many papers, and the first of equals is taken.
    """
    held = None
    if len(task.hold):
        columns = Columns(task.holding, task.hold, wanted, task.device)
        held = [judge(grid, columns, task.held) for grid in grids]
        order = [found.order() for found in held]
    else:
        test = task.exam.columns(wanted)
        order = [
            [(percent(row),) for row in judge(grid, test, task.exam.truth).right]
            if len(probes_of(grids, grid.group)) > 1
            else [(0.0,)]
            for grid in grids
        ]
    groups = dict.fromkeys(grid.group for grid in grids)
    return ChosenProbes(
        {g: max(probes_of(grids, g), key=lambda at: order[at[0]][at[1]]) for g in groups}, held
    )


@torch.no_grad()
def judge(grid: ProbeGrid, columns: Columns, truth: GroundTruth) -> Judged:
    """Return how the probes of a grid do on rows: which they predict right, and the loss."""
    every = torch.arange(len(columns))
    return judged(lambda rows: grid.logits(columns.take(every[rows])), len(columns), truth)


@torch.no_grad()
def probe_scores(grid: ProbeGrid, probe: int, columns: Columns) -> Float[Tensor, "m C"]:
    """Return the scores of one probe of a grid, on the CPU."""
    every = torch.arange(len(columns)).split(SCORING)
    return torch.cat([grid.logits(columns.take(at))[probe].float().cpu() for at in every])


def score_chosen(
    grids: Sequence[ProbeGrid], choice: ChosenProbes, exam: Exam, wanted: Need, seed: int
) -> Outcome:
    """Return what the chosen probes score on a test set, and the grid of all; without facts of the data."""
    test = exam.columns(wanted)
    metrics: dict[str, float] = {}
    chosen: dict[str, Any] = {}
    grid: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    for group, best in choice.probes.items():
        members = probes_of(grids, group)
        right = {i: judge(grids[i], test, exam.truth).right for i in dict.fromkeys(i for i, _ in members)}
        rows = [
            {
                **grids[i].settings[g],
                **({} if choice.held is None else {"holdout": choice.held[i].order()[g][0]}),
                "test": percent(right[i][g]),
            }
            for i, g in members
        ]
        i, g = best
        row = rows[members.index(best)]
        top5 = exam.truth.top5(probe_scores(grids[i], g, test))
        found = scored(group, right[i][g], exam.truth, seed, top5)
        metrics |= found.metrics
        scores |= found.scores
        if len(rows) > 1:
            metrics[f"top1_{group}_best_on_test"] = max(row["test"] for row in rows)
        if choice.held is not None:
            metrics[f"holdout_{group}"] = row["holdout"]
        chosen[group] = {k: v for k, v in row.items() if k not in ("holdout", "test")}
        chosen[group]["parameters"] = grids[i].parameters_each
        grid[group] = rows
    return Outcome(metrics, {}, (), chosen, grid, scores)


class Scored(NamedTuple):
    """Metrics of one probe, and the score of each row."""

    metrics: dict[str, float]
    scores: dict[str, Any]


def scored(
    group: str, right: Bool[Tensor, "m"], truth: GroundTruth, seed: int, top5: Bool[Tensor, "m"]
) -> Scored:
    """Return `top1_<group>` in percent with its 95 % interval over images, and `top5_<group>`."""
    low, high = interval(right, truth.image_indices, seed=seed)
    metrics = {
        f"top1_{group}": percent(right),
        f"top1_{group}_low": 100 * low,
        f"top1_{group}_high": 100 * high,
        f"top5_{group}": percent(top5),
    }
    hits = {f"top1_{group}": right, f"top5_{group}": top5}
    return Scored(metrics, {name: packed(hit, truth.image_indices) for name, hit in hits.items()})


def means_over_seeds(runs: Sequence[Outcome], seed: int) -> Outcome:
    """Return the outcome of the first of several trainings, of seeds `seed`, `seed` + 1, ..., with the mean
    of each metric over all of them, and their sample standard deviation as `<metric>_std`.

    Intervals over images, scores of rows, what was chosen and the grid stay those of the first. The outcome
    of a single training is returned as it is.
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    ends = {name + end for name in first.metrics for end in INTERVAL_ENDS}
    metrics = dict(first.metrics)
    for name in [name for name in first.metrics if name not in ends]:
        values = [run.metrics[name] for run in runs]
        metrics |= {name: fmean(values), f"{name}_std": stdev(values)}
    note = (
        f"numbers are means over trainings with seeds {seed} to {seed + len(runs) - 1}, _std is their "
        f"standard deviation; intervals, differences of pairs, the grid and the kept probe are of seed {seed}"
    )
    return replace(first, metrics=metrics, notes=(*first.notes, note))


def notes_of_choice(task: Task, count: int) -> list[str]:
    """Say so where the test set chooses among several probes."""
    if len(task.hold) or count < 2:
        return []
    return [f"the best of {count} probes was chosen on the test set (holdout=0)"]


# -- what is measured ----------------------------------------------------------------------------------------


def probe_metrics(label: str) -> tuple[Metric, ...]:
    """Return what `score_chosen` and `scored` measure of each probe, under a name for people."""
    return (
        Metric("top1_*", f"{label} top-1 ({{}})", "higher", chance=1, main=True, column="top1"),
        Metric("top5_*", f"{label} top-5 ({{}})", "higher", chance=5, column="top5"),
        Metric("holdout_*", f"{label} holdout ({{}})", "higher", column="hold-out"),
        Metric("top1_*_best_on_test", f"{label} top-1 ({{}} best on test)", "higher", chance=1,
               column="best on test"),
    )  # fmt: skip


def with_spread(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """Return metrics and, of each, its standard deviation over seeds, as `means_over_seeds` names it."""
    spread = (Metric(f"{m.name}_std", f"{m.label}, standard deviation", unit=m.unit) for m in metrics)
    return (*metrics, *spread)
