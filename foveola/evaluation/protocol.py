"""The list of protocols, `evaluate()`, and the `Result` that it writes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from foveola import distributed, files
from foveola.config import UserError, build, merge, nearest, to_dict
from foveola.data.identity import looked_at_once, say
from foveola.data.sources import Source, Split, as_source, notes_of
from foveola.evaluation.classification import abmilp, attentive, knn, linear, logistic, probes
from foveola.evaluation.features.cache import Feed, where_of
from foveola.evaluation.features.names import Need
from foveola.evaluation.features.overlap import POLICIES, separate
from foveola.evaluation.features.table import identity_for
from foveola.evaluation.localisation import localisation
from foveola.evaluation.metrics import Outcome
from foveola.evaluation.result import Result, versions
from foveola.evaluation.segmentation import linear as linear_segmentation
from foveola.evaluation.segmentation import patches, reading
from foveola.evaluation.segmentation import retrieval as dense_retrieval
from foveola.evaluation.stored import home_of, store
from foveola.evaluation.views import label_free, retrieval
from foveola.failures import told
from foveola.models.encoder import Encoder
from foveola.zoo.load import load


@dataclass(frozen=True)
class Protocol:
    """A way to measure an encoder: its settings, what runs it, whether it needs labelled training data."""

    config: type
    run: Callable[
        ..., Outcome
    ]  # of (encoder, train, test, config, progress), and `feed` where it `needs` one
    needs_train: bool
    help: str
    # What it reads of a picture from the shared feature pass; None: it makes its own pass (with this config).
    needs: Callable[[Any, Encoder], Need | None] | None = None
    # What it reads of `train` from stored features where `train` is given; it can do without.
    learns: Callable[[Any, Encoder], Need | None] | None = None
    streams: bool = False  # whether it can do without stored features (feed=None), and does where it is alone


PROTOCOLS = {
    "knn": Protocol(
        knn.KnnConfig,
        knn.run,
        True,
        "k-NN classification by weighted vote, with and without object masks",
        knn.needs,
        streams=True,
    ),
    "linear": Protocol(
        linear.LinearConfig,
        linear.run,
        True,
        "linear classification: a grid of learning rates and features at once (DINO, DINOv2, MAE)",
        linear.needs,
    ),
    "logistic": Protocol(
        logistic.LogisticConfig,
        logistic.run,
        True,
        "linear classification by L-BFGS logistic regression, over a path of C",
        logistic.needs,
    ),
    "attentive": Protocol(
        attentive.AttentiveConfig,
        attentive.run,
        True,
        "classification of what one learned query reads from the patches (CAPI, CAE)",
        attentive.needs,
    ),
    "abmilp": Protocol(
        abmilp.AbmilpConfig,
        abmilp.run,
        True,
        "linear classification of patches averaged by learned or fixed scores (Selective Aggregation)",
        abmilp.needs,
    ),
    "probes": Protocol(
        probes.ProbesConfig, probes.run, True, "all of these side by side on the same features", probes.needs
    ),
    "retrieval": Protocol(
        retrieval.RetrievalConfig,
        retrieval.run,
        False,
        "find the other crop of an object among those of others",
    ),
    "label_free": Protocol(
        label_free.LabelFreeConfig,
        label_free.run,
        False,
        "numbers without labels: rank, alignment, uniformity, other views found again",
    ),
    "localisation": Protocol(
        localisation.LocalisationConfig,
        localisation.run,
        False,
        "boxes around what attention (or another map) lights up, against annotated boxes",
        learns=localisation.learns,
    ),
    "dense_retrieval": Protocol(
        dense_retrieval.DenseRetrievalConfig,
        dense_retrieval.run,
        True,
        "segmentation by attention to the nearest labelled patches",
        reading.needs,
        streams=True,
    ),
    "knn_segmentation": Protocol(
        patches.KnnSegmentationConfig,
        patches.run_knn,
        True,
        "segmentation by the labels of the nearest patches",
        reading.needs,
        streams=True,
    ),
    "logistic_segmentation": Protocol(
        patches.LogisticSegmentationConfig,
        patches.run_logistic,
        True,
        "segmentation by logistic regression on patches",
        reading.needs,
        streams=True,
    ),
    "linear_segmentation": Protocol(
        linear_segmentation.LinearSegmentationConfig,
        linear_segmentation.run,
        True,
        "segmentation by a linear layer on patches, trained by gradient",
        reading.needs,
        streams=True,
    ),
}


def evaluate(
    model: Encoder | str | Path,
    protocol: str,
    *,
    train: Source | str | None = None,
    test: Source | str | None = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    overlap: str = "refuse",
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Measure a frozen encoder by one of `PROTOCOLS`. All ranks call it; all get the result.

    Args:
        model: an `Encoder`, or what `foveola.load` takes. Of a run folder the encoder is measured, and the
            result is written to its `results/<protocol>.json`; that of `untrained:RUN` to
            `RUN/untrained/results/`, and that of `RUN/encoders/step-N` to its own `results/`.
        train, test: data strings (opened with the split of that name) or sources; `train` where the protocol
            needs it.
        out: folder for `results/<protocol>.json`; by default the model's own folder, where it has one. An
            earlier result is replaced only if it was measured alike; others are kept beside it.
        cache: folder that keeps the features of the pass; by default that of FOVEOLA_CACHE, if it is set, and
            otherwise a temporary one.
        device: where a model that is loaded runs; by default a GPU if there is one. An `Encoder` stays where
            it is.
        overlap: what to do with test images that train holds as well, byte for byte: "refuse" them, "drop"
            them (measure the others), or "allow" them; the notes of the result say how many there are.
        settings: keys of the protocol's configuration, such as `k=(20,)`, `rows="objects"`.

    Raises UserError for unknown protocols and keys, bad values, data without what the protocol needs, and
    encoders whose features are not finite.
    """
    places: dict[str, Any] = {"train": train, "test": test, "out": out, "cache": cache, "device": device}
    places["overlap"] = overlap
    return evaluate_all(model, (protocol,), progress=progress, **places, **settings)[protocol]


