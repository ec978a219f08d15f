"""Banks of probes: trained on the same batches, one chosen on the hold-out, scored on test."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foveola.evaluation.features import show
from foveola.evaluation.kinds import Need
from foveola.evaluation.metrics import bootstrap, percent
from foveola.evaluation.probing import Answers, Batch, Columns, Task
from foveola.evaluation.solvers import Factor

SCORING = 256  # rows scored at once


@runtime_checkable
class Bank(Protocol):
    """G probes of one shape, trained at once on the same batches."""

    group: str  # what the choice is made within; metrics are given for each group
    settings: list[dict[str, Any]]  # of each probe
    parameters_each: int  # trained numbers of one probe

    def step(self, x: Mapping[str, Tensor], y: Int64[Tensor, "b"], factor: float) -> None:
        """One step of training, with learning rates times `factor`."""
        ...

    def logits(self, x: Mapping[str, Tensor]) -> Float[Tensor, "G b C"]:
        """Scores of each probe, as at test time."""
        ...


def train_banks(
    banks: Sequence[Bank], drawn: Iterator[Batch], factor: Factor, steps: int, progress: bool
) -> None:
    """Train all banks on the same batches."""
    for step, (x, y) in enumerate(show(drawn, steps, "training probes", progress)):
        for bank in banks:
            bank.step(x, y, factor(step))


@torch.no_grad()
def bank_hits(bank: Bank, columns: Columns, answers: Answers) -> Bool[Tensor, "G m"]:
    """Which rows each probe of a bank gets right. A probe whose scores are not finite gets none."""
    parts = []
    for start in range(0, len(columns), SCORING):
        rows = slice(start, start + SCORING)
        logits = bank.logits(columns.take(torch.arange(len(columns))[rows]))
        finite = ~(logits.isnan().any(dim=2) | logits.isposinf().any(dim=2)).cpu()
        parts.append(answers.hits(logits, rows) & finite)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def logits_of(bank: Bank, probe: int, columns: Columns) -> Float[Tensor, "m C"]:
    """Scores of one probe of a bank, on the CPU."""
    places = torch.arange(len(columns)).split(SCORING)
    return torch.cat([bank.logits(columns.take(at))[probe].float().cpu() for at in places])


def choose_and_score(
    banks: Sequence[Bank], task: Task, wanted: Need, seed: int
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """(metrics, chosen, grid): in each group the probe that is best on the hold-out, scored on test.

    Without hold-out the test set chooses, as in many papers. The first of equals is chosen.
    """
    test = Columns(task.test, task.score, wanted, task.device)
    held = (
        [bank_hits(bank, Columns(task.train, task.hold, wanted, task.device), task.held) for bank in banks]
        if len(task.hold)
        else None
    )
    metrics: dict[str, float] = {}
    chosen: dict[str, Any] = {}
    grid: dict[str, Any] = {}
    for group in dict.fromkeys(bank.group for bank in banks):
        mine = [i for i, bank in enumerate(banks) if bank.group == group]
        right = {i: bank_hits(banks[i], test, task.answers) for i in mine}
        rows = [
            {
                **banks[i].settings[g],
                **({} if held is None else {"holdout": percent(held[i][g])}),
                "test": percent(right[i][g]),
            }
            for i in mine
            for g in range(len(banks[i].settings))
        ]
        places = [(i, g) for i in mine for g in range(len(banks[i].settings))]
        by = "test" if held is None else "holdout"
        best = max(range(len(rows)), key=lambda r: rows[r][by])
        i, g = places[best]
        top5 = task.answers.top5(logits_of(banks[i], g, test))
        metrics |= scored(group, right[i][g], task.answers, seed, top5)
        if len(rows) > 1:
            metrics[f"top1_{group}_best_on_test"] = max(row["test"] for row in rows)
        if held is not None:
            metrics[f"holdout_{group}"] = rows[best]["holdout"]
        chosen[group] = {k: v for k, v in rows[best].items() if k not in ("holdout", "test")}
        chosen[group]["parameters"] = banks[i].parameters_each
        grid[group] = rows
    return metrics, chosen, grid


def scored(
    group: str, right: Bool[Tensor, "m"], answers: Answers, seed: int, top5: Bool[Tensor, "m"] | None = None
) -> dict[str, float]:
    """`top1_<group>` in percent with its 95 % interval (bootstrap over pictures), and `top5_<group>`."""
    low, high = bootstrap(right, answers.pictures, seed=seed)
    metrics = {
        f"top1_{group}": percent(right),
        f"top1_{group}_low": 100 * low,
        f"top1_{group}_high": 100 * high,
    }
    return metrics | ({} if top5 is None else {f"top5_{group}": percent(top5)})


def note_choice(task: Task, count: int) -> None:
    """Say so where the test set chooses among several probes."""
    if not len(task.hold) and count > 1:
        task.notes.append(f"the best of {count} probes was chosen on the test set (holdout=0)")
