"""The evaluations of a run while it trains: any protocols, each on its own data and at its own times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveola import distributed
from foveola.config import ConfigError, UserError, to_dict
from foveola.data.sources import Source, Split, as_source
from foveola.data.suited import suited
from foveola.evaluation.evaluate import evaluate_all
from foveola.evaluation.features.overlap import overlap_of, separate
from foveola.evaluation.result import Result
from foveola.evaluation.stored import store
from foveola.failures import explained
from foveola.files import RunFolder
from foveola.models.encoder import Encoder
from foveola.schedules import Progress
from foveola.training.durations import period
from foveola.training.log import Log
from foveola.training.milestones import Milestones
from foveola.training.planned import TEST, Planned, planned, without_details
from foveola.training.recipe import RunConfig

COMPARED = 10_000  # images of training and test data at most that are compared


@dataclass(frozen=True, eq=False)
class Opened:
    """An evaluation with its data, due every so many steps."""

    plan: Planned
    every: int
    train: Source | None
    test: Source


class Evaluations:
    """Each is due every so many steps, and after the last one. Before the first, all of `evaluations` are, so
    that data and settings are proven; that of `evaluate_every` where the start is worth a comparison.

    Their data are opened at once: mistakes show now, not hours later. `own` are sources of the caller's.
    """

    def __init__(self, config: RunConfig, progress: Progress, own: dict[str, Source]) -> None:
        self.config, self.total = config, progress.total_steps
        self.adapting = config.init is not None
        self.each: list[Opened] = []
        opened: dict[Any, Source] = {}
        for plan in planned(config):
            every = period(config, plan.time, progress)
            assert every is not None, plan
            self.each.append(Opened(plan, every, *_open(plan, config, own, opened)))
        self.milestones: Milestones | None = None  # of the main process
        self.last = 0  # the step from which this session goes on
        self.said: set[str] = set()
        self.worse = ""  # why `stop_when_worse` ends the run

    def due(self, step: int) -> bool:
        """Return whether there is one after this step."""
        return any(self._is_due(each, step) for each in self.each)

    def missed(self, folder: Path, step: int) -> list[int]:
        """Return the steps that the run in `folder`, which has taken `step`, is to measure before it goes on:
        where it ended between a checkpoint and its evaluation, and its start, while that is known.
        """
        self.last = step
        return distributed.on_main(lambda: self._missed(folder, step)) if self.each else []

    def ended(self, folder: Path, step: int) -> str:
        """Return why the run in `folder`, which has taken `step`, does not go on; "" where it does."""
        if step >= self.total:
            return f"{folder} is finished: nothing to do"
        if not (self.config.stop_when_worse and self.each and step):
            return ""
        return distributed.on_main(lambda: self._why_stop(folder, step))

    def run(
        self, encoder: Encoder, step: int, folder: Path, log: Log, tell: Callable[[int, Result], None]
    ) -> None:
        """Measure what is due after this step: write and log each result, and give it to `tell`."""
        waiting = distributed.on_main(lambda: self._waiting(folder, step))
        results: dict[str, Result] = {}
        for group in _together([each for each in self.each if each.plan.name in waiting]):
            results |= _measure(group, encoder)

        def keep() -> tuple[list[str], str]:
            with explained(f"the evaluations of step {step} cannot be kept in {folder}"):
                return self._keep(results, encoder, step, folder)

        lines, self.worse = distributed.on_main(keep)
        for name, result in results.items():
            for text in result.notes:
                if text not in self.said:
                    log.note(f"{name}: {text}")
            self.said.update(result.notes)
            compared = without_details([m for m in result.names() if result.metric(m).compared])
            numbers = {f"{name}/{metric}": value for metric, value in result.metrics.items()}
            log.step(step, numbers, {f"{name}/{metric}" for metric in compared})
            tell(step, result)
        for text in lines:
            log.note(text)

    def summary(self) -> list[str]:
        """Return what the main process is to say at the end."""
        return [] if self.milestones is None else self.milestones.summary()

    def _keep(
        self, results: dict[str, Result], encoder: Encoder, step: int, folder: Path
    ) -> tuple[list[str], str]:
        """Write the results of a step, and the encoder where it is the best; what to say, and why to stop."""
        for result in results.values():
            store(result, RunFolder(folder).saved_encoder(step).path)
        lines = self._milestones(folder).add(step, results, encoder)
        why = self._why_stop(folder, step)
        if step == self.total or why:  # the newest encoder is of this step, and stays so
            for result in results.values():
                store(result, folder)
        return lines, why

    def _why_stop(self, folder: Path, step: int) -> str:
        if not self.config.stop_when_worse or step >= self.total:
            return ""
        why = self._milestones(folder).hurts(step)
        if not why:
            return ""
        how = f"stopped after step {step} of {self.total}, as stop_when_worse=true asks"
        return f"{how}: {why}; stop_when_worse=false goes on from there"

    def _milestones(self, folder: Path) -> Milestones:
        if self.milestones is None:
            plans = [each.plan for each in self.each]
            best = self.config.best or self._usual([plan.name for plan in plans])
            self.milestones = Milestones(folder, plans, best, self.adapting, self.last)
        return self.milestones

    def _usual(self, names: Sequence[str]) -> str:
        """The evaluation that decides where `best` does not say: of a task that on its test data, of an
        adaptation the first. In another run none does.
        """
        if self.config.method.annotations is not None and TEST in names:
            return TEST
        return names[0] if self.adapting and names else ""

    def _is_due(self, each: Opened, step: int) -> bool:
        if step:
            return step % each.every == 0 or step == self.total
        config = self.config
        compared = self.adapting or config.best is not None or config.stop_when_worse
        return compared or each.plan.named

    def _missed(self, folder: Path, step: int) -> list[int]:
        known = [0, step] if step and RunFolder(folder).saved_encoder(0).is_whole() else [step]
        return [each for each in known if self._waiting(folder, each)]

    def _waiting(self, folder: Path, step: int) -> list[str]:
        """Names of those that are due after a step, and of which the metrics of the run hold nothing."""
        lines = [line for line in RunFolder(folder).read_metrics() if line["step"] == step]
        due = [each.plan for each in self.each if self._is_due(each, step)]
        return [plan.name for plan in due if not any(plan.measured(line) for line in lines)]


def _open(
    plan: Planned, config: RunConfig, own: dict[str, Source], opened: dict[Any, Source]
) -> tuple[Source | None, Source]:
    """The data of an evaluation; `opened` has those that others opened already."""

    usual = config.encoder().transform.decoding

    def source(value: Source | str | None, split: Split, key: str) -> Source:
        where = (value if isinstance(value, str) else id(value), split)
        if where not in opened:
            opened[where] = suited(as_source(value, split, key), usual, config.model.channels)
        return opened[where]

    keys = plan.data
    train = own.get(keys[0]) or plan.train or own.get("data") or config.data
    test = source(own.get(keys[1]) or plan.test or train, "test", keys[1])
    if plan.protocol.train == "unused" and plan.train is not None:
        raise ConfigError(f"{keys[0]} has no effect: {plan.protocol.name} learns from nothing")
    if plan.protocol.name == getattr(config.method, "protocol", None):  # a head, which learns from `data`
        seen = source(own.get("data") or config.data, "train", "data")
        _check_seen(plan, seen, test, keys[1])
        return None, test
    learns = plan.protocol.train == "needed" or (plan.protocol.train == "optional" and plan.train is not None)
    if not learns:
        if plan.overlap == "allow":
            raise ConfigError(f"{plan.where}.overlap has no effect: {plan.protocol.name} learns from nothing")
        return None, test
    learned = source(train, "train", keys[0])
    if not plan.named:
        for key, each in zip(keys, (learned, test), strict=True):
            if each.classes is None:
                raise ConfigError(f"{key}: {each.name} has no labels, which evaluate_every needs")
    if plan.protocol.train == "needed":
        settings = f"{plan.where}.settings" if plan.named else "evaluate"
        excluding = f", or {settings}.exclude_self=true" if hasattr(plan.config, "exclude_self") else ""
        remedies = f"set {keys[1]}= to images that training does not see{excluding}"
        separate(plan.where, plan.config, learned, test, plan.overlap, remedies)
    elif plan.overlap == "allow":
        raise ConfigError(
            f"{plan.where}.overlap has no effect: {plan.protocol.name} may read the same images"
        )
    return learned, test


def _check_seen(plan: Planned, seen: Source, test: Source, key: str) -> None:
    """Raise UserError where a head is measured on images from which it learns, unless that is asked for.

    Of large data sets a part is compared, so that a few shared images may go unseen, but never whole folders.
    """
    if plan.overlap == "allow":
        return
    overlap = overlap_of(seen, test, COMPARED, 0)
    if overlap.count:
        raise UserError(
            f"{plan.where}: {overlap}: set {key}= to images that training does not see; "
            f"{plan.where}.overlap=allow measures on them all the same"
        )


def _together(each: Sequence[Opened]) -> list[list[Opened]]:
    """Groups that share a pass over their images: of the same data, each protocol once."""
    groups: list[list[Opened]] = []
    for one in each:
        for group in groups:
            same = all(one.test is other.test and one.train is other.train for other in group)
            if same and one.plan.protocol.name not in {other.plan.protocol.name for other in group}:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _measure(group: Sequence[Opened], encoder: Encoder) -> dict[str, Result]:
    """Results by the names of the evaluations."""
    settings: dict[str, Any] = {one.plan.protocol.name: to_dict(one.plan.config) for one in group}
    protocols, (first, *_) = [one.plan.protocol for one in group], group
    found = evaluate_all(encoder, protocols, train=first.train, test=first.test, progress=False, **settings)
    return {one.plan.name: replace(found[one.plan.protocol.name], evaluation=one.plan.name) for one in group}
