"""Did training help? The same protocols for the untrained encoder, for the trained one at several steps, and
for another encoder. Results are kept beside the run and used again where nothing has changed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import foveola
from foveola.config import UserError, merge, to_dict
from foveola.data.sources import Source
from foveola.evaluation.protocol import PROTOCOLS, configure, evaluate_all
from foveola.evaluation.result import Result
from foveola.models.encoder import Encoder, load
from foveola.pictures.record import Record
from foveola.pictures.request import Data, ReportConfig, choose_samples

PLACES_OF = 128  # pictures on which the share of places is measured
LIMIT = 1000  # pictures of each set, where nobody says how many
OBJECTS = 500  # that are to be found among each other
UNTRAINED, END = "untrained", "end"
NEAR_END = 0.98  # share of the steps after which a kept encoder is as good as the last


@dataclass(frozen=True, eq=False)
class Point:
    """What one encoder gave; `step` is None for one that is not of this run."""

    label: str
    step: int | None
    results: dict[str, Result]
    place_share: float | None = None  # of the variance of patches that their place explains


@dataclass(frozen=True, eq=False)
class Progress:
    """Points of one run: untrained, kept steps, the last encoder, the reference; those that could be had."""

    points: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each protocol

    def point(self, label: str) -> Point | None:
        return next((point for point in self.points if point.label == label), None)


# -- protocols -----------------------------------------------------------------------------------------------


def plan(
    record: Record, data: Data, config: ReportConfig, changes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Settings of each protocol to run: those of the recipe's own evaluation, then `changes`.

    Raises UserError for unknown protocols and keys, and for bad values.
    """
    if data.test is None:
        return {}
    names = config.protocols
    if names is None:
        there = {"label_free": True, "knn": data.labels is not None, "retrieval": data.test.has_objects}
        names = tuple(name for name, use in there.items() if use)
        changes = {k: v for k, v in changes.items() if k not in PROTOCOLS or k in names}
    configure(names, changes)
    settings = {}
    for name in names:
        known = set(PROTOCOLS[name].config.__dataclass_fields__)
        mine = {k: v for k, v in changes.items() if k in known and k not in names}
        own = changes.get(name) if isinstance(changes.get(name), dict) else {}
        settings[name] = merge(_defaults(name, names, record, data, config), merge(mine, own or {}))
    return settings


def _defaults(
    name: str, names: Sequence[str], record: Record, data: Data, config: ReportConfig
) -> dict[str, Any]:
    """Settings of one of the protocols where nobody asks for others."""
    known = set(PROTOCOLS[name].config.__dataclass_fields__)
    settings: dict[str, Any] = {}
    if name == "knn":
        settings |= {k: v for k, v in (record.get("evaluate") or {}).items() if k in known}
        if data.labels == "objects" and settings.get("rows") != "objects":
            settings |= {"rows": "objects", "view": "object"}
        elif data.labels == "pictures" and settings.get("rows") == "objects":
            settings |= {"rows": "pictures", "view": "picture"}
    if "exclude_self" in known:
        settings["exclude_self"] = data.same
    if "limit" in known:
        settings["limit"] = config.limit or settings.get("limit") or LIMIT
    if "workers" in known and isinstance(record.get("evaluate.workers"), int):
        settings["workers"] = record.get("evaluate.workers")
    if name == "retrieval":
        settings["objects"] = OBJECTS
    if name == "label_free" and "retrieval" in names:
        settings["objects"] = False  # that is what retrieval measures
    return settings


