"""Runs protocols: `evaluate()` and `evaluate_all()`, whose feature passes the protocols share."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from foveola import distributed, files
from foveola.config import UserError, build, merge, refuse_unread, to_dict
from foveola.data.identity import looked_at_once, say
from foveola.data.sources import Source, as_source, notes_of
from foveola.evaluation.features.cache import Feed, where_of
from foveola.evaluation.features.overlap import POLICIES, separate
from foveola.evaluation.images import identity_for
from foveola.evaluation.inferred import jobs_with_masks, masks_setting
from foveola.evaluation.job import Job
from foveola.evaluation.protocol import At, Outcome, Protocol, find_protocol
from foveola.evaluation.result import Result, versions
from foveola.evaluation.stored import SPEED, store
from foveola.failures import explained
from foveola.model_names import home_of
from foveola.models.encoder import Encoder
from foveola.models.seen import seen_by
from foveola.proposals.run import DOOR, NO_OTHER_WORK
from foveola.zoo.load import load

Tests = Source | str | Sequence[Source | str] | None
BETWEEN = re.compile(r",\s*(?=[A-Za-z][\w.]*:)")  # a comma with another data string behind it


def evaluate(
    model: Encoder | str | Path,
    protocol: str | Protocol | type,
    *,
    train: Source | str | None = None,
    test: Tests = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    overlap: str = "refuse",
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Measure a frozen encoder by one protocol. All ranks call it; all get the result.

    Args:
        model: an `Encoder`, or what `foveola.load` takes. Of a run folder the encoder is measured, and the
            result is written to its `results/<protocol>.json`; that of `untrained:RUN` to
            `RUN/untrained/results/`, that of `RUN/encoders/step-N` or `RUN?step=N` to its own `results/`, and
            that of `RUN?which=student` to `RUN/student/results/`.
        protocol: a name (`foveola evaluate --help` lists them), an importable name such as
            `my_package.my_module:MyProtocol`, or a `foveola.Protocol` of your own.
        train, test: data strings (opened with the split of that name) or sources; `train` where the protocol
            needs it. Several test sets, as a list, or joined by commas in a text, have a result each: that of
            the first is returned, with the rest as its `others`. Probes are trained once for all of them.
        out: folder for `results/<protocol>.json`; by default the model's own folder, where it has one. An
            earlier result is replaced only if it was measured alike; others are kept beside it, as are those
            of further test sets.
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
    found = find_protocol(protocol)
    common: dict[str, Any] = {"train": train, "test": test, "out": out, "cache": cache, "device": device}
    common["overlap"] = overlap
    return evaluate_all(model, (found,), progress=progress, **common, **settings)[found.name]


@looked_at_once()
def evaluate_all(
    model: Encoder | str | Path,
    protocols: Sequence[str | Protocol | type],
    *,
    train: Source | str | None = None,
    test: Tests = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    overlap: str = "refuse",
    progress: bool = True,
    show: Callable[[Result], None] = lambda _: None,
    **settings: Any,
) -> dict[str, Result]:
    """`evaluate` for several protocols, which share one pass of the encoder over the images where they can.

    Results are given by the protocols' names, and each to `show` as soon as it is there, also where it cannot
    be written or a later protocol refuses. That results can be written is looked at before anything is
    computed. A setting counts for every protocol that knows it; `linear={"epochs": 5}` for that one alone.
    Raises UserError for a setting that none of them knows, and as `evaluate`.
    """
    found = {protocol.name: protocol for protocol in map(find_protocol, protocols)}
    configs, (by, _) = protocol_configs(protocols, settings), masks_setting(settings)
    learned_from, tests = _open(found, configs, train, test, progress)
    encoder = model if isinstance(model, Encoder) else load(model, distributed.find_device(device))
    learned_from = None if learned_from is None else seen_by([encoder], learned_from)
    tests = [seen_by([encoder], each) for each in tests]
    if out is None and not isinstance(model, Encoder):
        out = home_of(model)
    if out is not None:
        out = Path(out).expanduser()
        folder = files.results_in(out)
        distributed.on_main(lambda: files.check_writable(folder, "give another out= for results"))
    cache = cache or os.environ.get("FOVEOLA_CACHE") or None
    jobs = []
    for name, protocol in found.items():
        used = None if protocol.train_for(configs[name]) == "unused" else learned_from
        needs = protocol.needs(configs[name], encoder)
        jobs += [Job(protocol, configs[name], used, queries, needs) for queries in tests]
    jobs = _separate(jobs, overlap)
    if by is not None:
        jobs = jobs_with_masks(jobs, by, encoder, cache, progress)
    storing = _storing(jobs, cache)
    feed = Feed(encoder, cache, progress=progress) if storing else None
    results = {}
    try:
        if feed is not None:
            _want(feed, [job for job in jobs if job.protocol.name in storing])
        for name in found:
            mine = [job for job in jobs if job.protocol.name == name]
            own = feed if name in storing else None
            measured = _measure(mine, [At(encoder, job.train, job.test, own, progress) for job in mine])
            stored = []
            for number, result in enumerate(measured):
                try:
                    if out is not None and distributed.is_main():
                        # A probe that is trained already leaves the result of its training where it is.
                        further = number > 0 or bool(getattr(configs[name], "probe", None))
                        with explained(f"{name} is measured, but its result cannot be written to {out}"):
                            result = store(result, out, further)
                finally:
                    show(result)
                stored.append(result)
            results[name] = replace(stored[0], others=tuple(stored[1:]))
    finally:
        if feed is not None:
            feed.close()
    return results


def protocol_configs(protocols: Sequence[str | Protocol | type], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of each protocol, by its name.

    Raises UserError for unknown protocols and keys, and bad values.
    """
    found = [find_protocol(protocol) for protocol in protocols]
    names = [protocol.name for protocol in found]
    by, settings = masks_setting(settings)
    if by is not None and any(by.kind.name in each.Config.__dataclass_fields__ for each in found):
        settings |= {by.kind.name: by.overrides}  # one of them finds objects itself
    if not names or len(set(names)) < len(names):
        raise UserError(f"expected different protocols, got {', '.join(names) or 'none'}")
    own = {name: settings[name] for name in names if isinstance(settings.get(name), dict)}
    common = {name: value for name, value in settings.items() if name not in own}
    fields = {protocol.name: set(protocol.Config.__dataclass_fields__) for protocol in found}
    configs, known = {}, set().union(*fields.values())
    for kind in DOOR.names():
        if kind in common and kind not in known:
            raise UserError(f"{kind}. has no effect: its keys are for masks={kind}, which is not asked for")
    for protocol in found:
        name = protocol.name
        mine = {key: v for key, v in common.items() if key in fields[name] or key not in known}
        if by is not None and "masks" in fields[name]:  # where they are not read by default
            mine |= {"masks": protocol.Config.__dataclass_fields__["masks"].default or True}
        tree = merge(mine, own.get(name, {}))
        configs[name] = build(protocol.Config, tree)
        refuse_unread(configs[name], tree)
    return configs


