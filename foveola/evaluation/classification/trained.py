"""Protocols of trained probes: a grid is trained on the features of `train`, and the hold-out chooses."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from foveola.evaluation.classification.grids import Plan, choose_and_score, train_plans
from foveola.evaluation.classification.task import ProbeConfig, Task, open_task
from foveola.evaluation.features.names import Need
from foveola.evaluation.protocol import At, Needs, Outcome, Protocol, Reading
from foveola.models.encoder import Encoder


@dataclass(frozen=True)
class Prepared:
    """A grid of probes before it is trained."""

    config: Any
    wanted: Need
    task: Task
    plan: Plan


class TrainedProbe(Protocol):
    """A protocol that trains a grid of probes, chooses among them on the hold-out, and scores on `test`.

    What a protocol says of its own is which features it reads (`wanted`), how many probes there are to choose
    among (`candidates`), and how they are made and trained (`plan`).
    """

    train = "needed"

    @abstractmethod
    def wanted(self, config: Any, encoder: Encoder) -> Need:
        """Return what of an image its probes read."""

    @abstractmethod
    def candidates(self, config: Any, encoder: Encoder) -> int:
        """Return the number of probes in each group, among which the hold-out chooses."""

    @abstractmethod
    def plan(self, config: Any, encoder: Encoder, task: Task) -> Plan:
        """Return the probes and how they are trained; the task gets notes on it."""

    def needs(self, config: Any, encoder: Encoder) -> Needs:
        """Return the needs of trained probes."""
        return probe_needs(self.wanted(config, encoder), config)

    def measure(self, at: At, config: Any) -> Outcome:
        """Train all probes of the grid on the same batches, choose on the hold-out, score on `test`."""
        prepared = self.prepare(at, config)
        train_together([prepared], at.progress)
        return self.score(prepared)

    def prepare(self, at: At, config: Any) -> Prepared:
        """Return the grid, untrained."""
        wanted = self.wanted(config, at.encoder)
        task = open_task(at, config, wanted, self.candidates(config, at.encoder))
        return Prepared(config, wanted, task, self.plan(config, at.encoder, task))

    def score(self, prepared: Prepared) -> Outcome:
        """Return the numbers of the trained grid."""
        return choose_and_score(prepared.plan.banks, prepared.task, prepared.wanted, prepared.config.seed)


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
    for (batch, steps, *_), some in groups.items():
        wanted, first = reduce(or_, (each.wanted for each in some)), some[0]
        for each in some:
            each.task.train = first.task.train  # all learn from what this one says that it read
        drawn = first.task.drawn(wanted, first.config.views, batch, steps, first.config.seed)
        train_plans([each.plan for each in some], drawn, progress)
