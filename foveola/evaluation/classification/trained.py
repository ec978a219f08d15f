"""Protocols of trained probes: a grid is trained on the features of `train`, and the hold-out chooses."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from operator import or_
from typing import Any, ClassVar, Literal

from foveola.config import ConfigError, build, key, to_dict
from foveola.evaluation.classification.grids import (
    ChosenProbes,
    ProbeGrid,
    ProbePlan,
    choose,
    means_over_seeds,
    notes_of_choice,
    probes_of,
    score_chosen,
    train_plans,
)
from foveola.evaluation.classification.saved import PROBE, SavedProbe
from foveola.evaluation.classification.task import Exam, ProbeConfig, Task, open_exam, open_task
from foveola.evaluation.features.names import Need
from foveola.evaluation.protocol import At, Needs, Outcome, Protocol, Reading
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
            most = max(len(probes_of(grids, group)) for group in self.choice.probes)
            task.notes.extend(notes_of_choice(task, most))
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
    grids: ClassVar[tuple[Any, ...]]  # the kinds of its probes

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
    for (batch, steps, *_), some in groups.items():
        wanted, first = reduce(or_, (each.wanted for each in some)), some[0]
        for each in some:
            each.task.train = first.task.train  # all learn from what this one says that it read
        drawn = first.task.drawn(wanted, first.config.views, batch, steps, first.seed)
        train_plans([each.plan for each in some], drawn, progress)