def _open(
    protocols: Mapping[str, Protocol],
    configs: Mapping[str, Any],
    train: Source | str | None,
    test: Tests,
    progress: bool,
) -> tuple[Any, list[Any]]:
    """The training data, where one of the protocols uses them, and the test data, of one or several sets."""
    uses = {name: protocol.train_for(configs[name]) for name, protocol in protocols.items()}
    asking = [name for name, use in uses.items() if use == "needed"]
    tests = BETWEEN.split(test) if isinstance(test, str) else test
    tests = list(tests) if isinstance(tests, list | tuple) else [tests]
    none = None if tests in ([], [None]) else test
    for which, source, users in (("test", none, list(protocols)), ("train", train, asking)):
        if source is None and users:
            raise UserError(f"{users[0]}: {which} is needed, such as {which}=folder:/images")
    trained = [name for name, config in configs.items() if getattr(config, "probe", None)]
    if train is not None and trained and len(trained) == len(configs):
        raise UserError(f"{trained[0]}: probe= is trained already; leave out train=")
    used = train is not None and any(use != "unused" for use in uses.values())
    if train is not None and not used:
        raise UserError(f"train= has no effect: {', '.join(protocols)} learns from nothing; leave it out")
    texts = [each for each in tests if isinstance(each, str)]
    if len(set(texts)) < len(texts):
        raise UserError(f"test: the same set twice: {', '.join(texts)}")
    say(progress and distributed.is_main())
    return (as_source(train, "train", "train") if used else None), [
        as_source(each, "test", "test") for each in tests
    ]