@looked_at_once()
def evaluate_all(
    model: Encoder | str | Path,
    protocols: Sequence[str],
    *,
    train: Source | str | None = None,
    test: Source | str | None = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    overlap: str = "refuse",
    progress: bool = True,
    show: Callable[[Result], None] = lambda _: None,
    **settings: Any,
) -> dict[str, Result]:
    """`evaluate` for several protocols, which share one pass of the encoder over the pictures where they can.

    Each result is given to `show` as soon as it is there, also where it cannot be written or a later protocol
    refuses. That results can be written is looked at before anything is computed.
    A setting counts for every protocol that knows it; `linear={"epochs": 5}` for that one alone. Raises
    UserError for a setting that none of them knows, and as `evaluate`.
    """
    configs = configure(protocols, settings)
    needs_train = [name for name in configs if PROTOCOLS[name].needs_train]
    for which, source, users in (("test", test, list(configs)), ("train", train, needs_train)):
        if source is None and users:
            raise UserError(f"{users[0]}: {which} is needed, such as {which}=folder:/pictures")
    learning = [name for name in configs if PROTOCOLS[name].learns is not None]
    say(progress and distributed.is_main())
    bank = _open(train, "train") if needs_train or (learning and train is not None) else None
    queries = _open(test, "test")
    encoder = model if isinstance(model, Encoder) else load(model, distributed.find_device(device))
    if out is None and not isinstance(model, Encoder):
        out = home_of(model)
    if out is not None:
        place = Path(out) / "results"
        distributed.on_main(lambda: files.check_place(place, "give another out= for results"))
    cache = cache or os.environ.get("FOVEOLA_CACHE") or None
    results = {}
    learned = _learned(encoder, configs) if bank is not None and len(bank.classes or ()) > 1 else {}
    trained = {name: config for name, config in configs.items() if name in {*needs_train, *learned}}
    apart, said = _tests(trained, bank, queries, overlap)
    tests: dict[str, Any] = dict.fromkeys(configs, queries) | apart
    storing = _storing(encoder, configs, tests, cache)
    feed = Feed(encoder, cache, progress=progress) if storing or learned else None
    try:
        if feed is not None:
            _want(feed, encoder, {name: configs[name] for name in storing}, bank, tests)
            _want_learned(feed, learned, configs, bank)
        for name, config in configs.items():
            sources = (bank if PROTOCOLS[name].needs_train or name in learning else None, tests[name])
            reads = name in storing or name in learned
            result = _measure(encoder, name, config, sources, progress, feed if reads else None)
            results[name] = replace(result, notes=(*said.get(name, ()), *result.notes))
            try:
                if out is not None and distributed.is_main():
                    with told(f"{name} is measured, but its result cannot be written to {out}"):
                        results[name] = store(results[name], out)
            finally:
                show(results[name])
    finally:
        if feed is not None:
            feed.close()
    return results


