"""Grids of probes: trained on the same batches, one chosen on the hold-out, scored on test."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from time import perf_counter
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from foveola.config import UserError
from foveola.evaluation.classification.solvers import Factor
from foveola.evaluation.classification.task import Exam, Task
from foveola.evaluation.features.cache import Columns, FeatureBatch
from foveola.evaluation.features.names import Need
from foveola.evaluation.metrics import Answers, interval, percent
from foveola.evaluation.paired import packed
from foveola.evaluation.protocol import INTERVAL_ENDS, Metric, Outcome
from foveola.progress import show

SCORING = 256  # rows scored at once


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


@runtime_checkable
class ProbeGrid(Protocol):
    """G probes of one shape, trained at once on the same batches."""

    group: str  # what the choice is made within; metrics are given for each group
    settings: list[dict[str, Any]]  # of each probe
    parameters_each: int  # trained numbers of one probe
    kind: str  # of grid, and what it is made anew with besides rates, width and classes
    shape: dict[str, Any]

    def step(self, x: Mapping[str, Tensor], y: Int64[Tensor, "b"], factor: float) -> None:
        """Take one step of training, with learning rates times `factor`."""
        ...

    def logits(self, x: Mapping[str, Tensor]) -> Float[Tensor, "G b C"]:
        """Return the scores of each probe, as at test time."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return all that `logits` computes with, by name: [G, ...], or [1, ...] where all share it."""
        ...


def check_heads(heads: int, width: int) -> None:
    """Raise UserError, with heads that would do, unless they divide the width."""
    if width % heads:
        right = [n for n in range(1, width + 1) if width % n == 0]
        below, above = max(n for n in right if n < heads), min([n for n in right if n > heads], default=width)
        raise UserError(
            f"heads={heads} do not divide the width of the patches, {width}; {below} or {above} do"
        )


@dataclass
class ProbePlan:
    """How grids are trained: all on the same batches, each exactly as if it were alone."""

    grids: Sequence[ProbeGrid]
    factor: Factor  # what learning rates are multiplied with at each step
    batch: int
    steps: int
    seconds: float = 0.0  # that their steps took so far


def train_plans(plans: Sequence[ProbePlan], drawn: Iterator[FeatureBatch], progress: bool) -> None:
    """Train the grids of all plans, which have the same number of steps, on the same batches."""
    for step, (x, y) in enumerate(show(drawn, plans[0].steps, "training probes", progress)):
        for plan in plans:
            began = perf_counter()
            for grid in plan.grids:
                grid.step(x, y, plan.factor(step))
            plan.seconds += perf_counter() - began


class Judged(NamedTuple):
    """What some rows say of each of G probes."""

    right: Bool[Tensor, "G m"]  # whether each row's best class is a right one
    loss: Float64[Tensor, "G"]  # mean cross-entropy of the rows' labels; infinite where that is not finite

    def order(self) -> list[tuple[float, float]]:
        """Return what the best probe has the greatest of: the share that is right, and of equals the lower
        loss.
        """
        return [(percent(row), -loss) for row, loss in zip(self.right, self.loss.tolist(), strict=True)]


@torch.no_grad()
def judge(grid: ProbeGrid, columns: Columns, answers: Answers) -> Judged:
    """Return the probes of a grid on some rows."""
    every = torch.arange(len(columns))
    return judged(lambda rows: grid.logits(columns.take(every[rows])), len(columns), answers)


def judged(
    logits_of: Callable[[slice], Float[Tensor, "G b C"]], count: int, answers: Answers, at_once: int = SCORING
) -> Judged:
    """Return probes by their logits of `count` rows. One whose scores are not finite has no row right."""
    right, loss = [], []
    for start in range(0, count, at_once):
        rows = slice(start, start + at_once)
        logits = logits_of(rows)
        finite = ~(logits.isnan().any(dim=2) | logits.isposinf().any(dim=2)).cpu()
        right.append(answers.hits(logits, rows) & finite)
        loss.append(cross_entropies(logits.cpu(), answers.labels[rows]).sum(dim=1))
    total = torch.stack(loss).sum(dim=0) / count
    return Judged(torch.cat(right, dim=1), total.nan_to_num(nan=torch.inf, posinf=torch.inf))


def cross_entropies(logits: Float[Tensor, "G m C"], labels: Int64[Tensor, "m"]) -> Float64[Tensor, "G m"]:
    """Return minus the logarithm of each label's probability; 0 where the label is unknown (-1)."""
    log = torch.log_softmax(logits.double(), dim=2)
    own = log.gather(2, labels.clamp(min=0).expand(len(log), -1)[..., None])[..., 0]
    return torch.where(labels >= 0, -own, 0.0)


@torch.no_grad()
def probe_scores(grid: ProbeGrid, probe: int, columns: Columns) -> Float[Tensor, "m C"]:
    """Return the scores of one probe of a grid, on the CPU."""
    every = torch.arange(len(columns)).split(SCORING)
    return torch.cat([grid.logits(columns.take(at))[probe].float().cpu() for at in every])


ProbeIndex = tuple[int, int]  # a grid, and a probe of it


@dataclass(frozen=True)
class ChosenProbes:
    """The probe of each group that was chosen, and what the hold-out says of all of them."""

    probes: dict[str, ProbeIndex]
    held: list[Judged] | None = None  # of each grid


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
            [(percent(row),) for row in judge(grid, test, task.exam.answers).right]
            if len(probes_of(grids, grid.group)) > 1
            else [(0.0,)]
            for grid in grids
        ]
    groups = dict.fromkeys(grid.group for grid in grids)
    return ChosenProbes(
        {g: max(probes_of(grids, g), key=lambda at: order[at[0]][at[1]]) for g in groups}, held
    )


def probes_of(grids: Sequence[ProbeGrid], group: str) -> list[ProbeIndex]:
    """Return the indices of all probes of a group, in order."""
    return [(i, g) for i, grid in enumerate(grids) if grid.group == group for g in range(len(grid.settings))]


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
        right = {i: judge(grids[i], test, exam.answers).right for i in dict.fromkeys(i for i, _ in members)}
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
        top5 = exam.answers.top5(probe_scores(grids[i], g, test))
        found = scored(group, right[i][g], exam.answers, seed, top5)
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
    group: str, right: Bool[Tensor, "m"], answers: Answers, seed: int, top5: Bool[Tensor, "m"]
) -> Scored:
    """Return `top1_<group>` in percent with its 95 % interval over images, and `top5_<group>`."""
    low, high = interval(right, answers.image_indices, seed=seed)
    metrics = {
        f"top1_{group}": percent(right),
        f"top1_{group}_low": 100 * low,
        f"top1_{group}_high": 100 * high,
        f"top5_{group}": percent(top5),
    }
    hits = {f"top1_{group}": right, f"top5_{group}": top5}
    return Scored(metrics, {name: packed(hit, answers.image_indices) for name, hit in hits.items()})


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