def _separate(jobs: Sequence[Job], overlap: str) -> list[Job]:
    """The same jobs, with test data and notes as the policy for images in train and test has them."""
    if overlap not in POLICIES:
        raise UserError(f"overlap={overlap!r}: valid are {', '.join(POLICIES)}")
    learning = [job for job in jobs if job.learns]

    def look() -> dict[int, tuple[Source, tuple[str, ...]]]:
        return {
            id(job): separate(job.protocol.name, job.config, job.train, job.test, overlap) for job in learning
        }

    if distributed.world_size() > 1:  # one reads the files, the others find the hashes
        distributed.on_main(lambda: bool(look()))
    found = look()
    for job in learning:
        for source in (job.train, job.test):
            seen = distributed.gather_objects(identity_for(source, job.config).digest)
            if other := [rank for rank, digest in enumerate(seen) if digest != seen[0]]:
                raise UserError(f"{source.name}: process {other[0]} sees other data than process 0")
    separated = []
    for job in jobs:
        test, notes = found.get(id(job), (job.test, ()))
        separated.append(replace(job, test=test, notes=notes))
    return separated


def _storing(jobs: Sequence[Job], cache: str | Path | None) -> set[str]:
    """Names of the protocols that read stored features.

    Without a folder to keep them in, nothing is stored for those that read all of it once, unless another
    protocol reads the same.
    """
    stores = [
        {where_of(source, job.config, reading.need, views) for source, reading, views in job.readings()}
        for job in jobs
    ]
    users = Counter(each for own in stores for each in own)
    return {
        job.protocol.name
        for job, mine in zip(jobs, stores, strict=True)
        if job.readings()
        and (
            cache is not None
            or not all(reading.once for _, reading, _ in job.readings())
            or any(users[each] > 1 for each in mine)
        )
    }


def _want(feed: Feed, jobs: Sequence[Job]) -> None:
    """Tell the feed all that will be read before anything is."""
    for job in jobs:
        for source, reading, views in job.readings():
            try:
                feed.want(source, job.config, reading.need, views)
            except UserError as error:
                raise UserError(f"{job.protocol.name}: {error}") from error


def _facts(job: Job, stated: dict[str, Any]) -> dict[str, Any]:
    """What a protocol reports of its data, with their identity where it has not reported that itself.

    Data in which objects were found are told apart by their images: what is found depends on the encoder.
    """
    facts = dict(stated)
    if job.plain is not None:
        facts["masks"] = job.masks
        for which, source in zip(("train", "test"), job.plain, strict=True):
            if isinstance(facts.get(which), dict):
                facts[which] = facts[which] | {"fingerprint": identity_for(source, job.config).digest}
    for which, source in (("train", job.train if job.learns else None), ("test", job.test)):
        own = stated.get(which, {})
        if source is not None and isinstance(own, dict) and "fingerprint" not in own:
            facts[which] = {"name": source.name, "fingerprint": identity_for(source, job.config).digest} | own
    return facts


def _settings(job: Job, outcome: Outcome) -> dict[str, Any]:
    """What was asked for, and who found the objects if they were found."""
    settings = to_dict(job.config) if outcome.settings is None else outcome.settings
    if not job.masks:
        return settings
    given = {
        name: value for name, value in job.masks["given"].items() if name not in {*SPEED, *NO_OTHER_WORK}
    }
    if "model" in given:  # a name does not tell its weights
        by = job.masks["by"]
        given["weights"] = by.get("weights", by.get("encoder"))
    return settings | {"masks_by": {"kind": job.masks["kind"], **to_dict(given)}}


def _measure(jobs: Sequence[Job], every: Sequence[At]) -> list[Result]:
    """Run one protocol on its test sets. Probes train on every rank alike; the numbers are those of the
    first.
    """
    began, found = perf_counter(), []
    protocol, config = jobs[0].protocol, jobs[0].config
    outcomes = list(protocol.measure_all(every, config))
    for job, at, own in zip(jobs, every, outcomes, strict=True):
        outcome = distributed.broadcast_object(own)
        metrics = {metric: float(value) for metric, value in outcome.metrics.items()}
        for metric, value in metrics.items():
            if not isfinite(value):
                raise UserError(f"{protocol.name}: {metric} is {value}, not a finite number")
        sources = (job.train, job.test)
        stated = [*outcome.notes, *(note for source in sources for note in notes_of(source))]
        result = Result(
            protocol=protocol.name,
            settings=_settings(job, outcome),
            metrics=metrics,
            data=_facts(job, outcome.data),
            encoder=at.encoder.fingerprint(),
            versions=versions(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(perf_counter() - began, 2),
            notes=(*job.notes, *dict.fromkeys(stated)),
            chosen=outcome.chosen,
            grid=outcome.grid,
            scores=outcome.scores,
            described=protocol.metrics,
            beside=outcome.beside,
        )
        found.append(result)
    return found