def configure(protocols: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of each protocol. Raises UserError for unknown protocols and keys, and bad values."""
    for name in protocols:
        if name not in PROTOCOLS:
            near = nearest(name, PROTOCOLS)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(PROTOCOLS)}"
            raise UserError(f"unknown protocol {name!r}; {hint}")
    if not protocols or len(set(protocols)) < len(protocols):
        raise UserError(f"expected different protocols, got {', '.join(protocols) or 'none'}")
    own = {name: settings[name] for name in protocols if isinstance(settings.get(name), dict)}
    common = {name: value for name, value in settings.items() if name not in own}
    fields = {name: set(PROTOCOLS[name].config.__dataclass_fields__) for name in protocols}
    configs, known = {}, set().union(*fields.values())
    for name in protocols:
        mine = {key: v for key, v in common.items() if key in fields[name] or key not in known}
        configs[name] = build(PROTOCOLS[name].config, merge(mine, own.get(name, {})))
    return configs


def _tests(
    configs: dict[str, Any], train: Any, test: Source, overlap: str
) -> tuple[dict[str, Source], dict[str, tuple[str, ...]]]:
    """What each of these protocols, which learn from `train`, measures, and notes on images in both."""
    if overlap not in POLICIES:
        raise UserError(f"overlap={overlap!r}: valid are {', '.join(POLICIES)}")

    def look() -> dict[str, tuple[Source, tuple[str, ...]]]:
        return {name: separate(name, config, train, test, overlap) for name, config in configs.items()}

    if distributed.world_size() > 1:  # one reads the files, the others find the hashes
        distributed.on_main(lambda: bool(look()))
    found = look()
    for config in configs.values():
        for source in (train, test):
            seen = distributed.gather_objects(identity_for(source, config).digest)
            if other := [rank for rank, digest in enumerate(seen) if digest != seen[0]]:
                raise UserError(f"{source.name}: process {other[0]} sees other data than process 0")
    return ({n: each for n, (each, _) in found.items()}, {n: notes for n, (_, notes) in found.items()})


def _storing(
    encoder: Encoder, configs: dict[str, Any], tests: dict[str, Any], cache: str | Path | None
) -> dict[str, Need]:
    """The protocols that read from stored features, with what they read.

    Without a folder to keep them in, those that can stream store nothing that no other protocol reads.
    """
    found = {
        name: needs(config, encoder) for name, config in configs.items() if (needs := PROTOCOLS[name].needs)
    }
    wanted = {name: need for name, need in found.items() if need}
    places = [where_of(tests[name], configs[name], need) for name, need in wanted.items()]
    return {
        name: need
        for (name, need), place in zip(wanted.items(), places, strict=True)
        if cache is not None or not PROTOCOLS[name].streams or places.count(place) > 1
    }


def _learned(encoder: Encoder, configs: dict[str, Any]) -> dict[str, Need]:
    """What protocols that can do without training pictures read of them."""
    found = {name: f(config, encoder) for name, config in configs.items() if (f := PROTOCOLS[name].learns)}
    return {name: need for name, need in found.items() if need}


def _want_learned(feed: Feed, learned: dict[str, Need], configs: dict[str, Any], train: Any) -> None:
    for name, need in learned.items():
        feed.want(train, configs[name], need)


def _want(
    feed: Feed, encoder: Encoder, configs: dict[str, Any], train: Any, tests: dict[str, Source]
) -> None:
    """Tell the feed all that will be read before anything is."""
    for name, config in configs.items():
        wanted = probes.wants(config, encoder) if name == "probes" else []
        needs = PROTOCOLS[name].needs
        if name != "probes" and needs and (need := needs(config, encoder)):
            wanted = [(getattr(config, "views", 0), need)]
        for views, need in wanted:
            try:
                feed.want(train, config, need, views)
                feed.want(tests[name], config, need)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error


def _measure(
    encoder: Encoder,
    name: str,
    config: Any,
    sources: tuple[Any, Source],
    progress: bool,
    feed: Feed | None,
) -> Result:
    """Run one protocol. Probes train on every rank alike; the numbers are those of the first."""
    protocol, began = PROTOCOLS[name], perf_counter()
    more = {"feed": feed} if protocol.needs is not None or protocol.learns is not None else {}
    outcome = distributed.broadcast_object(protocol.run(encoder, *sources, config, progress, **more))
    return Result(
        protocol=name,
        settings=to_dict(config),
        metrics=outcome.metrics,
        data=outcome.data,
        encoder=encoder.fingerprint(),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(perf_counter() - began, 2),
        notes=tuple(dict.fromkeys([*outcome.notes, *(note for s in sources for note in notes_of(s))])),
        chosen=outcome.chosen,
        grid=outcome.grid,
        scores=outcome.scores,
    )


def _open(source: Source | str | None, split: Split) -> Any:
    return None if source is None else as_source(source, split, split)
