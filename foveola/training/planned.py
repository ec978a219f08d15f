"""The evaluations that a configuration asks for, checked before anything is opened or built."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from foveola.config import ConfigError, UserError, build, key, nearest, to_dict
from foveola.evaluation.classification.knn import Knn
from foveola.evaluation.protocol import Metric, Protocol, find_protocol

KNN = "knn"  # the name of the evaluation of `evaluate_every`
TEST = "test"  # the name of the evaluation of a task on its test data, which `finetune test=` asks for
TAKEN = ("loss", "best")  # words that name other things in a run


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation of a run while it trains."""

    protocol: str = key(help="what is measured: a name of `foveola evaluate --help`, or an importable one")
    every: str | None = key(None, "time between these evaluations; null = evaluate_every")
    train: str | None = key(None, "data string to learn from, for protocols that learn; null = data")
    test: str | None = key(None, "data string to measure on; null = the test split of train")
    overlap: Literal["refuse", "allow"] = key(
        "refuse", "test images from which it learns as well, byte for byte: a mistake, or meant so"
    )
    settings: dict[str, Any] = key(factory=dict, help="settings of the protocol")


class Planned(NamedTuple):
    """An evaluation: `where` is the key that asks for it, `every` a duration."""

    name: str
    where: str
    protocol: Protocol
    config: Any
    every: str
    train: str | None
    test: str | None
    overlap: Literal["refuse", "allow"] = "refuse"

    @property
    def named(self) -> bool:
        """Whether it is one of `evaluations`."""
        return self.where != "evaluate_every"

    @property
    def time(self) -> str:
        """The key of its time."""
        return f"{self.where}.every" if self.named else self.where

    @property
    def data(self) -> tuple[str, str]:
        """The keys of its data."""
        return (
            (f"{self.where}.train", f"{self.where}.test")
            if self.named
            else ("evaluate_train", "evaluate_test")
        )

    def measured(self, line: Mapping[str, Any]) -> bool:
        """Return whether a line of metrics.jsonl holds numbers of this evaluation; a part of the method may
        have its name.
        """
        own = [name.removeprefix(f"{self.name}/") for name in line if name.startswith(f"{self.name}/")]
        known = self.protocol.metrics
        return bool(own) and (not known or any(m.stars(name) is not None for m in known for name in own))


def planned(config: Any) -> list[Planned]:
    """Return the evaluations of a `RunConfig`: k-NN, where `evaluate_every` asks for it, then `evaluations`.

    Raises ConfigError for a name that cannot be one, an unknown protocol or setting, two that are the same,
    and one without a time.
    """
    found = []
    if config.evaluate_every is not None:
        data = config.evaluate_train, config.evaluate_test
        found.append(Planned(KNN, "evaluate_every", Knn(), config.evaluate, config.evaluate_every, *data))
    for name, each in config.evaluations.items():
        where = f"evaluations.{name}"
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name in TAKEN:
            raise ConfigError(
                f"{where}: a name of letters, digits and _ is needed, other than {', '.join(TAKEN)}"
            )
        if name == KNN and found:
            raise ConfigError(f"{where}: evaluate_every measures knn as well: give one of them another name")
        every = each.every or config.evaluate_every
        if every is None:
            raise ConfigError(f"{where} has no time: write {where}.every='1 epochs'")
        try:
            protocol = find_protocol(each.protocol)
        except UserError as error:
            raise ConfigError(f"{where}.protocol: {error}") from error
        settings = build(protocol.Config, each.settings, f"{where}.settings")
        found.append(Planned(name, where, protocol, settings, every, each.train, each.test, each.overlap))
    same: dict[str, str] = {}
    for each in found:
        about = str((each.protocol.name, to_dict(each.config), each.train, each.test))
        if about in same:
            raise ConfigError(f"{each.where} measures the same as {same[about]}: one of them is enough")
        same[about] = each.where
    return found


def check_choices(config: Any) -> None:
    """Raise ConfigError for evaluations that cannot be, and for a `best` that none of them measures."""
    found = {each.name: each for each in planned(config)}
    if config.best is None:
        return
    name, _, metric = config.best.partition("/")
    if not found:
        raise ConfigError(f"best={config.best}: nothing is measured: set evaluate_every= or evaluations=")
    if name not in found:
        near = nearest(name, found)
        hint = f"did you mean {near}/{metric}?" if near else f"there are {', '.join(found)}"
        raise ConfigError(f"best={config.best}: there is no evaluation {name!r}; {hint}")
    compared = [about for about in found[name].protocol.metrics if about.compared]
    if not any(_may_be(about, metric) for about in compared):
        names = ", ".join(f"{name}/{about.name}" for about in compared) or "none"
        raise ConfigError(
            f"best={config.best}: expected EVALUATION/METRIC, a number that can be better: {names}"
        )


def _may_be(about: Metric, metric: str) -> bool:
    """Whether a metric of a result that `about` declares can be meant by this name or its beginning."""
    return bool(metric) and (about.stars(metric) is not None or about.name.startswith(f"{metric}_"))


def chosen_metric(names: Mapping[str, Metric], wanted: str | None) -> str | None:
    """Return the name of the metric that an evaluation is judged by, among those that it gave.

    That is the one of this name, or the only one whose name begins so (`top1` for `top1_plain`). Without a
    wish it is the first that the protocol stands for and that can be better; None where there is none.
    Raises UserError for a wish that none, or several, fit.
    """
    compared = [name for name, about in names.items() if about.compared]
    if wanted is None:
        return next((name for name in compared if names[name].main), next(iter(compared), None))
    longer = [name for name in compared if name.startswith(f"{wanted}_")]
    fitting = [wanted] if wanted in compared else without_details(longer)
    if len(fitting) != 1:
        found = "several are" if fitting else "is not there, there are"
        raise UserError(f"best: {wanted!r} {found}: {', '.join(fitting or compared)}")
    return fitting[0]


def without_details(names: Sequence[str]) -> list[str]:
    """Return names without those that add to another one: `top1_plain`, but not `top1_plain_k20`."""
    return [name for name in names if not any(name.startswith(f"{other}_") for other in names)]
