"""The best measured step of a run, and whether later ones are worse: by what evaluations kept in its folder.

Every evaluation of step N is RUN/encoders/step-N/results/, with the score of each test image. So nothing has
to be remembered: what is said after a step follows from the files of it and of the steps before.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foveola.config import to_dict
from foveola.evaluation.paired import Difference, difference
from foveola.evaluation.protocol import Metric
from foveola.evaluation.result import Result
from foveola.evaluation.stored import SPEED, results_of
from foveola.files import RunFolder, restore_folder, whole_folder
from foveola.models.encoder import Encoder
from foveola.training.planned import Planned, chosen_metric


class Worse(NamedTuple):
    """A step that is worse than an earlier one, beyond the paired 95 % interval of their difference."""

    name: str  # of the evaluation
    metric: str
    about: Metric
    earlier: tuple[int, float]  # step and value
    now: tuple[int, float]
    change: Difference
    start: bool  # whether the earlier one is the start of an adaptation

    def text(self, since: int) -> str:
        """Return it in one line, for a run that has been worse since a step."""
        digits, (step, before), (_, value) = self.about.digits, self.earlier, self.now
        change = f"{self.change.value:+.{digits}f}, 95 % {self.change.low:+.{digits}f} to "
        change += f"{self.change.high:+.{digits}f}"
        unit = f" {self.about.unit}" if self.about.unit else ""
        numbers = f"{self.name} {self.metric} {before:.{digits}f} -> {value:.{digits}f}{unit} ({change})"
        if self.start:
            return f"adaptation hurts since step {since}: {numbers}, worse than the start"
        return f"later steps are worse than step {step}, since step {since}: {numbers}"


class Milestones:
    """The measured steps of a run up to `last`. Only the main process makes one.

    Args:
        best: "EVALUATION/METRIC" of the encoder to keep in encoders/best, or an evaluation, whose first
            number that can be better decides. "": none is kept.
        adapting: whether the run began with given weights, so that step 0 is worth a comparison.
    """

    def __init__(self, folder: Path, plans: Sequence[Planned], best: str, adapting: bool, last: int) -> None:
        self.run, self.adapting = RunFolder(folder), adapting
        restore_folder(self.run.best.path)
        self.plans = {plan.name: plan for plan in plans}
        self.keeper, _, self.wanted = best.partition("/")
        self.values: dict[str, dict[int, float]] = {plan.name: {} for plan in plans}
        self.metrics: dict[str, tuple[str, Metric]] = {}
        self.judged: dict[tuple[str, int], Worse | None] = {}
        for step in self.run.measured_steps():
            for name in self.plans if step <= last else ():
                if result := self._result(name, step):
                    self._note(name, step, result)

    def add(self, step: int, results: dict[str, Result], encoder: Encoder) -> list[str]:
        """Take note of what was measured after a step, keep its encoder if it is the best; what to say."""
        lines = []
        for name, result in results.items():
            earlier = max((s for s in self.values[name] if s < step), default=None)
            before = None if earlier is None else self._judge(name, earlier)
            self._note(name, step, result)
            self.judged.pop((name, step), None)
            now = self._judge(name, step)
            if now is not None and (before is None or (now.start and not before.start)):
                lines.append(now.text(step))
            elif now is None and before is not None:
                lines.append(f"{name} {before.metric}: step {step} is no longer worse beyond the interval")
            if name == self.keeper and name in self.metrics:
                lines += self._keep_best(name, step, encoder)
        return lines

    def hurts(self, step: int) -> str:
        """Return in which way a step is worse than an earlier one; "" where it is not, or not measured."""
        found = filter(None, (self._judge(name, step) for name in self.plans))
        worst = min(found, key=lambda worse: not worse.start, default=None)
        if worst is None:
            return ""
        since = step
        for earlier in sorted((s for s in self.values[worst.name] if s < step), reverse=True):
            worse = self._judge(worst.name, earlier)
            if worse is None or worse.start != worst.start:
                break
            since = earlier
        return worst.text(since)

    def summary(self) -> list[str]:
        """Return the lines for the end of a run."""
        step = self.run.best.step
        if self.keeper not in self.metrics or step is None or step not in self.values[self.keeper]:
            return []
        return [f"best: {self._text(self.keeper, step)}; its encoder: {self.run.best.path}"]

    def _note(self, name: str, step: int, result: Result) -> None:
        if name not in self.metrics:
            abouts = {metric: result.metric(metric) for metric in result.names()}
            metric = chosen_metric(abouts, self.wanted or None if name == self.keeper else None)
            if metric is None:
                return
            self.metrics[name] = metric, abouts[metric]
        if (value := result.metrics.get(self.metrics[name][0])) is not None:
            self.values[name][step] = value

    def _result(self, name: str, step: int) -> Result | None:
        """The result of an evaluation after a step, as it is set now."""
        plan = self.plans[name]
        wanted = _what_counts(to_dict(plan.config))
        for _, result in results_of(self.run.saved_encoder(step).path)[0]:
            same = (result.evaluation, result.protocol) == (name, plan.protocol.name)
            if same and _what_counts(result.settings) == wanted:
                return result
        return None

    def _judge(self, name: str, step: int) -> Worse | None:
        """How a step is worse than the start, or else than the best one before it."""
        if (name, step) not in self.judged:
            self.judged[name, step] = self._compare(name, step)
        return self.judged[name, step]

    def _compare(self, name: str, step: int) -> Worse | None:
        values = self.values[name]
        before = sorted(s for s in values if s < step)
        if step not in values or not before:
            return None
        metric, about = self.metrics[name]
        sign = 1 if about.better == "higher" else -1
        best = max(before, key=lambda s: sign * values[s])  # the first of several
        start = [0] if self.adapting and before[0] == 0 else []
        for earlier in dict.fromkeys((*start, best)):
            if sign * values[step] >= sign * values[earlier]:
                continue
            first, second = self._result(name, earlier), self._result(name, step)
            change = None if first is None or second is None else difference(first, second, metric)
            if change is not None and (change.high < 0 if sign > 0 else change.low > 0):
                pairs = (earlier, values[earlier]), (step, values[step])
                return Worse(name, metric, about, *pairs, change, bool(start) and earlier == 0)
        return None

    def _keep_best(self, name: str, step: int, encoder: Encoder) -> list[str]:
        values, kept = self.values[name], self.run.best.step
        sign = 1 if self.metrics[name][1].better == "higher" else -1
        if step not in values or (kept in values and sign * values[step] <= sign * values[kept]):
            return []
        path = self.run.best.path
        with whole_folder(path, path.with_name(".writing-best")) as part:
            encoder.save(part)
        earlier = (
            f" (before: {values[kept]:.{self.metrics[name][1].digits}f} at step {kept})"
            if kept in values
            else ""
        )
        return [f"best: {self._text(name, step)}{earlier}"]

    def _text(self, name: str, step: int) -> str:
        metric, about = self.metrics[name]
        unit = f" {about.unit}" if about.unit else ""
        return f"{name}/{metric} {self.values[name][step]:.{about.digits}f}{unit} at step {step}"


def _what_counts(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a file has them, without those that change only how long it takes."""
    return {key: value for key, value in json.loads(json.dumps(settings)).items() if key not in SPEED}
