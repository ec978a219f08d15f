"""All probes side by side on the same features: the protocol `probes`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

from foveola.config import ConfigError, key
from foveola.data.sources import Source
from foveola.evaluation.classification import abmilp, attentive, knn, linear, logistic
from foveola.evaluation.classification.task import ProbeConfig
from foveola.evaluation.features.cache import Feed, Need
from foveola.evaluation.metrics import Outcome
from foveola.models.encoder import Encoder

Name = Literal["knn", "logistic", "linear", "aggregations", "attentive", "cae"]


@dataclass(frozen=True)
class ProbesConfig(ProbeConfig):
    """Settings of `probes`. Every probe trains for the same number of epochs, on the same rows."""

    run: tuple[Name, ...] = key(
        ("knn", "logistic", "linear", "aggregations", "attentive", "cae"), "which probes, in this order"
    )
    epochs: int = key(30, "passes over the training pictures of each trained probe", at_least=1)
    batch: int = key(256, "pictures of a step", at_least=1)
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

    def __post_init__(self) -> None:
        if not self.run or len(set(self.run)) < len(self.run):
            raise ValueError(f"run: needs different probes, got {list(self.run)}")
        if set(self.run) & {"aggregations", "cae"} and not self.lr:
            raise ValueError("lr: needs a value")


@dataclass(frozen=True)
class Part:
    """One protocol within `probes`, with its configuration."""

    config: Any
    run: Callable[..., Outcome]
    need: Need = field(default_factory=lambda: Need(frozenset()))


def parts_of(config: ProbesConfig, encoder: Encoder) -> dict[str, Part]:
    """The protocols that `probes` runs, in order, all with the same share, split and seed of the pictures."""
    shared: dict[str, Any] = {name: getattr(config, name) for name in ProbeConfig.__dataclass_fields__}
    once: dict[str, Any] = {**shared, "views": 0}
    reading: dict[str, Any] = {name: v for name, v in once.items() if name not in ("holdout", "views")}
    length: dict[str, Any] = {"epochs": config.epochs, "batch": config.batch}
    parts: dict[str, Part] = {}
    for name in config.run:
        if name == "knn":
            settings = knn.KnnConfig(**reading, masks=False, k=config.k)
            parts[name] = Part(settings, knn.run, knn.needs(settings, encoder) or Need(frozenset()))
        elif name == "logistic":
            settings = logistic.LogisticConfig(**once, values=config.values)
            parts[name] = Part(settings, logistic.run, logistic.needs(settings, encoder))
        elif name == "linear":
            settings = linear.LinearConfig(**shared, **length)
            parts[name] = Part(settings, linear.run, linear.needs(settings, encoder))
        elif name == "attentive":
            settings = attentive.AttentiveConfig(**shared, **length, heads=config.heads)
            parts[name] = Part(settings, attentive.run, attentive.needs(settings, encoder))
        elif name == "cae":
            settings = attentive.AttentiveConfig(
                **shared, **length, style="cae", heads=config.heads, lr=config.lr
            )
            parts[name] = Part(settings, attentive.run, attentive.needs(settings, encoder))
        else:
            fixed = ("token", "average", "attention", "lowest_entropy", "centre")
            predictor = ("predictor",) if encoder.predictor is not None else ()
            settings = abmilp.AbmilpConfig(
                **shared,
                **length,
                fixed=(*fixed, *predictor),
                depth=config.depth,
                lr=config.lr,
                attention_of=config.attention_of,
                warmup=min(10, config.epochs // 3),
            )
            parts[name] = Part(settings, abmilp.run, abmilp.needs(settings, encoder))
    return parts


def wants(config: ProbesConfig, encoder: Encoder) -> list[tuple[int, Need]]:
    """(views of train, what is read) of each part, so that one pass gives all of it."""
    return [(getattr(part.config, "views", 0), part.need) for part in parts_of(config, encoder).values()]


def needs(config: ProbesConfig, encoder: Encoder) -> Need:
    """All that the parts read."""
    every = [need for _, need in wants(config, encoder)]
    return Need(frozenset().union(*(n.kinds for n in every)), max(n.layers for n in every))


def run(
    encoder: Encoder, train: Source, test: Source, config: ProbesConfig, progress: bool, feed: Feed
) -> Outcome:
    """Every probe on the same features: the metrics of all of them, with their intervals.

    Names are those of the protocols: `top1_knn`, `top1_logistic`, `top1_linear`, `top1_attentive`, and of the
    same linear classifier on one vector of a picture `top1_abmilp`, `top1_token`, `top1_average`, ...;
    `top1_cae` is CAE's attentive probe.
    """
    parts = parts_of(config, encoder)
    metrics: dict[str, float] = {}
    data: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    grid: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    notes: list[str] = []
    seconds: dict[str, float] = {}
    for views, need in wants(config, encoder):
        feed.want(train, config, need, views)
        feed.want(test, config, need)
    for name, part in parts.items():
        began = perf_counter()
        try:
            outcome = part.run(encoder, train, test, part.config, progress, feed)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        seconds[name] = round(perf_counter() - began, 2)
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
    data["probe_seconds"] = seconds  # the first includes the pass over the pictures
    return Outcome(metrics, data, tuple(dict.fromkeys(notes)), chosen, grid, scores)
