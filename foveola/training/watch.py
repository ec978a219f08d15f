"""A run's health while it trains: the verdicts of `foveola.health`, said when they turn and at the end."""

from collections.abc import Mapping, Sequence

from foveola.health import Facts, State, StepMetrics, Verdict, health
from foveola.methods.method import Method
from foveola.schedules import Progress, steps_of
from foveola.training.recipe import RunConfig

EARLIEST = 100  # steps before which nothing is said: every method begins with flat targets


class Watch:
    """Verdicts on the lines of metrics.jsonl; `lines` are those of a run that goes on."""

    def __init__(self, facts: Facts, lines: Sequence[StepMetrics], warmup: int) -> None:
        """`warmup`: steps of the learning rate's, which are not judged either."""
        self.facts, self.lines, self.earliest = facts, list(lines), max(warmup, EARLIEST)
        self.next = 0
        self.states: dict[str, State] = {verdict.name: verdict.state for verdict in self._judge()}

    def add(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Return what to say after this line, if a verdict has become BAD or has ceased to be; mostly
        nothing.
        """
        self.lines.append({"step": step, **metrics})
        if step < self.earliest or len(self.lines) < self.next:
            return []
        # Ever more seldom, so that judging all lines again costs the same for each.
        self.next = len(self.lines) + max(len(self.lines) // 10, 1)
        lines = []
        for verdict in self._judge():
            before = self.states.get(verdict.name)
            self.states[verdict.name] = verdict.state
            if verdict.state == "BAD" and before != "BAD":
                lines.append(f"health: BAD: {verdict.name} {verdict.text}")
            elif before == "BAD" and verdict.state != "BAD":
                lines.append(f"health: no longer BAD: {verdict.name} {verdict.text}")
        return lines

    def summary(self) -> list[str]:
        """Return the lines for the end: every verdict that is not good, or that all are good."""
        verdicts = health(self.lines, self.facts)
        bad = [v for state in ("BAD", "LOOK") for v in verdicts if v.state == state]
        if not bad:
            known = sum(v.state == "OK" for v in verdicts)
            return [f"health: {known} questions, all OK; `foveola report` shows them"]
        return [f"health: {v.state}: {v.name} {v.text}" for v in bad]

    def _judge(self) -> list[Verdict]:
        """What may turn on the way: not that the run has not ended yet."""
        step = self.lines[-1]["step"] if self.lines else 0
        if not step or step < self.earliest:
            return []
        return [v for v in health(self.lines, self.facts)[2:] if v.state != "NOT KNOWN"]


def facts_of_run(config: RunConfig, method: Method, progress: Progress, images: int, processes: int) -> Facts:
    """Return what the verdicts need of a run on this many images."""
    return Facts(
        fixed_targets=config.method.fixed_targets,
        precision=config.precision,
        total_steps=progress.total_steps,
        prototypes=method.targets(),
        features=config.batch_size * config.views.global_count,
        width=config.model.shape[0],
        positions=(config.views.global_size // config.model.patch_size) ** 2,
        images=images,
        processes=processes,
        whole_steps=True,
    )


def warmup_of(config: RunConfig, progress: Progress) -> int:
    """Return the steps of the learning rate's warm-up."""
    return steps_of(
        config.optimizer.lr.warmup,
        total_steps=progress.total_steps,
        steps_per_epoch=progress.steps_per_epoch,
        batch_size=progress.batch_size,
    )