def measure(
    record: Record, data: Data, config: ReportConfig, changes: dict[str, Any], kept: Sequence[Path] = ()
) -> Progress:
    """All points of a run, each encoder loaded once; results that would be the same are used again.

    Args:
        changes: settings of protocols, as `evaluate_all` takes them.
        kept: folders of other runs' results to look in as well.

    Raises UserError for unknown protocols and keys, and for a reference that cannot be loaded. What the run
    itself lacks becomes a note.
    """
    settings = plan(record, data, config, changes)
    if data.test is None:
        return Progress(notes=data.notes)
    if not record.has_encoder:
        why = "The run has no encoder yet: the first checkpoint writes it."
        return Progress(notes=(*data.notes, why), settings=settings)
    points, notes = [], list(data.notes)
    for label, step, place in _encoders(record, config):
        encoder = load(place, config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folders = [folder / encoder.fingerprint() for folder in (record.folder / "report", *kept)]
        results, failed = _results(encoder, data, settings, folders)
        notes += failed
        share = _place_share(encoder, data.test, folders) if label in (UNTRAINED, END) else None
        points.append(Point(label, step, results, share))
    return Progress(tuple(points), tuple(dict.fromkeys(notes)), settings)


def _encoders(record: Record, config: ReportConfig) -> list[tuple[str, int | None, str | Path]]:
    """Label, step and place of what is measured; of the kept encoders at most `checkpoints`."""
    kept = [(step, path) for step, path in record.checkpoints() if step < NEAR_END * record.step]
    if len(kept) > config.checkpoints:
        chosen = np.linspace(0, len(kept), config.checkpoints + 2)[1:-1].astype(int)
        kept = [kept[i] for i in dict.fromkeys(chosen.tolist())]
    found: list[tuple[str, int | None, str | Path]] = [(UNTRAINED, 0, f"untrained:{record.folder}")]
    found += [(f"step {step:,}", step, path) for step, path in kept]
    found.append((END, record.step, record.folder))
    return found + ([(config.reference, None, config.reference)] if config.reference else [])


def _results(
    encoder: Encoder, data: Data, settings: dict[str, dict[str, Any]], folders: Sequence[Path]
) -> tuple[dict[str, Result], list[str]]:
    """Results by protocol, kept or new (written to the first folder), and what could not be measured."""
    results: dict[str, Result] = {}
    failed, missing = [], []
    for name, wanted in settings.items():
        try:
            configure((name,), {name: wanted})
        except UserError as error:  # settings of another version's recipe
            failed.append(f"{name} was not measured: {error}")
            continue
        found = (_kept(folder, name, wanted, data) for folder in folders)
        if result := next(filter(None, found), None):
            results[name] = result
        else:
            missing.append(name)
    if not missing:
        return results, failed
    try:  # together they share a pass over the pictures
        return results | _evaluate(encoder, missing, data, settings, folders[0]), failed
    except UserError as error:
        if len(missing) == 1:
            return results, [*failed, f"{missing[0]} was not measured: {error}"]
    for name in missing:
        try:
            results |= _evaluate(encoder, (name,), data, settings, folders[0])
        except UserError as error:
            failed.append(f"{name} was not measured: {error}")
    return results, failed


def _evaluate(
    encoder: Encoder, names: Sequence[str], data: Data, settings: dict[str, Any], out: Path
) -> dict[str, Result]:
    changes: dict[str, Any] = {name: settings[name] for name in names}
    return evaluate_all(encoder, names, train=data.train, test=data.test, out=out, progress=False, **changes)


def _kept(folder: Path, name: str, wanted: dict[str, Any], data: Data) -> Result | None:
    """An earlier result of the encoder whose folder this is, if all else is the same as well."""
    path = folder / "results" / f"{name}.json"
    if not path.is_file() or data.test is None:
        return None
    result = Result.read(path)
    config = configure((name,), {name: wanted})[name]
    same = json.loads(json.dumps(to_dict(config))) == result.settings
    for which, source in (("train", data.train), ("test", data.test)):
        facts = result.data.get(which)
        if which == "train" and not PROTOCOLS[name].needs_train:
            continue
        same &= (
            isinstance(facts, dict)
            and source is not None
            and facts.get("fingerprint") == source.fingerprint()
        )
    return result if same and result.versions.get("foveola") == foveola.__version__ else None


# -- place ---------------------------------------------------------------------------------------------------


def place_share(patches: Float[Tensor, "P N D"]) -> float:
    """Share of the variance of patches that their place explains, in [0, 1]; 0 for constant features.

    Components of variance of a one-way analysis with the N places as groups of P >= 2 pictures: the
    variance of the places' means, less what it would have by chance (within / P), over its sum with that
    within places.
    """
    x = patches.double()
    within = x.var(dim=0, correction=1).sum(dim=1).mean().item()
    between = x.mean(dim=0).var(dim=0, correction=1).sum().item() - within / len(x)
    total = max(between, 0.0) + within
    return max(between, 0.0) / total if total > 0 else 0.0


def _place_share(encoder: Encoder, source: Source, folders: Sequence[Path]) -> float | None:
    """Of the encoder's patches on some pictures, kept like results; None where too few can be read."""
    about = {"pictures": PLACES_OF, "fingerprint": source.fingerprint(), "foveola": foveola.__version__}
    for path in (folder / "place.json" for folder in folders):
        if path.is_file() and (tree := json.loads(path.read_text(encoding="utf-8"))).get("about") == about:
            return tree["share"]
    samples = [sample for _, sample in choose_samples(source, PLACES_OF)]
    if len(samples) < 2 or encoder.grid == (1, 1):
        return None
    patches = [
        encoder(
            torch.stack([encoder.transform(sample.image) for sample in samples[i : i + 16]])
        ).patches.cpu()
        for i in range(0, len(samples), 16)
    ]
    share = place_share(torch.cat(patches))
    folders[0].mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "share": share}) + "\n"
    (folders[0] / "place.json").write_text(text, encoding="utf-8")
    return share
