"""All probes side by side on the same features: the protocol `probes`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, NamedTuple

from foveola.config import ConfigError, key
from foveola.evaluation.classification.abmilp import Abmilp, AbmilpConfig
from foveola.evaluation.classification.attentive import Attentive, AttentiveConfig
from foveola.evaluation.classification.knn import Knn, KnnConfig
from foveola.evaluation.classification.linear import Linear, LinearConfig
from foveola.evaluation.classification.logistic import Logistic, LogisticConfig
from foveola.evaluation.classification.task import ProbeConfig
from foveola.evaluation.classification.trained import (
    Prepared,
    TrainedProbe,
    means_over_seeds,
    probe_metrics,
    train_together,
    with_spread,
)
from foveola.evaluation.protocol import At, Metric, Needs, Outcome, Protocol
from foveola.models.encoder import Encoder

MEASURED_ONCE = {"knn", "logistic"}  # nothing but a hold-out is drawn by chance
Name = Literal["knn", "logistic", "linear", "aggregations", "attentive", "cae"]


@dataclass(frozen=True)
class ProbesConfig(ProbeConfig):
    """Settings of `probes`. Every probe trains for the same number of epochs, on the same rows."""

    run: tuple[Name, ...] = key(
        ("knn", "logistic", "linear", "aggregations", "attentive", "cae"), "probes to train, in this order"
    )
    epochs: int = key(30, "passes over the training images of each trained probe", at_least=1)
    batch: int = key(256, "images of a step", at_least=1)
    heads: tuple[int | None, ...] = key(
        (None, 1), "attention heads of the attentive probes; null = width / 64"
    )
    depth: tuple[int, ...] = key((1,), "depths of AbMILP's scores", at_least=1)
    values: int = key(8, "values of C of the logistic regression", at_least=2)
    k: tuple[int, ...] = key((20,), "neighbours of k-NN; the best is reported", at_least=1)
    lr: tuple[float, ...] = key(
        (0.01, 0.03, 0.1, 0.3), "learning rates of the aggregations and of cae, of a batch of 256", above=0
    )
    attention_of: str | None = key(None, "another encoder, whose attention averages the patches")
    seeds: int = key(
        1,
        "trainings of each trained probe, of seed, seed + 1, ...: numbers are their means, _std their "
        "standard deviation; k-NN and logistic regression are measured once",
        at_least=1,
    )

    def __post_init__(self) -> None:
        if not self.run or len(set(self.run)) < len(self.run):
            raise ValueError(f"run: needs different probes, got {list(self.run)}")
        if set(self.run) & {"aggregations", "cae"} and not self.lr:
            raise ValueError("lr: needs a value")
        if self.seeds > 1 and not set(self.run) - MEASURED_ONCE:
            raise ValueError(f"seeds: has no effect, as nothing of run={list(self.run)} is trained by steps")


def parts_of(config: ProbesConfig, encoder: Encoder) -> dict[str, tuple[Protocol, Any]]:
    """Return the protocols that `probes` runs, in order, all with the same fraction, split and seed of the
    images.
    """
    shared: dict[str, Any] = {name: getattr(config, name) for name in ProbeConfig.__dataclass_fields__}
    once: dict[str, Any] = {**shared, "views": 0}
    reading: dict[str, Any] = {name: v for name, v in once.items() if name not in ("holdout", "views")}
    trained: dict[str, Any] = {**shared, "epochs": config.epochs, "batch": config.batch}
    parts: dict[str, tuple[Protocol, Any]] = {}
    for name in config.run:
        if name == "knn":
            parts[name] = Knn(), KnnConfig(**reading, masks=False, k=config.k)
        elif name == "logistic":
            parts[name] = Logistic(), LogisticConfig(**once, values=config.values)
        elif name == "linear":
            parts[name] = Linear(), LinearConfig(**trained)
        elif name == "attentive":
            parts[name] = Attentive(), AttentiveConfig(**trained, heads=config.heads)
        elif name == "cae":
            settings = AttentiveConfig(**trained, style="cae", heads=config.heads, lr=config.lr)
            parts[name] = Attentive(), settings
        else:
            fixed = ("token", "average", "attention", "lowest_entropy", "centre")
            predictor = ("predictor",) if encoder.predictor is not None else ()
            settings = AbmilpConfig(
                **trained,
                fixed=(*fixed, *predictor),
                depth=config.depth,
                lr=config.lr,
                attention_of=config.attention_of,
                warmup=min(10, config.epochs // 3),
            )
            parts[name] = Abmilp(), settings
    return parts


class Timed(NamedTuple):
    """What a probe scored, and the seconds of it and of its training."""

    outcome: Outcome
    seconds: float


class Probes(Protocol):
    """Every probe on the same features: the numbers of all of them, with their intervals.

    Names are those of the protocols: `top1_knn`, `top1_logistic`, `top1_linear`, `top1_attentive`, and of the
    same linear classifier on one vector of an image `top1_abmilp`, `top1_token`, `top1_average`, ...;
    `top1_cae` is CAE's attentive probe.
    """

    name = "probes"
    help = "all classification protocols side by side on the same features"
    Config = ProbesConfig
    train = "needed"
    metrics = with_spread((*probe_metrics("probes"), Metric("entropy_*", "probes: entropy {}", unit="nats")))

    def needs(self, config: ProbesConfig, encoder: Encoder) -> Needs:
        """Return the needs of all parts."""
        every = [protocol.needs(own, encoder) for protocol, own in parts_of(config, encoder).values()]
        return Needs(
            tuple(reading for each in every for reading in each.train),
            tuple(reading for each in every for reading in each.test),
        )

    def measure(self, at: At, config: ProbesConfig) -> Outcome:
        """Train all probes on the same batches, and return the numbers of one part after the other."""
        return self.measure_all([at], config)[0]

    def measure_all(self, every: Sequence[At], config: ProbesConfig) -> list[Outcome]:
        """Return the same for several test sets; what is trained by steps is trained once."""
        parts = parts_of(config, every[0].encoder)
        seeds = range(config.seed, config.seed + config.seeds)
        trainings = [self._trained(every, parts, seed) for seed in seeds]
        return [
            self._measured(at, parts, {name: [run[name][i] for run in trainings] for name in trainings[0]})
            for i, at in enumerate(every)
        ]

    def _measured(
        self, at: At, parts: dict[str, tuple[Protocol, Any]], trained: dict[str, list[Timed]]
    ) -> Outcome:
        """The numbers of all parts on a test set; `trained` has those of each training."""
        metrics: dict[str, float] = {}
        data: dict[str, Any] = {}
        chosen: dict[str, Any] = {}
        grid: dict[str, Any] = {}
        scores: dict[str, Any] = {}
        notes: list[str] = []
        seconds: dict[str, float] = {}
        for name, (protocol, own) in parts.items():
            runs = trained.get(name) or [_timed(name, lambda p=protocol, o=own: p.measure(at, o))]
            seconds[name] = round(sum(run.seconds for run in runs), 2)
            outcome = means_over_seeds([run.outcome for run in runs], own.seed)
            found, kept = outcome.metrics, outcome.scores
            if name == "knn":
                found, kept = (
                    {
                        metric.replace("_plain", "_knn"): value
                        for metric, value in every.items()
                        if metric.startswith("top") and "_k" not in metric
                    }
                    for every in (found, kept)
                )
            metrics |= found
            scores |= kept
            data = {**data, **outcome.data}
            chosen |= outcome.chosen
            grid |= outcome.grid
            notes += outcome.notes
        data["probe_seconds"] = seconds  # of training steps and scoring; the pass over the images is apart
        return Outcome(metrics, data, tuple(dict.fromkeys(notes)), chosen, grid, scores)

    def _trained(
        self, every: Sequence[At], parts: dict[str, tuple[Protocol, Any]], seed: int
    ) -> dict[str, list[Timed]]:
        """What the parts that are trained by steps score on each test set, after a training of a seed."""
        prepared: dict[str, Prepared] = {}
        for name, (protocol, own) in parts.items():
            if isinstance(protocol, TrainedProbe):
                with _named(name):
                    prepared[name] = protocol.prepare(every[0], own, seed)
        train_together(list(prepared.values()), every[0].progress)
        found: dict[str, list[Timed]] = {}
        for name, ready in prepared.items():
            scored = [_timed(name, lambda r=ready, at=at: r.outcome(at)) for at in every]
            found[name] = [run._replace(seconds=run.seconds + ready.plan.seconds) for run in scored]
        return found


def _timed(part: str, measure: Callable[[], Outcome]) -> Timed:
    began = perf_counter()
    with _named(part):
        return Timed(measure(), perf_counter() - began)


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Say of which part of the protocol a setting is that cannot be."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{part}: {error}") from error
